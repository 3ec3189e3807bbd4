"""scripts/child_process.py, and scripts that are ended while something runs that they started."""
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

from daemon import PATIENCE, ROOT

SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))
import child_process  # noqa: E402

MODEL = ROOT / "models" / "asynctlsd-books-9m"


def is_there(pid):
    """Not a zombie either, which nobody may have waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Children(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.folder = Path(scratch.name)

    def until(self, what):
        end = time.monotonic() + 30 * PATIENCE
        while not what():
            self.assertLess(time.monotonic(), end)
            time.sleep(0.02)

    def program(self, name, *lines):
        """One that says which processes it is, and stays."""
        path = self.folder / name
        path.write_text("\n".join(["#!/bin/sh", *lines, "sleep 300 &",
                                   f"echo $$ $! > {self.folder}/said", f"mv {self.folder}/said {self.folder}/pids",
                                   "wait", ""]))
        path.chmod(0o755)
        return path

    def pids(self):
        self.until((self.folder / "pids").exists)
        return [int(x) for x in (self.folder / "pids").read_text().split()]

    def ended_with(self, script, *argv):
        process = subprocess.Popen([sys.executable, str(SCRIPTS / script), *map(str, argv)],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.addCleanup(process.kill)
        pids = self.pids()
        self.assertTrue(all(map(is_there, pids)))
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(30 * PATIENCE), 143)
        self.until(lambda: not any(map(is_there, pids)))

    def test_bench_gpu(self):
        self.program("bench-gpu")
        self.ended_with("bench_gpu.py", "--bin", self.folder, "--out", self.folder / "out")

    def test_bench_offload(self):
        """Ended while its server is not ready."""
        self.program("asynctlsd")
        self.ended_with("bench_offload.py", "--bin", self.folder, "--model", MODEL,
                        "--log", self.folder / "log")

    def test_evaluate_needles(self):
        self.ended_with("evaluate_needles.py", "--asynctlsd", self.program("asynctlsd"))

    def test_run(self):
        self.assertEqual(child_process.run(["sh", "-c", "echo a; echo b >&2; exit 3"], 30 * PATIENCE),
                         (3, "a\n", "b\n"))

    def test_run_out_of_time(self):
        path = self.program("stays", "echo first")
        with self.assertRaises(subprocess.TimeoutExpired) as raised:
            child_process.run([path], 1 * PATIENCE)
        self.assertEqual(raised.exception.stdout, "first\n")
        self.until(lambda: not any(map(is_there, self.pids())))

    def test_who_does_not_listen(self):
        path = self.program("stubborn", "trap '' TERM")
        process = subprocess.Popen([path], start_new_session=True)
        pids = self.pids()
        child_process.stop(process, 0.1)
        self.assertEqual(process.returncode, -signal.SIGKILL)
        self.until(lambda: not any(map(is_there, pids)))


if __name__ == "__main__":
    unittest.main()
