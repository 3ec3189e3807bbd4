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

    def program(self, name, *lines, children=True):
        """One that says which processes it is, and stays."""
        start, wait = ("sleep 300 &", "wait") if children else ("true &", "exec sleep 300")
        path = self.folder / name
        path.write_text("\n".join(["#!/bin/sh", *lines, start, f"echo $$ {'$!' if children else ''} "
                                   f"> {self.folder}/said", f"mv {self.folder}/said {self.folder}/pids",
                                   wait, ""]))
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
        self.program("asynctlsd", children=False)
        self.ended_with("bench_offload.py", "--bin", self.folder, "--model", MODEL,
                        "--log", self.folder / "log")

    def test_evaluate_needles(self):
        self.ended_with("evaluate_needles.py", "--asynctlsd", self.program("asynctlsd", children=False))

    def test_threads(self):
        """They wait for a server that only ends when they have been left."""
        script = f"""import subprocess, sys
sys.path.insert(0, {str(SCRIPTS)!r})
import child_process
child_process.ends_with_script()
server = subprocess.Popen([{str(self.program("server", children=False))!r}])
try:
    with child_process.threads(2) as pool:
        list(pool.map(lambda _: server.wait(), range(3)))
finally:
    child_process.stop(server)
"""
        process = subprocess.Popen([sys.executable, "-c", script])
        self.addCleanup(process.kill)
        pids = self.pids()
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(30 * PATIENCE), 143)
        self.until(lambda: not any(map(is_there, pids)))

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
        for with_group in (False, True):
            path = self.program("stubborn", "trap '' TERM", children=with_group)
            process = subprocess.Popen([path], start_new_session=with_group)
            pids = self.pids()
            child_process.stop(process, 0.1, with_group)
            self.assertEqual(process.returncode, -signal.SIGKILL)
            self.until(lambda: not any(map(is_there, pids)))
            (self.folder / "pids").unlink()

    def test_a_script_that_does_not_listen(self):
        """Its server is in its group, and goes with it."""
        script = f"""import signal, sys
sys.path.insert(0, {str(SCRIPTS)!r})
from argparse import Namespace
import evaluate_needles
signal.signal(signal.SIGTERM, signal.SIG_IGN)
evaluate_needles.Server(Namespace(asynctlsd={str(self.program("asynctlsd", children=False))!r}, model="m"), [])
"""
        process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
        pids = self.pids()
        child_process.stop(process, 0.1, with_group=True)
        self.until(lambda: not any(map(is_there, pids)))


if __name__ == "__main__":
    unittest.main()
