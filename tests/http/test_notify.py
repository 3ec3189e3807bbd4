"""What a service manager hears (Type=notify), and that its watchdog watches the engine."""
import ctypes
import os
import select
import socket
import tempfile
import time
import unittest
from pathlib import Path

from daemon import ENGINES, PATIENCE, Daemon
from test_lifecycle import LONG, run

WATCHDOG_S = 1.2 * PATIENCE
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 17, 0x4206, 0x4207
WAIT_ALL_THREADS = 0x40000000               # __WALL


class Manager:
    """The socket that systemd would have, and a daemon that knows it."""

    def __init__(self, abstract=False, options=None, **env):
        self.folder = tempfile.TemporaryDirectory()
        name = str(Path(self.folder.name) / "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + name if abstract else name)
        self.d = Daemon(env=dict(env, NOTIFY_SOCKET="@" + name if abstract else name),
                        **(options or {}))
        self.heard = []

    def listen(self, seconds):
        """What comes within that time: [(when, {field: value})]."""
        end, heard = time.monotonic() + seconds, []
        while (left := end - time.monotonic()) > 0:
            if select.select([self.socket], [], [], left)[0]:
                lines = self.socket.recv(4096).decode().split("\n")
                heard.append((time.monotonic(), dict(line.split("=", 1) for line in lines)))
        return heard

    def wait_for(self, field, seconds=20):
        """All up to the first message with the field, which comes last."""
        end, heard = time.monotonic() + seconds * PATIENCE, []
        while time.monotonic() < end:
            if not select.select([self.socket], [], [], 0.1)[0]:
                continue
            lines = self.socket.recv(4096).decode().split("\n")
            heard.append(dict(line.split("=", 1) for line in lines))
            if field in heard[-1]:
                return heard
        raise AssertionError(f"no {field} among {heard}")

    def __enter__(self):
        self.d.__enter__()
        return self

    def __exit__(self, *trouble):
        self.d.__exit__(*trouble)
        self.socket.close()
        self.folder.cleanup()


def engine_thread(pid, number):
    for task in Path(f"/proc/{pid}/task").iterdir():
        if (task / "comm").read_text().strip() == f"engine {number}":
            return int(task.name)
    raise AssertionError(f"there is no thread of engine {number}")


class Frozen:
    """One thread of a process stands still; the others go on."""

    def __init__(self, thread):
        self.thread = thread

    def __enter__(self):
        if LIBC.ptrace(PTRACE_SEIZE, self.thread, None, None) != 0:
            raise unittest.SkipTest(f"ptrace: {os.strerror(ctypes.get_errno())}")
        assert LIBC.ptrace(PTRACE_INTERRUPT, self.thread, None, None) == 0
        os.waitpid(self.thread, WAIT_ALL_THREADS)
        return self

    def __exit__(self, *trouble):
        assert LIBC.ptrace(PTRACE_DETACH, self.thread, None, None) == 0


class States(unittest.TestCase):
    def test_from_loading_to_the_end(self):
        for abstract in (False, True):
            with self.subTest(abstract=abstract), Manager(abstract) as m:
                heard = m.wait_for("READY")
                self.assertTrue(heard[0]["STATUS"].startswith("loading "), heard)
                self.assertEqual(heard[-1]["READY"], "1")
                self.assertIn(m.d.url, heard[-1]["STATUS"])
                self.assertFalse(any("WATCHDOG" in x for x in heard), heard)
                m.d.stop()
                self.assertEqual(m.wait_for("STOPPING")[-1]["STOPPING"], "1")

    def test_what_makes_no_sense_is_refused(self):
        cases = [({"NOTIFY_SOCKET": "vsock:2:1"}, "NOTIFY_SOCKET is 'vsock:2:1'"),
                 ({"NOTIFY_SOCKET": "/nowhere/socket"}, "cannot reach NOTIFY_SOCKET /nowhere/socket"),
                 ({"NOTIFY_SOCKET": "/" + 200 * "x"}, "NOTIFY_SOCKET is '/xxx")]
        for env, want in cases:
            code, out, err = run("--model", os.devnull, "--port", "0", "--backend", "cpu", **env)
            self.assertEqual((code, out), (1, ""))
            self.assertIn(want, err)
        with tempfile.TemporaryDirectory() as folder, \
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
            s.bind(folder + "/s")
            for value in ("", "0", "-5", "1m", "9" * 30):
                code, out, err = run("--model", os.devnull, "--port", "0", "--backend", "cpu",
                                     NOTIFY_SOCKET=folder + "/s", WATCHDOG_USEC=value)
                self.assertEqual((code, out), (1, ""))
                self.assertIn(f"WATCHDOG_USEC is '{value}'", err)


class Watchdog(unittest.TestCase):
    env = {"WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6))}

    def assert_fed(self, m, seconds):
        began = time.monotonic()
        times = [when for when, x in m.listen(seconds) if x.get("WATCHDOG") == "1"]
        gaps = [b - a for a, b in zip([began] + times, times + [began + seconds])]
        self.assertLess(max(gaps), WATCHDOG_S, gaps)

    def test_fed_while_idle_and_while_busy(self):
        with Manager(**self.env) as m:
            m.wait_for("READY")
            self.assert_fed(m, 2 * WATCHDOG_S)
            with m.d.post_raw(LONG):
                self.assertTrue(m.d.wait_until(lambda: m.d.gauge("num_requests_running")))
                self.assert_fed(m, 2 * WATCHDOG_S)

    def test_meant_for_another_process(self):
        with Manager(WATCHDOG_PID="1", **self.env) as m:
            m.wait_for("READY")
            self.assertEqual(m.listen(2 * WATCHDOG_S), [])

    def assert_starves(self, m, engine=0):
        """The loop answers all the time, and yet the watchdog is not fed.  Now and then the engine
        is caught with a lock that the loop wants as well, as no step that hangs has it: then again."""
        for _ in range(10):
            with Frozen(engine_thread(m.d.process.pid, engine)):
                try:
                    m.d.request("GET", "/health", timeout=3)
                except TimeoutError:
                    continue
                m.listen(0.6 * WATCHDOG_S)      # what was seen to move before it froze
                for _ in range(4):
                    self.assertEqual(m.listen(WATCHDOG_S / 2), [])
                    self.assertEqual(m.d.request("GET", "/health")[0], 200)
                break
        else:
            self.fail("the engine has a lock whenever it is looked at")
        m.wait_for("WATCHDOG")

    def test_an_idle_engine_that_hangs(self):
        with Manager(**self.env) as m:
            m.wait_for("READY")
            self.assert_starves(m)

    def test_the_second_engine_hangs(self):
        """And the first goes on, idle and busy."""
        with Manager(options={"backend": ENGINES}, **self.env) as m:
            m.wait_for("READY")
            self.assert_fed(m, 2 * WATCHDOG_S)
            self.assert_starves(m, 1)
            with m.d.post_raw(LONG):
                self.assertTrue(m.d.wait_until(
                    lambda: m.d.by_engine("num_requests_running")[:2] == [1, 0]))
                self.assert_fed(m, 2 * WATCHDOG_S)
                self.assert_starves(m, 1)

    def test_a_busy_engine_that_hangs(self):
        with Manager(**self.env) as m:
            m.wait_for("READY")
            with m.d.post_raw(LONG):
                self.assertTrue(m.d.wait_until(lambda: m.d.gauge("num_requests_running")))
                self.assert_starves(m)


if __name__ == "__main__":
    unittest.main()
