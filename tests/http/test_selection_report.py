"""scripts/selection_report.py: its formulas by hand, and over what a server wrote."""
import json
import math
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np

from daemon import BINARY, ON_CPU, PATIENCE, ROOT, Daemon

sys.path.insert(0, str(ROOT / "scripts"))
import selection_dump as sd  # noqa: E402
import selection_report as sr  # noqa: E402

BLOCK = 64 * 8192 + 8 * 2 * 2176    # bytes of one of the bundled model
SPARSE = {"crossover": "100", "keep_blocks": "4", "keep_tokens": "96", "recent_tokens": "32"}
LATENT = ROOT / "build" / "models" / "glm4-moe-lite"


def text(n, i=1):
    return [300 + (i * 131 + k * 37) % 900 for k in range(n)]


class Folder(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.folder = Path(scratch.name)
        self.dump = self.folder / "steps.dump"

    def run_report(self, *argv):
        return subprocess.run([sys.executable, str(ROOT / "scripts" / "selection_report.py"), str(self.dump),
                               *map(str, argv)], capture_output=True, text=True, timeout=240 * PATIENCE)

    def report(self, *argv):
        """What it writes as JSON; it has to have a table too."""
        out = self.folder / "report.json"
        done = self.run_report("--json", out, *argv)
        self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout)
        self.assertIn("| layer | head | mass |", done.stdout)
        return json.loads(out.read_text()), done.stdout


