"""Starts the daemon for a test, talks to it over sockets, reads its gauges."""
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
import unittest
import urllib.error
import urllib.request
import weakref
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BINARY = os.environ.get("ASYNCTLSD", str(ROOT / "build" / "asynctlsd"))
MODEL = os.environ.get("MODEL", str(ROOT / "models" / "asynctlsd-books-9m"))
NAME = Path(MODEL).name
# Sanitizers and busy machines are slow; every wait is a multiple of this.
PATIENCE = float(os.environ.get("PATIENCE", "1"))
# The back end, whatever this machine has.  A GPU rounds to bf16, and its sums depend on how
# many rows are computed together, so what is equal to the bit on the CPU is close there.
BACKEND = os.environ.get("BACKEND", "cpu")
ON_CPU = BACKEND.startswith("cpu")
# Two engines or more, for the tests that are about several; of the same kind as BACKEND.
ENGINES = os.environ.get("ENGINES", "cpu,cpu")

DEFAULTS = {
    "model": MODEL, "port": "0", "cpu-threads": "2", "kv-cache-bytes": "512mb",
    "check-invariants": "yes", "log-level": "debug", "backend": BACKEND,
}
SAMPLE = re.compile(r'^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-z_]+="(?:\\.|[^"\\])*",?)*)\})? (\S+)$')


