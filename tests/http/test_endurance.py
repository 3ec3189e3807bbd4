"""What a server that is left alone lives through: thousands of connections that say nothing, being
killed in the middle of everything, being asked to leave while requests come in."""
import http.client
import json
import os
import resource
import signal
import threading
import time
import unittest
from contextlib import closing

from daemon import ON_CPU, PATIENCE, Daemon, read_to_end

IDLE = 2000
QUESTION = {"prompt": "The old house", "max_tokens": 20, "temperature": 0, "ignore_eos": True}


def cpu_seconds(pid):
    """User and system time of all its threads."""
    fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid):
    return int(open(f"/proc/{pid}/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class IdleConnections(unittest.TestCase):
    def setUp(self):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        need = IDLE + 500
        if hard != resource.RLIM_INFINITY and hard < need:
            self.skipTest(f"{need} open files are needed, {hard} are allowed")
        if soft != resource.RLIM_INFINITY and soft < need:
            resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))
            self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))

    def test_thousands_cost_next_to_nothing(self):
        with Daemon(max_connections=IDLE + 100, log_level="warn") as d:
            want = d.complete(**QUESTION)["choices"][0]["text"]
            before = resident_bytes(d.process.pid)
            for i in range(IDLE):
                d.connect()
                if i % 100 == 99:       # the backlog is short
                    d.request("GET", "/health")
            self.assertTrue(d.wait_until(lambda: d.request("GET", "/health")[0] == 200))
            grown = resident_bytes(d.process.pid) - before
            self.assertLess(grown / IDLE, 64 << 10)
            spent = cpu_seconds(d.process.pid)
            time.sleep(2)
            self.assertLess(cpu_seconds(d.process.pid) - spent, 0.2 * PATIENCE)
            self.assertEqual(d.complete(**QUESTION)["choices"][0]["text"], want)
            for s in d.sockets:
                s.close()
            self.assertEqual(d.complete(**QUESTION)["choices"][0]["text"], want)


class Killed(unittest.TestCase):
    def test_another_one_takes_its_place(self):
        """Clients see a broken connection, not an end; the port is free at once, and the next
        process answers as the first did."""
        d = Daemon()
        want = d.complete(**QUESTION)["choices"][0]["text"]
        stream = d.post_raw(dict(QUESTION, max_tokens=4000, stream=True))
        self.assertTrue(d.wait_until(lambda: d.gauge("num_requests_running") == 1))
        d.kill()
        data = read_to_end(stream)
        self.assertNotIn(b"[DONE]", data)
        self.assertFalse(data.endswith(b"0\r\n\r\n"))
        with Daemon(port=d.port) as again:
            self.assertEqual(again.port, d.port)
            self.assertEqual(again.complete(**QUESTION)["choices"][0]["text"], want)


class Leaving(unittest.TestCase):
    def test_under_load_nothing_accepted_is_lost(self):
        """Clients that ask again and again while SIGTERM comes get whole answers, a refusal with a
        status, or no connection; never a part of an answer."""
        d = Daemon(drain_timeout="10m", log_level="warn")
        want = d.complete(**QUESTION)["choices"][0]["text"]
        problems, whole, ended = [], [], threading.Event()

        def ask():
            while not ended.is_set():
                with closing(http.client.HTTPConnection("127.0.0.1", d.port,
                                                        timeout=60 * PATIENCE)) as c:
                    try:
                        c.connect()
                        c.request("POST", "/v1/completions", json.dumps(QUESTION),
                                  {"Content-Type": "application/json"})
                    except OSError:     # it does not listen any more, or leaves
                        return
                    try:
                        r = c.getresponse()
                        body = r.read()
                    except (http.client.RemoteDisconnected, ConnectionResetError):
                        return          # the request was not taken
                    except http.client.IncompleteRead as e:
                        problems.append(repr(e))
                        return
                answer = json.loads(body)
                if r.status == 200 and (not ON_CPU or answer["choices"][0]["text"] == want):
                    whole.append(1)
                elif r.status != 503 or answer["error"]["code"] != "shutting_down":
                    problems.append(f"{r.status} {body!r}")

        threads = [threading.Thread(target=ask) for _ in range(16)]
        for t in threads:
            t.start()
        self.assertTrue(d.wait_until(lambda: len(whole) > 30))
        d.signal(signal.SIGTERM)
        self.assertEqual(d.wait(60), 0, d.log_text())
        ended.set()
        for t in threads:
            t.join(60 * PATIENCE)
        self.assertEqual(problems, [])


if __name__ == "__main__":
    unittest.main()
