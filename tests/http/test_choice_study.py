"""scripts/choice_study.py: votes and intervals by hand, and both tables over what a server wrote."""
import math
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np

from daemon import BINARY, PATIENCE, ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import choice_study as cs  # noqa: E402
import filter_study as fs  # noqa: E402

# Of two heads, of which the second has a score of 0 twice.
SCORES = np.log(np.array([[8, 2, 1], [1, 6, 1]], np.float32))


class Votes(unittest.TestCase):
    def vote(self, name, scores=SCORES):
        return cs.VOTES[name](scores)

    def test_max_and_sum(self):
        self.assertTrue(np.allclose(np.exp(self.vote("max")), [8, 6, 1]))
        self.assertTrue(np.allclose(np.exp(self.vote("sum")), [8, 12, 1]))

    def test_softmax(self):
        """Of elevenths and eighths."""
        want = np.array([[8, 2, 1], [0, 0, 0]]) / 11 + np.array([[0, 0, 0], [1, 6, 1]]) / 8
        self.assertTrue(np.allclose(np.exp(self.vote("softmax")), want.sum(0)))
        self.assertTrue(np.allclose(np.exp(self.vote("max softmax")), want.max(0)))
        # What one head adds to all its scores tells nothing, and nothing is lost far below the best.
        for name in ("softmax", "max softmax"):
            more = self.vote(name, SCORES + np.array([[500], [0]], np.float32))
            self.assertTrue(np.allclose(more, self.vote(name), atol=1e-4), name)
        far = self.vote("softmax", np.array([[0, -1000, -2000]], np.float32))
        self.assertTrue(far[1] > far[2])

    def test_deviations(self):
        s = np.array([[1, 3, 2], [10, 10, 10]], np.float32)
        self.assertTrue(np.allclose(self.vote("max deviation", s), [0, math.sqrt(1.5), 0]))

    def test_turns(self):
        self.assertEqual(cs.places(SCORES).tolist(), [[0, 1, 2], [1, 0, 2]])
        self.assertEqual(self.vote("turns").tolist(), [0, -0.5, -2])


class ByHand(unittest.TestCase):
    def test_rotation(self):
        r = cs.product_rotation(64)
        self.assertTrue(np.allclose(r @ r.T, np.eye(64), atol=1e-5))
        # 0x243f6a88: bits 3, 7, 9, 11 ... are set.
        self.assertEqual([d for d in range(12) if r[0, d] < 0], [3, 7, 9, 11])

    def test_difference(self):
        self.assertEqual(cs.difference([0.5], [0.25]), "+25.00")
        # Differences 1 and 3 points: a standard error of 1, at one degree of freedom.
        self.assertEqual(cs.difference([0.51, 0.43], [0.5, 0.4]), "+2.00 ± 12.71")

    def test_mean_of(self):
        self.assertEqual(cs.mean_of({"a": {"x": 1, "y": 5}}, {"a": {"x": 2}}), {"a": {"x": 1.5}})


class Whole(unittest.TestCase):
    SPARSE = ["--crossover", "512", "--keep-blocks", "8", "--keep-tokens", "256"]

    @classmethod
    def setUpClass(cls):
        scratch = tempfile.TemporaryDirectory()
        cls.addClassCleanup(scratch.cleanup)
        cls.folder = Path(scratch.name)
        text = (ROOT / "tests" / "texts" / "harbour.txt").read_text()
        for seed in (1, 2):
            (cls.folder / f"text-1800-{seed}.txt").write_text(text[seed * 100:] + 3 * text)

    def tables(self, what, tokens, *argv):
        """[(head, {first cell: the other cells})]"""
        done = subprocess.run([sys.executable, str(ROOT / "scripts" / "choice_study.py"), what, "--asynctlsd",
                               BINARY, "--dumps", str(self.folder), "--tokens", tokens, "--texts", "2",
                               "--steps", "2", "--every", "2", *argv, "--", *self.SPARSE],
                              capture_output=True, text=True, timeout=240 * PATIENCE)
        self.assertEqual(done.returncode, 0, done.stderr)
        found = []
        for part in done.stdout.split("\n\n"):
            if part.startswith("|"):
                head, _, *rows = ([x.strip() for x in line.strip("|").split("|")]
                                  for line in part.splitlines())
                found.append((head, {row[0]: row[1:] for row in rows}))
        return found

    def test_votes(self):
        tables = self.tables("votes", "1200,1800")
        self.assertEqual([head[1] for head, _ in tables], 3 * ["filter: mass", "selection, 256: mass"])
        for head, rows in tables:
            engine = ["`engine`"] if head[1] == "filter: mass" else []
            self.assertEqual(list(rows), ["`max`, the default", *(f"`{v}`" for v in cs.VOTES if v != "max"),
                                          *engine, "`best`"])
            # The server's own choice is what is done again here, but for rounding; of 128 it has none.
            for cell in rows.get("`engine`", []):
                self.assertLess(abs(float((cell or "0").split()[0])), 0.5, rows)
            # Nothing has more mass than what has most.
            for i in [i for i, title in enumerate(head[1:]) if title.endswith("mass")]:
                most = float(rows["`best`"][i].split()[0])
                for name, cells in rows.items():
                    if cells[i] and not name.endswith("default"):
                        self.assertLessEqual(float(cells[i].split()[0]), most, (name, head[i + 1]))

    def test_blocks(self):
        tables = self.tables("blocks", "1800")
        self.assertEqual([head[0] for head, _ in tables], [
            f"`{name}`, {n} tokens kept in blocks of" for name in ("coarse", "bounds") for n in (512, 256)])
        for head, rows in tables:
            self.assertEqual(list(rows), ["16", "32", "64, the default", "128"])
            self.assertEqual(len(head), len(rows["16"]) + 1)
            # Bounds of fewer tokens are tighter.
            if "bounds" in head[0]:
                self.assertGreater(float(rows["16"][0].split()[0]), float(rows["128"][0].split()[0]))

    def test_needles(self):
        self.assertTrue(self.tables("votes", "1800", "--needles", "1"))

    def test_what_it_refuses(self):
        (self.folder / "prose-1000-1.dump").write_bytes(b"nothing")
        done = subprocess.run([sys.executable, str(ROOT / "scripts" / "choice_study.py"), "votes", "--dumps",
                               str(self.folder), "--tokens", "1000,1800", "--texts", "1"],
                              capture_output=True, text=True)
        self.assertEqual(done.returncode, 1)
        self.assertIn("choice_study: 1000 tokens, text 1: it is no selection dump", done.stderr)


if __name__ == "__main__":
    unittest.main()
