"""scripts/filter_study.py: its filters by hand, and over what a server wrote."""
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np

from daemon import PATIENCE, ROOT, Daemon

sys.path.insert(0, str(ROOT / "scripts"))
import filter_study as fs  # noqa: E402

KEYS = np.array([[4, 0, 0, 0], [0, -2, 0, 0],       # block 0
                 [0, 0, 6, 0], [0, 0, -6, 0],       # block 1: means are 0
                 [1, 1, 1, 1], [1, 1, 1, -1]], np.float32)
SAME = np.eye(4, dtype=np.float32)                  # a rotation that does nothing


def scores(name, query, n_blocks=3, turn=SAME):
    return fs.Filter(name, KEYS, 2, turn).scores(np.array([query], np.float32), n_blocks).tolist()


class ByHand(unittest.TestCase):
    def test_quantised(self):
        one = fs.quantised(np.array([[3, -1, 1, -3], [2, 2, 2, 2], [0, 0, 0, 0]], np.float32), 1)
        self.assertEqual(one.tolist(), [[2, -2, 2, -2], [2, 2, 2, 2], [0, 0, 0, 0]])
        two = fs.quantised(np.array([[3, -1, 1, -3]], np.float32), 2)
        self.assertEqual(two.tolist(), [[3, -1, 1, -3]])

    def test_rotation_is_orthogonal(self):
        r = fs.rotation(64)
        self.assertTrue(np.allclose(r @ r.T, np.eye(64), atol=1e-5))
        self.assertEqual(scores("exact", [1, 0, 0, 0]), scores("exact", [1, 0, 0, 0],
                                                               turn=fs.rotation(4)))

    def test_exact(self):
        self.assertEqual(scores("exact", [1, 0, 1, 0]), [4, 6, 2])
        self.assertEqual(scores("exact", [0, 1, 0, 0]), [0, 0, 1])
        # The better of two query heads, whichever has it.
        f = fs.Filter("exact", KEYS, 2, SAME)
        self.assertEqual(f.scores(np.array([[1, 0, 0, 0], [0, 0, 1, 0]], np.float32), 3).tolist(),
                         [4, 6, 1])

    def test_by_head(self):
        f = fs.Filter("exact", KEYS, 2, SAME)
        self.assertEqual(f.head_scores(np.array([[1, 0, 0, 0], [0, 0, 1, 0]], np.float32), 3).tolist(),
                         [[4, 0, 1], [0, 6, 1]])

    def test_as_stored(self):
        """Levels of 1, or of 0.5 and 1.5, times 0.996 of the root mean square, which is 5 and 1."""
        keys = np.array([[8, -6, 0, 0], [1, -1, 1, 1]], np.float32)
        for bits, want in ((1, [[5, -5, 5, 5], [1, -1, 1, 1]]),
                           (2, [[7.5, -7.5, 2.5, 2.5], [1.5, -1.5, 1.5, 1.5]])):
            self.assertTrue(np.allclose(fs.stored(keys, bits), 0.996 * np.array(want)), bits)
        self.assertEqual(fs.stored(np.zeros((1, 4), np.float32), 2).tolist(), [[0, 0, 0, 0]])

    def test_signs(self):
        """Scales 1, 0.5; 1.5, 1.5; 1, 1. Zeros count as positive."""
        self.assertEqual(scores("sign-1", [1, 1, 1, 1]), [4, 6, 4])
        self.assertEqual(scores("sign-1", [0, 1, 0, 0]), [1, 1.5, 1])
        # Half of the channels: scales 2, 1; 0, 0; 1, 1.
        self.assertEqual(scores("sign-2", [0, 1, 5, 5]), [2, 0, 1])

    def test_means(self):
        """[2 -1 0 0] is 0.75 and signs, [0 0 0 0] nothing, [1 1 1 0] 0.75."""
        self.assertEqual(scores("means-2", [1, 0, 0, 0]), [0.75, 0, 0.75])
        self.assertEqual(scores("means-2", [0, -1, 0, 0]), [0.75, 0, -0.75])

    def test_bounds(self):
        self.assertEqual(scores("bounds", [1, -1, 1, 0]), [6, 6, 1])

    def test_bytes(self):
        want = {"exact": 256, "sign-1": 18, "sign-4": 6, "two-bits-2": 18, "means-2": 9, "means-8": 2.25,
                "bounds": 8}
        keys = np.zeros((64, 128), np.float32)
        for name, n in want.items():
            self.assertEqual(fs.Filter(name, keys, 64, fs.rotation(128)).bytes(), n, name)

    def test_kept(self):
        s = np.array([1, 9, 3, 5], np.float32)
        self.assertEqual(sorted(fs.kept(s, 3, 5)), [0, 1, 4])       # the first and the newest always
        self.assertEqual(sorted(fs.kept(s, 4, 5)), [0, 1, 3, 4])
        self.assertEqual(sorted(fs.kept(s, 9, 5)), [0, 1, 2, 3, 4])
        self.assertEqual(sorted(fs.kept(s, 4, 6)), [0, 1, 4, 5])    # two without a score


class Whole(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.dump = Path(scratch.name) / "steps.dump"

    def run_study(self, *argv):
        return subprocess.run([sys.executable, str(ROOT / "scripts" / "filter_study.py"), str(self.dump),
                               *argv], capture_output=True, text=True, timeout=120 * PATIENCE)

    def test_what_a_server_wrote(self):
        with Daemon(selection_dump=self.dump, crossover="100", keep_blocks="4", keep_tokens="96") as d:
            d.complete(prompt=[300 + k * 37 % 900 for k in range(1300)], max_tokens=4, temperature=0,
                       ignore_eos=True)
        done = self.run_study("--keep-blocks", "4,1000", "--every", "1")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        rows = {cells[0].strip("`"): [float(x) for x in cells[1:]]
                for cells in ([x.strip() for x in line.strip("|").split("|")]
                              for line in done.stdout.splitlines()[2:])}
        self.assertEqual(list(rows), list(fs.FILTERS))
        for name, (_, mass, least, recall, *everything) in rows.items():
            self.assertTrue(0 < least <= mass < 1 and 0 < recall < 1, (name, mass, least, recall))
            self.assertEqual(everything, [1, 1, 1], name)
        self.assertGreater(rows["exact"][3], rows["sign-4"][3])

    def test_what_is_no_dump(self):
        done = self.run_study()
        self.assertEqual(done.returncode, 1)
        self.assertIn("filter_study: ", done.stderr)
        self.dump.write_bytes(b"nothing")
        self.assertIn("it is no selection dump", self.run_study().stderr)


if __name__ == "__main__":
    unittest.main()
