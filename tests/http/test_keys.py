"""What each API key gets: requests a minute, a share of the queue, a cache of its own."""
import json
import time
import unittest

from daemon import Case, Daemon, read_response

SHORT = {"prompt": "It was", "max_tokens": 2, "temperature": 0}
LONG = {"prompt": "It was", "max_tokens": 20000, "ignore_eos": True, "stream": True}
PROMPT = [300 + (i * 37) % 900 for i in range(400)]


def bearer(key):
    return {"Authorization": "Bearer " + key}


def complete(d, key, **body):
    return d.request("POST", "/v1/completions", dict(SHORT, **body), bearer(key))


def post(d, key, body):
    """A socket on which a completion has been asked for."""
    s = d.connect()
    data = json.dumps(body).encode()
    s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer %s\r\n"
              b"Content-Length: %d\r\n\r\n" % (key.encode(), len(data)) + data)
    return s


class Rate(Case):
    # Every 1.5 s one more.
    options = {"api_key": "alpha,beta", "key_requests_per_minute": "40", "metrics_public": "yes"}

    def test_rate(self):
        began = time.monotonic()
        for _ in range(40):
            self.assertEqual(complete(self.d, "alpha")[0], 200)
        taken = 40
        while True:                     # what has come back meanwhile
            status, headers, body = complete(self.d, "alpha")
            if status != 200:
                break
            taken += 1
        self.assertLessEqual(taken, 41 + (time.monotonic() - began) / 1.5)
        self.assert_error(status, body, 429, "rate_limit_exceeded", "rate_limit_error")
        wait = int(headers["Retry-After"])
        self.assertTrue(1 <= wait <= 2, wait)
        # Every path with a body counts, none without; the other key has its own.
        for path in ("/v1/chat/completions", "/tokenize", "/detokenize"):
            self.assertEqual(self.d.request("POST", path, {}, bearer("alpha"))[0], 429, path)
        self.assertEqual(self.d.request("GET", "/v1/models", headers=bearer("alpha"))[0], 200)
        self.assertEqual(complete(self.d, "beta")[0], 200)
        time.sleep(wait)
        self.assertEqual(complete(self.d, "alpha")[0], 200)


class Share(Case):
    options = {"api_key": "alpha,beta", "key_waiting_share": "0.5", "max_running": "1",
               "max_waiting": "4", "max_waiting_tokens": "1000", "metrics_public": "yes"}

    def setUp(self):
        self.sockets = [post(self.d, "alpha", LONG)]
        self.assertTrue(self.d.wait_until(lambda: self.d.gauge("num_requests_running") == 1))

    def tearDown(self):
        for s in self.sockets:
            s.close()
        self.d.wait_idle()

    def wait_in_line(self, key, waiting, **body):
        self.sockets.append(post(self.d, key, dict(SHORT, **body)))
        self.assertTrue(self.d.wait_until(lambda: self.d.gauge("num_requests_waiting") == waiting))

    def test_by_requests(self):
        self.wait_in_line("alpha", 1)
        self.wait_in_line("alpha", 2)
        status, headers, body = complete(self.d, "alpha")
        self.assert_error(status, body, 429, "key_queue_full", "rate_limit_error")
        self.assertIn("Retry-After", headers)
        self.wait_in_line("beta", 3)
        self.wait_in_line("beta", 4)
        self.assert_error(*complete(self.d, "beta")[::2], 429, "key_queue_full")
        self.sockets.pop(1).close()     # who gives up makes room
        self.assertTrue(self.d.wait_until(lambda: self.d.gauge("num_requests_waiting") == 3))
        self.wait_in_line("alpha", 4)
        self.sockets.pop(0).close()
        for s in self.sockets:
            self.assertEqual(read_response(s)[0], 200)

    def test_by_tokens(self):
        self.wait_in_line("alpha", 1, prompt=PROMPT)
        self.assert_error(*complete(self.d, "alpha", prompt=PROMPT[:101])[::2], 429,
                          "key_queue_full")
        self.wait_in_line("beta", 2, prompt=PROMPT)

    def test_more_choices_than_a_share_are_never_let_in(self):
        self.assert_error(*complete(self.d, "beta", n=3, temperature=1)[::2], 400)
        self.wait_in_line("beta", 2, n=2, temperature=1)


class Cache(unittest.TestCase):
    @staticmethod
    def cached(d, key, **body):
        status, _, answer = complete(d, key, prompt=PROMPT, **body)
        assert status == 200, answer
        return json.loads(answer)["usage"]["prompt_tokens_details"]["cached_tokens"]

    def test_apart(self):
        with Daemon(api_key="alpha,beta", metrics_public="yes") as d:
            self.assertEqual(self.cached(d, "alpha"), 0)
            self.assertEqual(self.cached(d, "alpha"), 384)
            self.assertEqual(self.cached(d, "beta"), 0)
            self.assertEqual(self.cached(d, "beta"), 384)
            # A salt of the request's own parts it further, and leads to nobody else's.
            self.assertEqual(self.cached(d, "alpha", cache_salt="x"), 0)
            self.assertEqual(self.cached(d, "alpha", cache_salt="x"), 384)
            self.assertEqual(self.cached(d, "beta", cache_salt="x"), 0)

    def test_together(self):
        with Daemon(api_key="alpha,beta", cache_per_key="no", metrics_public="yes") as d:
            self.assertEqual(self.cached(d, "alpha"), 0)
            self.assertEqual(self.cached(d, "beta"), 384)


class Log(unittest.TestCase):
    def test_numbers_not_keys(self):
        with Daemon(api_key="alpha,beta", metrics_public="yes") as d:
            complete(d, "beta")
            self.assertTrue(d.wait_until(lambda: "key=2" in d.log_text()))
            self.assertNotIn("beta", d.log_text())


if __name__ == "__main__":
    unittest.main()
