"""The log: one line for each request, as text or JSON, with its id, tokens and times."""
import json
import threading
import unittest

from daemon import Case, Daemon, events

COMPLETION = {"prompt": [400 + i for i in range(100)], "max_tokens": 6, "ignore_eos": True}
TIMES = ("queue_ms", "ttft_ms", "total_ms")


def records(d, request_id):
    """The log's lines about a request; every line has to be an object."""
    lines = [json.loads(line) for line in d.log_text().splitlines()]
    for line in lines:
        assert {"time", "level", "thread", "module", "message"} <= set(line), line
    return [line for line in lines if line.get("request_id") == request_id]


class Json(Case):
    options = {"log_format": "json", "log_level": "info"}

    def one(self, request_id):
        """The only record, once it is there: it is written after the answer."""
        self.assertTrue(self.d.wait_until(lambda: records(self.d, request_id)), request_id)
        found = records(self.d, request_id)
        self.assertEqual(len(found), 1, found)
        return found[0]

    def ask(self, path, body, request_id):
        method = "GET" if body is None else "POST"
        status, headers, answer = self.d.request(method, path, body,
                                                 {"x-request-id": request_id})
        self.assertEqual(headers["x-request-id"], request_id)
        return status, answer

    def test_completion(self):
        status, _ = self.ask("/v1/completions", dict(COMPLETION, n=2, temperature=1), "whole-1")
        self.assertEqual(status, 200)
        r = self.one("whole-1")
        want = {"level": "info", "module": "http", "message": "request", "method": "POST",
                "path": "/v1/completions", "status": 200, "disconnected": False, "stream": False,
                "engine": 0, "choices": 2, "prompt_tokens": 100, "completion_tokens": 12, "finish": "length"}
        self.assertEqual({k: r[k] for k in want}, want)
        self.assertGreater(r["ttft_ms"], 0)
        self.assertLessEqual(r["ttft_ms"], r["total_ms"])
        self.assertGreaterEqual(r["queue_ms"], 0)

    def test_chat_stream(self):
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "stream": True,
                "stream_options": {"include_usage": True}}
        status, answer = self.ask("/v1/chat/completions", body, "chat-1")
        self.assertEqual(status, 200)
        usage = events(answer)[-1]["usage"]
        r = self.one("chat-1")
        self.assertEqual((r["path"], r["stream"], r["prompt_tokens"], r["completion_tokens"]),
                         ("/v1/chat/completions", True, usage["prompt_tokens"],
                          usage["completion_tokens"]))

    def test_others(self):
        for path, body, want in (("/v1/completions", {"prompt": 5}, 400),
                                 ("/tokenize", {"prompt": "a"}, 200),
                                 ("/v1/models", None, 200), ("/no%22such\u00e9", None, 404)):
            request_id = f"other-{path[1:5].replace('%', '')}"
            self.assertEqual(self.ask(path.replace("\u00e9", "%C3%A9"), body, request_id)[0], want)
            r = self.one(request_id)
            self.assertEqual(r["status"], want)
            self.assertEqual(r["path"], "none" if want == 404 else path)
            self.assertNotIn("prompt_tokens", r)
            self.assertIn("total_ms", r)

    def test_probes_are_quiet(self):
        for path in ("/health", "/ready", "/metrics"):
            self.ask(path, None, "probe-1")
        self.ask("/version", None, "probe-2")
        self.one("probe-2")
        self.assertEqual(records(self.d, "probe-1"), [])

    def test_an_id_that_is_none(self):
        for bad in ("x" * 129, "a b", 'a"b', "a\u00e9"):
            _, headers, _ = self.d.request("GET", "/version",
                                           headers={"x-request-id": bad.encode().decode("latin-1")})
            self.assertRegex(headers["x-request-id"], r"^req_[0-9a-f]{24}$")
            self.one(headers["x-request-id"])

    def test_a_client_that_leaves(self):
        with self.d.connect() as s:
            body = json.dumps(dict(COMPLETION, max_tokens=2000, stream=True)).encode()
            s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nx-request-id: leaver\r\n"
                      b"Content-Length: %d\r\n\r\n" % len(body) + body)
            s.recv(1000)
        self.d.wait_idle()
        r = self.one("leaver")
        self.assertEqual((r["disconnected"], r["finish"]), (True, "abort"))

    def test_many_at_once(self):
        threads = [threading.Thread(target=self.ask, args=("/v1/completions", COMPLETION, f"m-{i}"))
                   for i in range(20)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        for i in range(20):
            self.assertEqual(self.one(f"m-{i}")["completion_tokens"], 6)


class Text(unittest.TestCase):
    def test_a_line(self):
        with Daemon() as d:
            d.request("POST", "/v1/completions", COMPLETION, {"x-request-id": "t-1"})
            want = (r" I loop   http: request request_id=t-1 method=POST path=/v1/completions "
                    r"status=200 disconnected=false stream=false engine=0 choices=1 prompt_tokens=100 "
                    r"cached_tokens=0 completion_tokens=6 finish=length queue_ms=\d+\.\d "
                    r"ttft_ms=\d+\.\d total_ms=\d+\.\d\n")
            d.wait_until(lambda: "t-1" in d.log_text())
            self.assertRegex(d.log_text(), want)


if __name__ == "__main__":
    unittest.main()