class ByHand(Folder):
    """A layer with one KV head of two query heads, keys and values of one number, blocks of two
    tokens. Scores are ln 2 times a whole number, so weights are powers of two."""

    def header(self, **other):
        h = np.zeros((), sd.HEADER)
        values = dict(magic=b"seldump", version=1, act=0, layers=1, heads=2, kv_heads=1, head_dim=1,
                      latent_dim=0, row_dim=2, block_tokens=2, nth_layer=1, filter=1, index=0, selection=0,
                      sink_tokens=0, recent_tokens=1, scale=math.log(2)) | other
        for name, value in values.items():
            h[name] = value
        return h.tobytes()

    @staticmethod
    def record(payload, **values):
        r = np.zeros((), sd.RECORD)
        payload += bytes(-len(payload) % 8)
        for name, value in dict(values, sequence=7, bytes=len(payload)).items():
            r[name] = value
        return r.tobytes() + payload

    def rows(self, first, rows):
        """[(key, value)]"""
        bits = (np.array(rows, np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return self.record(bits.tobytes(), kind=sd.ROWS, first=first, n=len(rows))

    QUERIES = np.array([1, 0], np.float32).tobytes()

    def step(self, n, kept, chosen, number, hot_rows=0, on_device=0, queries=QUERIES):
        def padded(x, width):
            return x + [-1] * (width - len(x))
        payload = queries + np.array(
            [len(kept), len(chosen), *padded(kept, 3), *padded(chosen, 2)], np.int32).tobytes()
        if hot_rows:
            payload += np.array([on_device], np.uint32).tobytes()
        return self.record(payload, kind=sd.STEP, first=n - 1, n=n, keep_blocks=3, keep_tokens=2,
                           step=number, hot_rows=hot_rows)

    def write(self, *parts, **header):
        self.dump.write_bytes(self.header(**header) + b"".join(parts))

    def assert_figures(self, got, **want):
        for name, value in want.items():
            self.assertAlmostEqual(got[name], value, places=6, msg=name)

    # Query heads: one weights the keys 3 2 1 1 as 8 4 2 2, the other all alike.
    FIRST = [(3, 1), (2, 2), (1, 4), (1, 8)]

    def test_one_step(self):
        """Token 1 of block 0 is chosen; token 0 has most. Full attention is 2.5 and 3.75, of token 1
        alone it is 2."""
        self.write(self.rows(0, self.FIRST[:2]), self.rows(2, self.FIRST[2:]), self.step(4, [0], [1], 1))
        r, _ = self.report()
        head = r["layers"][0]["heads"][0]
        self.assert_figures(head, mass=1 / 4, mass_least=1 / 4, best=3 / 8, blocks=5 / 8,
                            error=(0.5 / 2.5 + 1.75 / 3.75) / 2, recall_blocks=1, recall_tokens=0)
        self.assertEqual(head["steps"], 1)
        self.assertIsNone(head["lagged"]["tokens"])
        self.assertEqual(head["again_tokens"], {})

    def test_other_numbers(self):
        """Queries in bf16, padded; and latent rows, whose first number is the value as well."""
        rows, step = self.rows(0, self.FIRST), self.step(4, [0], [1], 1)
        self.write(rows, step)
        want, _ = self.report()
        halves = np.array([0x3f80, 0, 0, 0], np.uint16).tobytes()
        self.write(rows, self.step(4, [0], [1], 1, queries=halves), act=1)
        self.assertEqual(self.report()[0], want)
        # Keys have two numbers, the query's second is 0: the same weights, of values 3 2 1 1.
        long = np.array([1, 0, 0, 0], np.float32).tobytes()
        self.write(rows, self.step(4, [0], [1], 1, queries=long), latent_dim=1, head_dim=2)
        got, _ = self.report()
        full = (3 / 2 + 2 / 4 + 1 / 8 + 1 / 8, 7 / 4)
        self.assert_figures(got["all"], mass=1 / 4, best=3 / 8,
                            error=sum(abs(2 - x) / x for x in full) / 2)
        self.assertTrue(got["latent"])

    def test_two_steps(self):
        """A token of weight 16 comes: 1/4 1/8 1/16 1/16 1/2 and 1/5 each. Blocks 0 and 2 are kept,
        tokens 0 and 4 chosen, which are the best two."""
        self.write(self.rows(0, self.FIRST), self.step(4, [0], [1], 1),
                   self.rows(4, [(4, 1)]), self.step(5, [0, 2], [0, 4], 2))
        r, _ = self.report()
        head = r["layers"][0]["heads"][0]
        second = (3 / 4 + 2 / 5) / 2
        self.assert_figures(head, mass=(1 / 4 + second) / 2, mass_least=1 / 4, best=(3 / 8 + second) / 2,
                            blocks=(5 / 8 + (7 / 8 + 3 / 5) / 2) / 2, recall_blocks=1, recall_tokens=1 / 2,
                            error=((0.5 / 2.5 + 1.75 / 3.75) / 2 + (0.75 / 1.75 + 2.2 / 3.2) / 2) / 2)
        # Tokens 1 and 4; blocks 0 and 2. Both of the best are in these.
        self.assert_figures(head["lagged"], exact_tokens=second, tokens=(5 / 8 + 2 / 5) / 2,
                            exact_blocks=(7 / 8 + 3 / 5) / 2, blocks=(7 / 8 + 3 / 5) / 2, recall=1)
        self.assertEqual((head["again_blocks"], head["again_tokens"]), ({"1": 0.5}, {"1": 0.0}))

    def test_steps_apart(self):
        """What is compared is a step of the same sequence so many tokens before, or nothing."""
        rows = [(0, 1)] * 9
        self.write(self.rows(0, rows[:6]), self.step(6, [0], [0, 1], 1), self.rows(6, rows[6:7]),
                   self.step(7, [0], [0, 2], 2), self.rows(7, rows[7:]), self.step(9, [0], [0, 1], 3))
        head = self.report()[0]["layers"][0]["heads"][0]
        self.assertEqual(head["again_tokens"], {"1": 0.5})
        self.assertIsNotNone(head["lagged"]["tokens"])

    def test_hot_rows(self):
        """Every second step the same two tokens: a set of two forgets them, one of four does not.
        Only the second half of the steps counts, and tokens of the newest block never."""
        n, parts = 9, [self.rows(0, [(0, 1)] * 8)]
        for i in range(8):
            parts += [self.rows(n - 1, [(0, 1)]), self.step(n, [0, 1], [0, 1] if i % 2 else [2, 3], i + 1)]
            n += 1
        parts += [self.rows(n - 1, [(0, 1)]), self.step(n, [8], [16], 9)]
        self.write(*parts)
        hot = self.report()[0]["all"]["hot"]
        self.assertEqual((hot["1"], hot["2"], hot["32"]), (0, 1, 1))

    def test_ring(self):
        """Replaced are, from the hand on, rows that so many steps did not use."""
        ring = sr.Ring(4, 2, 10)
        found = [ring.use(np.array(c), i + 1) for i, c in enumerate(([0, 1], [2, 3], [0, 2], [4, 5]))]
        self.assertEqual(found, [0, 0, 2, 0])
        self.assertEqual(ring.position.tolist(), [0, 4, 2, 5])
        self.assertEqual(ring.hand, 0)
        self.assertEqual(ring.use(np.array([0, 1]), 5), 1)
        self.assertEqual(ring.position.tolist(), [0, 4, 1, 5])

    def test_own_sets(self):
        """Block 1 is on the device, the others are not: the second time they are in the set."""
        self.write(self.rows(0, [(0, 1)] * 4), self.step(4, [0, 1], [0, 3], 1, 4, 0b10),
                   self.rows(4, [(0, 1)]), self.step(5, [0, 1], [0, 3], 2, 4, 0b110))
        r, table = self.report()
        self.assertEqual(r["layers"][0]["engine_hot_rows"], {"hits": 1, "misses": 1, "resident": 2})
        self.assertIn("| 0 | 1 | 1 | 2 |", table)

    def test_a_tail_that_is_cut(self):
        whole = self.rows(0, self.FIRST) + self.step(4, [0], [1], 1)
        self.write(whole)
        want, _ = self.report()
        for n in (1, 50, 60):
            self.write(whole, self.rows(4, [(1, 1)])[:n])
            self.assertEqual(self.report()[0], want)

    def test_refuses(self):
        for content, sentence in ((b"", "no selection dump"), (b"x" * 200, "no selection dump of version 1"),
                                  (self.header(), "has no sparse step"),
                                  (self.header() + self.rows(0, self.FIRST), "has no sparse step")):
            self.dump.write_bytes(content)
            done = self.run_report()
            self.assertNotEqual(done.returncode, 0)
            self.assertIn(sentence, done.stderr)
        self.assertIn("is there already", self.run_report("--record", "1000").stderr)
        self.assertIn("go with --record", self.run_report("--", "--selection", "lagged").stderr)
        self.assertIn("go with --record", self.run_report("--needles", "3").stderr)
        self.dump.unlink()
        self.assertIn("No such file", self.run_report().stderr)


class OfAServer(Folder):
    def dump_of(self, **options):
        """The answer, what counters said, and the log, of a server with a dump."""
        body = {"prompt": text(700), "max_tokens": 41, "temperature": 0, "ignore_eos": True}
        with Daemon(**dict(SPARSE, selection_dump=self.dump, **options)) as d:
            choices = d.complete(**body)["choices"]
            metrics = d.metrics()
        return choices, metrics, d.log_text()

    def check(self, r, layers, steps):
        self.assertEqual([x["layer"] for x in r["layers"]], layers)
        for head in (head for x in r["layers"] for head in x["heads"]):
            self.assertEqual(head["steps"], steps)
            self.assertTrue(0 < head["mass"] <= head["best"] + 1e-12, head)
            self.assertTrue(head["mass_least"] <= head["mass"] <= head["blocks"] <= 1 + 1e-9, head)
            self.assertTrue(0 < head["recall_tokens"] <= head["recall_blocks"] <= 1, head)
            self.assertGreater(head["error"], 0)
            self.assertGreater(head["again_tokens"]["1"], 32 / 96)     # the recent ones at least
            self.assertEqual(list(head["again_tokens"]), ["1", "2", "4", "8", "16", "32"])

    def test_report(self):
        """The same answers as without, and figures that can be."""
        choices, metrics, _ = self.dump_of()
        self.assertEqual(sum(metrics["asynctlsd:decode_rows_sparse_total"].values()), 40)
        with Daemon(**SPARSE) as d:
            without = d.complete(prompt=text(700), max_tokens=41, temperature=0, ignore_eos=True)["choices"]
        if ON_CPU:
            self.assertEqual(without, choices)
        r, _ = self.report()
        self.check(r, list(range(8)), 40)
        self.assertEqual((r["longest_context"], r["sequences"], r["selection"]), (740, 1, "exact"))
        self.assertLess(r["all"]["mass"], 1)

    def test_a_budget_for_everything(self):
        self.dump_of(keep_blocks="16", keep_tokens="1024", selection="lagged")
        r, _ = self.report()
        self.assertEqual(r["selection"], "lagged")
        for name in ("mass", "best", "blocks", "recall_blocks", "recall_tokens"):
            self.assertAlmostEqual(r["all"][name], 1, places=9, msg=name)
        self.assertAlmostEqual(r["all"]["error"], 0, places=6)

    def test_every_third_layer(self):
        self.dump_of(selection_dump_nth_layer="3")
        self.check(self.report()[0], [0, 3, 6], 40)

    def test_latent(self):
        self.dump_of(model=LATENT)
        r, _ = self.report()
        self.check(r, [0, 1, 2], 40)
        self.assertTrue(r["latent"])

    def test_hot_rows_as_the_engine_counts_them(self):
        """Rows that the simulation finds, fetches and leaves on the device, to the last one. That
        holds while nothing else runs, and no set is given away."""
        _, metrics, _ = self.dump_of(host_kv_bytes=str(100 * BLOCK), max_model_len="1024", offload="always",
                                     hot_rows="192")
        r, _ = self.report()
        self.check(r, list(range(8)), 40)
        fetched = 0
        for x in r["layers"]:
            for name, metric in (("hits", "hits"), ("misses", "misses"), ("resident", "resident")):
                counted = [v for labels, v in metrics[f"asynctlsd:hot_row_{metric}_total"].items()
                           if f'layer="{x["layer"]}"' in labels]
                self.assertEqual([x["engine_hot_rows"][name]], counted, (x["layer"], name))
            fetched += x["engine_hot_rows"]["misses"]
        self.assertGreater(fetched, 0)

    def test_a_full_dump(self):
        """One line, and the server goes on."""
        choices, _, log = self.dump_of(selection_dump_bytes="6500000")
        self.assertEqual(len([line for line in log.splitlines() if "selection-dump" in line]), 1, log)
        self.assertLessEqual(self.dump.stat().st_size, 6500000)
        r, _ = self.report()
        steps = r["layers"][0]["heads"][0]["steps"]
        self.assertTrue(0 < steps < 40)
        self.assertTrue(all(head["steps"] == steps for x in r["layers"] for head in x["heads"]))
        self.assertEqual(len(choices), 1)

    def test_record(self):
        options = [w for k, v in SPARSE.items() for w in ("--" + k.replace("_", "-"), v)]
        prose = ROOT / "tests" / "texts" / "harbour.txt"
        r, table = self.report("--record", 800, "--steps", 40, "--text", prose, "--asynctlsd", BINARY, "--",
                               "--backend", "cpu", "--cpu-threads", "2", *options)
        self.check(r, list(range(8)), 40)
        self.assertIn("tokens of prompt, 40 steps", table)

    def test_needles(self):
        """A sequence each; the model finds most of them."""
        options = [w for k, v in SPARSE.items() for w in ("--" + k.replace("_", "-"), v)]
        prose = ROOT / "tests" / "texts" / "harbour.txt"
        done = self.run_report("--record", 800, "--needles", 3, "--text", prose, "--asynctlsd", BINARY,
                               "--", "--backend", "cpu", "--cpu-threads", "2", *options)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stdout, r"[23] of 3 needles found\n3 sequences, ")

    def test_record_of_nothing(self):
        """Full attention up to the crossover."""
        prose = ROOT / "tests" / "texts" / "harbour.txt"
        done = self.run_report("--record", 300, "--steps", 3, "--text", prose, "--asynctlsd", BINARY, "--",
                               "--backend", "cpu")
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("there was no sparse step", done.stderr)
        self.assertFalse(self.dump.exists())

    def test_refused_at_the_start(self):
        d = Daemon(wait=False, selection_dump=self.folder / "none" / "steps.dump")
        self.assertEqual(d.wait(), 1)
        errors = [line for line in d.log_text().splitlines() if " E " in line]
        self.assertEqual(len(errors), 1, errors)
        self.assertIn("steps.dump: No such file or directory", errors[0])


if __name__ == "__main__":
    unittest.main()
