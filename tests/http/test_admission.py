"""Who is let in: queue bounds, keys, origins, connections."""
import json
import select
import socket
import threading
import unittest

from daemon import Case, Daemon, read_head, read_response

LONG = {"prompt": "It was", "max_tokens": 20000, "ignore_eos": True, "stream": True}
SHORT = {"prompt": "It was", "max_tokens": 2, "temperature": 0}


class Queue(Case):
    options = {"max_running": "1", "max_waiting": "3", "max_waiting_tokens": "1000",
               "max_choices": "3"}

    def setUp(self):
        """One request runs until its connection is closed."""
        self.runner = self.d.post_raw(LONG)
        self.assertTrue(self.d.wait_until(lambda: self.d.gauge("num_requests_running") == 1))
        self.waiters = []

    def tearDown(self):
        for s in [self.runner] + self.waiters:
            s.close()
        self.d.wait_idle()

    def wait_in_line(self, **body):
        self.waiters.append(self.d.post_raw(dict(SHORT, **body)))
        return self.waiters[-1]

    def assert_waiting(self, n):
        self.assertTrue(self.d.wait_until(lambda: self.d.gauge("num_requests_waiting") == n))

    def assert_full(self, **body):
        for stream in (False, True):
            status, headers, answer = self.d.request(
                "POST", "/v1/completions", dict(SHORT, stream=stream, **body))
            self.assert_error(status, answer, 429, "rate_limit_exceeded", "rate_limit_error")
            self.assertTrue(1 <= int(headers["Retry-After"]) <= 60)
            self.assertEqual(headers["Content-Type"], "application/json")

    def test_by_requests(self):
        for i in range(3):
            self.wait_in_line()
            self.assert_waiting(i + 1)
        self.assert_full()
        self.assert_waiting(3)
        self.waiters.pop().close()          # who gives up makes room
        self.assert_waiting(2)
        self.wait_in_line()
        self.assert_waiting(3)
        self.runner.close()
        for s in self.waiters:
            self.assertEqual(read_response(s)[0], 200)

    def test_choices_are_let_in_together(self):
        self.wait_in_line()
        self.assert_waiting(1)
        self.assert_full(n=3)
        self.assert_full(prompt=["a", "b", "c"])
        self.assert_waiting(1)              # nothing of them stays behind
        self.wait_in_line(n=2, temperature=1)
        self.assert_waiting(3)

    def test_by_tokens(self):
        self.wait_in_line(prompt=[300] * 600)
        self.assert_waiting(1)
        self.assert_full(prompt=[300] * 401)
        self.wait_in_line(prompt=[300] * 400)
        self.assert_waiting(2)
        self.assertEqual(self.d.gauge("waiting_tokens"), 1000)
        self.assert_full(prompt=[300])

    def test_one_large_prompt_may_always_wait(self):
        self.wait_in_line(prompt=[300] * 5000)
        self.assert_waiting(1)
        self.assert_full(prompt=[300])

    def test_a_burst_is_not_let_in_whole(self):
        codes = []

        def ask():
            codes.append(self.d.request("POST", "/v1/completions",
                                        dict(SHORT, prompt=[300] * 300))[0])

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for t in threads:
            t.start()
        self.assertTrue(self.d.wait_until(lambda: len(codes) == 9))
        self.assertEqual(codes, [429] * 9)
        self.runner.close()
        for t in threads:
            t.join()
        self.assertEqual(sorted(codes), [200] * 3 + [429] * 9)