class Daemon:
    """A running server.  `with Daemon(port=0) as d:` ends it with SIGTERM and
    insists on exit code 0."""

    def __init__(self, wait=True, env=None, **options):
        merged = dict(DEFAULTS, **{k.replace("_", "-"): str(v) for k, v in options.items()})
        argv = [BINARY] + [w for k, v in merged.items() for w in ("--" + k, v)]
        self.log = tempfile.NamedTemporaryFile(prefix="asynctlsd-", suffix=".log")
        weakref.finalize(self, self.log.close)
        self.out = []
        self.sockets = []
        self.ready = threading.Event()
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=self.log, text=True,
                                        env=dict(os.environ, **(env or {})))
        threading.Thread(target=self._read_stdout, daemon=True).start()
        self.port = None
        if wait:
            self.wait_ready()

    def _read_stdout(self):
        with self.process.stdout:
            for line in self.process.stdout:
                self.out.append(line)
                if line.startswith("ready: "):
                    self.ready.set()
        self.ready.set()

    def wait_ready(self):
        self.ready.wait(60 * PATIENCE)
        if not self.out:
            self.kill()
            raise AssertionError("the daemon did not start:\n" + self.log_text())
        self.url = self.out[0].split()[1]
        self.port = int(self.url.rsplit(":", 1)[1])

    def log_text(self):
        return Path(self.log.name).read_text(errors="replace")

    def signal(self, number):
        self.process.send_signal(number)

    def wait(self, timeout=30):
        """Its exit code; closes the sockets."""
        try:
            code = self.process.wait(timeout * PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError("the daemon does not end:\n" + self.log_text()[-3000:])
        for s in self.sockets:
            s.close()
        if "runtime error:" in self.log_text():     # a sanitizer that only reports
            raise AssertionError(self.log_text()[-6000:])
        return code

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        code = self.wait()
        if code != 0:
            raise AssertionError(f"exit code {code}:\n" + self.log_text()[-6000:])

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        if kind is None:
            self.stop()
        else:
            self.kill()
            print(self.log_text()[-3000:])

    # ---- requests

    def request(self, method, path, body=None, headers=None, timeout=60):
        """(status, headers, body bytes); errors are answers as well."""
        data = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
        head = {"Content-Type": "application/json"} if data is not None else {}
        req = urllib.request.Request(self.url + path, data, dict(head, **(headers or {})),
                                     method=method)
        try:
            with urllib.request.urlopen(req, timeout=timeout * PATIENCE) as r:
                return r.status, r.headers, r.read()
        except urllib.error.HTTPError as e:
            return e.code, e.headers, e.read()

    def complete(self, **body):
        status, _, answer = self.request("POST", "/v1/completions", body)
        if status != 200:
            raise AssertionError(f"{status} {answer!r}")
        return json.loads(answer)

    def connect(self, receive_buffer=None):
        s = socket.socket()
        if receive_buffer:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        s.settimeout(20 * PATIENCE)
        self.sockets.append(s)
        s.connect(("127.0.0.1", self.port))
        return s

    def post_raw(self, body, receive_buffer=None, version="1.1"):
        """A socket on which a completion has been asked for."""
        s = self.connect(receive_buffer)
        data = json.dumps(body).encode()
        s.sendall(b"POST /v1/completions HTTP/%s\r\nHost: test\r\nContent-Type: application/json"
                  b"\r\nContent-Length: %d\r\n\r\n" % (version.encode(), len(data)) + data)
        return s

    # ---- gauges

    def metrics(self):
        """{name: {labels text: value}}; every line has to be well formed."""
        status, headers, text = self.request("GET", "/metrics")
        assert status == 200 and headers["Content-Type"].startswith("text/plain"), status
        samples = {}
        for line in text.decode().splitlines():
            if line.startswith("# ") or not line:
                continue
            m = SAMPLE.match(line)
            assert m, f"not a sample: {line!r}"
            samples.setdefault(m[1], {})[m[2] or ""] = float(m[3])
        return samples

    def gauge(self, name):
        values = self.metrics()["asynctlsd:" + name].values()
        return sum(values)

    def by_engine(self, name):
        """Sums of a metric's samples, in the order of the engines."""
        sums = {}
        for labels, value in self.metrics()["asynctlsd:" + name].items():
            engine = int(re.search(r'engine="(\d+)"', labels)[1])
            sums[engine] = sums.get(engine, 0) + value
        return [sums[i] for i in sorted(sums)]

    def busy(self):
        m = self.metrics()
        return {name: sum(m["asynctlsd:" + name].values())
                for name in ("num_requests_running", "num_requests_waiting", "waiting_tokens",
                             "kv_cache_usage_perc", "requests_open", "requests_parsing")}

    def wait_until(self, what, timeout=20):
        """what() until it is true; its last value."""
        end = time.monotonic() + timeout * PATIENCE
        while not (value := what()) and time.monotonic() < end:
            time.sleep(0.02)
        return value

    def wait_idle(self, timeout=20):
        """All gauges back to zero, or an error that shows them."""
        if not self.wait_until(lambda: not any(self.busy().values()), timeout):
            raise AssertionError(f"still busy: {self.busy()}")


def read_head(s):
    """(status, {lower-case name: value}) of one response; what follows stays unread."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        seen = s.recv(65536, socket.MSG_PEEK)
        if not seen:
            raise AssertionError(f"the connection ended after {head!r}")
        end = (head + seen).find(b"\r\n\r\n")
        head += s.recv(len(seen) if end < 0 else end + 4 - len(head))
    lines = head.decode("latin-1").strip().split("\r\n")
    headers = {k.lower(): v.strip() for k, v in (line.split(":", 1) for line in lines[1:])}
    return int(lines[0].split()[1]), headers


def read_response(s):
    """(status, headers, body) of one response with a Content-Length."""
    status, headers = read_head(s)
    body = b""
    while len(body) < int(headers.get("content-length", 0)):
        piece = s.recv(int(headers["content-length"]) - len(body))
        if not piece:
            break
        body += piece
    return status, headers, body


def read_to_end(s):
    data = b""
    try:
        while piece := s.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return data


def events(body):
    """The JSON documents of an event stream, which must end with [DONE]."""
    blocks = [b for b in body.decode().split("\n\n") if b and not b.startswith(":")]
    assert all(b.startswith("data: ") and "\n" not in b for b in blocks), blocks[:3]
    assert blocks[-1] == "data: [DONE]", blocks[-1]
    return [json.loads(b[len("data: "):]) for b in blocks[:-1]]


class Case(unittest.TestCase):
    """Tests of one class share a daemon, started with `options`."""
    options = {}

    @classmethod
    def setUpClass(cls):
        cls.d = Daemon(**cls.options)

    @classmethod
    def tearDownClass(cls):
        cls.d.stop()

    def assert_error(self, status, body, want_status, code=None, kind=None):
        self.assertEqual(status, want_status, body)
        error = json.loads(body)["error"]
        self.assertEqual(set(error), {"message", "type", "param", "code"})
        self.assertTrue(error["message"])
        if code:
            self.assertEqual(error["code"], code)
        if kind:
            self.assertEqual(error["type"], kind)
        return error
