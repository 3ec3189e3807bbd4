"""Real weights: what fetch_smollm2.py makes of a GGUF file, and the model served.

The second fetches 93 MB and is left out unless SMOLLM2 is set: to `fetch`, or to the folder
that `make run-smollm2` leaves (build/smollm2-135m-instruct)."""
import json
import os
import struct
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np

from daemon import ON_CPU, ROOT, Daemon

SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))
from fetch_smollm2 import halves_apart  # noqa: E402
from gguf_file import Q4_1, Q8_0, GgufError, GgufFile  # noqa: E402

SMOLLM2 = os.environ.get("SMOLLM2", "")
TEXT = ROOT / "tests" / "texts" / "harbour.txt"
REFERENCE = Path(__file__).resolve().parent / "smollm2_reference.json"


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def gguf(tensors, version=3):
    """A file of these tensors, [(name, shape with the last dimension first, type, bytes)]."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), 2)
    head += string("list") + struct.pack("<IIQ", 9, 8, 2) + string("a") + string("bc")
    head += string("number") + struct.pack("<If", 6, 0.5)
    body = b""
    for name, shape, kind, data in tensors:
        head += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind,
                                           len(body))
        body += data + b"\0" * (-len(data) % 32)
    return head + b"\0" * (-len(head) % 32) + body


class Gguf(unittest.TestCase):
    def test_values(self):
        eights = [(0.5, range(-16, 16)), (-2.0, range(32))]
        fours = [(0.25, -1.0, [i % 16 for i in range(32)]), (2.0, 3.0, [15] * 16 + [0] * 16)]
        file = GgufFile(gguf([
            ("whole", (3,), 0, struct.pack("<3f", 1, -2.5, 3)),
            ("eights", (32, 2), Q8_0, b"".join(struct.pack("<e32b", d, *q) for d, q in eights)),
            ("fours", (64,), Q4_1, b"".join(
                struct.pack("<ee16B", d, m, *(q[i] | q[i + 16] << 4 for i in range(16)))
                for d, m, q in fours)),
        ]))
        self.assertEqual(file.metadata, {"list": ["a", "bc"], "number": 0.5})
        self.assertEqual(file.tensor("whole").tolist(), [1, -2.5, 3])
        self.assertEqual(file.tensor("eights").tolist(), [[d * x for x in q] for d, q in eights])
        self.assertEqual(file.tensor("fours").tolist(), [d * x + m for d, m, q in fours for x in q])

    def test_refuses(self):
        good = gguf([("t", (32,), Q8_0, b"\0" * 34)])
        for data, sentence in ((b"JUNK" + good[4:], "begin with GGUF"), (good[:40], "ends at byte"),
                               (gguf([], version=9), "version 9"),
                               (gguf([("t", (32,), 2, b"\0" * 18)]), "type 2"),
                               (good[:-32], "does not fit"),
                               (gguf([]), "no tensor t")):
            with self.subTest(sentence), self.assertRaisesRegex(GgufError, sentence):
                GgufFile(data).tensor("t")

    def test_rotated_pairs(self):
        """Two heads of six channels; row i of a head is named after where GGUF has it."""
        rows = np.arange(12.0).reshape(12, 1)
        self.assertEqual(halves_apart(rows, 2).ravel().tolist(),
                         [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11])


@unittest.skipUnless(SMOLLM2, "set SMOLLM2=fetch to fetch 93 MB of real weights and serve them")
class SmolLM2(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.scratch = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.scratch.cleanup)
        folder = SMOLLM2
        if SMOLLM2 == "fetch":
            folder = str(Path(cls.scratch.name) / "smollm2-135m-instruct")
            done = subprocess.run([sys.executable, str(SCRIPTS / "fetch_smollm2.py"), folder],
                                  capture_output=True, text=True)
            if "could not download" in done.stderr:
                raise unittest.SkipTest(done.stderr.strip())
            if done.returncode:
                raise AssertionError(done.stderr)
        cls.d = Daemon(model=folder)
        cls.addClassCleanup(cls.d.stop)

    def test_perplexity(self):
        """The server's tokens and log-probabilities are those of transformers."""
        want = json.loads(REFERENCE.read_text())
        done = subprocess.run([sys.executable, str(SCRIPTS / "perplexity.py"), str(TEXT),
                               "--url", self.d.url, "--json"],
                              capture_output=True, text=True, check=True)
        got = json.loads(done.stdout)
        self.assertEqual(got["ids"], want["ids"])
        self.assertAlmostEqual(got["perplexity"] / want["perplexity"], 1, delta=0.005)
        # K and V are kept in bf16, which moves single log-probabilities by up to 0.04; on a GPU
        # activations are bf16 as well (0.6 there is a guess).
        worst = max(abs(a - b) for a, b in zip(got["logprobs"], want["logprobs"], strict=True))
        self.assertLess(worst, 0.15 if ON_CPU else 0.6)

    def test_chat(self):
        status, _, body = self.d.request("POST", "/v1/chat/completions", {
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_tokens": 20, "temperature": 0})
        self.assertEqual(status, 200, body)
        choice = json.loads(body)["choices"][0]
        self.assertIn("Paris", choice["message"]["content"])
        self.assertEqual(choice["finish_reason"], "stop")


if __name__ == "__main__":
    unittest.main()