class Bodies(unittest.TestCase):
    def test_all_bodies_together(self):
        """Memory for what is being received is bounded; a refusal says when to come back."""
        with Daemon(max_body_bytes="1mb", max_bodies_bytes="1mb") as d:
            head = (b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
                    b"Content-Length: 900000\r\n\r\n")
            with d.connect() as a, d.connect() as b:
                for s in (a, b):
                    s.sendall(head + b" " * 800000)
                refused = select.select([a, b], [], [], 20)[0][0]    # the slower one
                other = b if refused is a else a
                status, headers, answer = read_response(refused)
                self.assertEqual((status, json.loads(answer)["error"]["type"]),
                                 (503, "server_error"))
                self.assertTrue(headers["retry-after"])
                other.sendall(b" " * 100000)
                self.assertEqual(read_response(other)[0], 400)
            self.assertEqual(d.request("POST", "/v1/completions", SHORT)[0], 200)

    def test_connections(self):
        with Daemon(max_connections="3") as d:
            held = [d.connect() for _ in range(3)]
            for s in held:
                s.sendall(b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n")
                self.assertEqual(read_response(s)[0], 200)
            with d.connect() as late:
                late.sendall(b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n")
                late.settimeout(0.5)
                with self.assertRaises(TimeoutError):
                    late.recv(100)
                late.settimeout(20)
                held.pop().close()
                self.assertEqual(read_response(late)[0], 200)
            for s in held:
                s.close()


class Gate(Case):
    options = {"api_key": "alpha", "allowed_origins": "https://good.example,http://localhost:3000"}
    key = {"Authorization": "Bearer alpha"}

    def test_keys(self):
        for header in (None, "", "alpha", "Bearer", "Bearer ", "Bearer alphaa", "Bearer alph",
                       "Basic alpha", "Bearer alpha beta", "Bearer ALPHA"):
            for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"),
                                 ("GET", "/metrics"), ("GET", "/secret"), ("OPTIONS", "/v1/models"),
                                 ("GET", "/health/../metrics"), ("GET", "/healthx")):
                body = b"not json" if method == "POST" else None
                headers = {} if header is None else {"Authorization": header}
                status, answer_headers, answer = self.d.request(method, path, body, headers)
                self.assert_error(status, answer, 401, "invalid_api_key", "authentication_error")
                self.assertEqual(answer_headers["WWW-Authenticate"], "Bearer")
        self.assertEqual(self.d.request("POST", "/v1/completions", SHORT, self.key)[0], 200)

    def test_a_refused_body_is_not_collected(self):
        with self.d.connect() as s:
            s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nExpect: 100-continue\r\n"
                      b"Content-Length: 5000000\r\n\r\n")
            self.assertEqual(read_head(s)[0], 401)

    def test_origins(self):
        for origin, want in ((None, 200), ("https://good.example", 200),
                             ("http://localhost:3000", 200), ("https://evil.example", 403),
                             ("null", 403), ("http://localhost:3001", 403), ("*", 403),
                             ("https://good.example.evil", 403), ("", 403)):
            headers = dict(self.key) if origin is None else dict(self.key, Origin=origin)
            status, answer_headers, answer = self.d.request("POST", "/v1/completions", SHORT,
                                                            headers)
            self.assertEqual(status, want, origin)
            if want == 403:
                self.assert_error(status, answer, 403, "origin_not_allowed", "permission_error")
                self.assertNotIn("Access-Control-Allow-Origin", answer_headers)
            elif origin:
                self.assertEqual(answer_headers["Access-Control-Allow-Origin"], origin)
                self.assertEqual(answer_headers["Vary"], "Origin")

    def test_preflight(self):
        """A browser asks without the key whether it may send it."""
        ask = {"Access-Control-Request-Method": "POST",
               "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os"}
        status, headers, body = self.d.request(
            "OPTIONS", "/v1/completions", headers=dict(ask, Origin="https://good.example"))
        self.assertEqual((status, body), (204, b""))
        self.assertIn("POST", headers["Access-Control-Allow-Methods"])
        self.assertEqual(headers["Access-Control-Allow-Headers"],
                         "authorization,content-type,x-stainless-os")
        status, _, _ = self.d.request("OPTIONS", "/v1/completions",
                                      headers=dict(ask, Origin="https://evil.example"))
        self.assertEqual(status, 403)

    def test_any_origin(self):
        with Daemon(allowed_origins="*") as d:
            status, headers, _ = d.request("GET", "/v1/models", headers={"Origin": "null"})
            self.assertEqual((status, headers["Access-Control-Allow-Origin"]), (200, "null"))


if __name__ == "__main__":
    unittest.main()
