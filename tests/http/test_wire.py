"""HTTP as it should not be: raw sockets, hostile and unusual clients."""
import concurrent.futures
import json
import socket
import time
import unittest

from daemon import PATIENCE, Case, events, read_head, read_response, read_to_end

GET = b"GET %s HTTP/1.1\r\nHost: test\r\n%s\r\n"
ANSWER = {"prompt": "It was", "max_tokens": 4, "temperature": 0}


def post(body, *headers, length=True, path=b"/v1/completions"):
    """The bytes of a POST; body is a dict or bytes."""
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    lines = [b"POST %s HTTP/1.1" % path, b"Host: test", b"Content-Type: application/json"]
    if length:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines + list(headers)) + b"\r\n\r\n" + body


def chunked(body, size):
    pieces = [body[i:i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"


def is_closed(s):
    """Whether the server has ended the connection (waits for it)."""
    try:
        return read_to_end(s) == b""
    except TimeoutError:
        return False


class Wire(Case):
    def send(self, data):
        s = self.d.connect()
        s.sendall(data)
        return s

    def ask(self, data):
        """One request on a connection of its own: (status, headers, body)."""
        with self.send(data) as s:
            return read_response(s)

    def assert_alive(self):
        self.assertEqual(self.d.request("GET", "/health")[0], 200)

    # ---- heads

    def test_heads_that_are_refused(self):
        many = b"".join(b"X-%d: y\r\n" % i for i in range(120))
        body = b"Content-Length: 2\r\n"
        post_with = b"POST /v1/completions HTTP/1.1\r\nHost: t\r\n%s\r\n{}"
        cases = [
            (400, "two lengths that agree", post_with % (body * 2)),
            (400, "two lengths", post_with % (body + b"Content-Length: 3\r\n")),
            (400, "length and coding", post_with % (body + b"Transfer-Encoding: chunked\r\n")),
            (400, "coding and length", post_with % (b"Transfer-Encoding: chunked\r\n" + body)),
            (400, "an unknown coding", post_with % b"Transfer-Encoding: gzip\r\n"),
            (400, "two codings", post_with % b"Transfer-Encoding: gzip, chunked\r\n"),
            (400, "a coding twice", post_with % (b"Transfer-Encoding: chunked\r\n" * 2)),
            (400, "a coding in HTTP/1.0",
             b"POST /v1/completions HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
            (400, "no host", b"GET /health HTTP/1.1\r\n\r\n"),
            (400, "two hosts", GET % (b"/health", b"Host: other\r\n")),
            (400, "a blank in a name", GET % (b"/health", b"X-Thing : 1\r\n")),
            (400, "absolute form", GET % (b"http://test/health", b"")),
            (400, "no path", GET % (b"*", b"")),
            (400, "an encoded NUL", GET % (b"/v1/%00models", b"")),
            (414, "a long path", GET % (b"/" + b"x" * 5000, b"")),
            (431, "a long header", GET % (b"/health", b"X-Long: " + b"y" * 17000 + b"\r\n")),
            (431, "a very long header", GET % (b"/health", b"X-Long: " + b"y" * 60000 + b"\r\n")),
            (431, "many headers", GET % (b"/health", many)),
            (415, "a compressed body", post_with % (body + b"Content-Encoding: gzip\r\n")),
        ]
        for want, name, data in cases:
            with self.subTest(name), self.send(data) as s:
                status, headers, answer = read_response(s)
                self.assert_error(status, answer, want)
                self.assertEqual(headers["content-type"], "application/json")
                self.assertTrue(headers["x-request-id"])
                self.assertTrue(is_closed(s), "nothing after such a head can be trusted")

    def test_what_the_library_refuses(self):
        """Not JSON, but a true status, the end of the connection and no harm."""
        start = b"POST /v1/completions HTTP/1.1\r\nHost: t\r\n"
        cases = [
            ({400, 413}, start + b"Content-Length: -1\r\n\r\n"),
            ({400, 413}, start + b"Content-Length: 2abc\r\n\r\n{}"),
            ({400, 413}, start + b"Content-Length: +2\r\n\r\n{}"),
            ({413}, start + b"Content-Length: 99999999999999999999999\r\n\r\n"),
            ({400}, start + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n{}\r\n0\r\n\r\n"),
            ({400, 413}, start + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n{}"),
            ({431}, GET % (b"/health", b"X-Long: " + b"y" * 200000 + b"\r\n")),
            ({431}, GET % (b"/health", b"".join(b"X-%d: y\r\n" % i for i in range(3000)))),
            ({414, 431}, GET % (b"/" + b"x" * 60000, b"")),
            ({414, 431}, GET % (b"/" + b"x" * 200000, b"")),
            ({400}, GET % (b"/health", b"X-\0Thing: 1\r\n")),
            ({505, 400}, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
            ({400}, b"GET /health\r\n\r\n"),
            ({400}, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
        ]
        for want, data in cases:
            with self.subTest(data[:60]), self.d.connect() as s:
                try:
                    s.sendall(data)
                    answer = read_to_end(s)
                except (BrokenPipeError, ConnectionResetError):
                    answer = b""
                if answer:
                    self.assertIn(int(answer.split(b" ")[1]), want)
                self.assert_alive()

    def test_old_and_odd_but_right(self):
        cases = [
            b"GET /health HTTP/1.0\r\n\r\n",
            GET % (b"/health?verbose=1", b""),
            b"GET /health HTTP/1.1\nHost: t\n\n",
            GET % (b"/health", b"X-Empty:\r\n"),
            b"\r\n\r\n" + GET % (b"/health", b""),
            GET % (b"/health", b"Accept: */*\r\nUser-Agent: " + b"u" * 8000 + b"\r\n"),
        ]
        for data in cases:
            with self.subTest(data[:50]):
                self.assertEqual(self.ask(data)[0], 200)

    def test_what_the_library_misreads(self):
        """Text ends for it at a NUL, and it loses folded headers: neither may turn a body
        into a request of its own, or open a door."""
        body = json.dumps(ANSWER).encode()
        for fold in (b"Content-Length: %d\r\n 0" % len(body),
                     b"Content-Length:\r\n %d" % len(body),
                     b"Transfer-Encoding:\r\n chunked",
                     b"Transfer-Encoding: chun\r\n\tked"):
            with self.subTest(fold), self.send(post(GET % (b"/version", b""), fold, length=False)) \
                    as s:
                status, headers, answer = read_response(s)
                self.assert_error(status, answer, 400)
                self.assertEqual(headers["connection"], "close")
                self.assertTrue(is_closed(s), "the body is no request")
        for data in (GET % (b"/health", b"X-Thing: a\0b\r\n"),
                     GET % (b"/health", b"X-Thing: a\r\n b\r\n")):
            with self.subTest(data):
                self.assertEqual(self.ask(data)[0], 200)
        self.assert_error(*self.ask(GET % (b"/v1/\0models", b""))[::2], 404)
        self.assert_alive()

    # ---- routes and methods

    def test_routes(self):
        for path in ("/index.html", "//", "/v1", "/v1/", "/v1/completions/", "/v1/completion", "//v1/completions",
                     "/V1/completions", "/v1/%6dodels", "/v1/models/", "/v1/models/other",
                     "/v1/models/%zz", "/health/x", "/../health", "/v1/chat",
                     "/v1/chat/completions/"):
            with self.subTest(path):
                status, headers, body = self.d.request("GET", path)
                error = self.assert_error(status, body, 404, kind="not_found_error")
                self.assertTrue(headers["x-request-id"])
                self.assertTrue(error["code"])

    def test_methods(self):
        for method, path, allow in (("GET", "/v1/completions", "POST"),
                                    ("FROB", "/v1/completions", "POST"),
                                    ("OPTIONS", "/v1/completions", "POST"),
                                    ("PUT", "/v1/completions", "POST"),
                                    ("POST", "/v1/models", "GET, HEAD"),
                                    ("DELETE", "/health", "GET, HEAD"),
                                    ("POST", "/metrics", "GET, HEAD"),
                                    ("TRACE", "/version", "GET, HEAD")):
            with self.subTest(f"{method} {path}"):
                body = b"{}" if method in ("POST", "PUT") else None
                status, headers, answer = self.d.request(method, path, body)
                self.assert_error(status, answer, 405, code="method_not_allowed")
                self.assertEqual(headers["Allow"], allow)

    def test_head(self):
        with self.send(b"HEAD /v1/models HTTP/1.1\r\nHost: t\r\n\r\n" + GET % (b"/health", b"")) as s:
            status, headers = read_head(s)
            self.assertEqual(status, 200)
            self.assertGreater(int(headers["content-length"]), 50)
            self.assertEqual(read_response(s)[0], 200, "an answer to HEAD has no body")

    def test_media_types(self):
        body = json.dumps(ANSWER).encode()
        for kind, want in (("application/json", 200), ("application/json; charset=utf-8", 200),
                           ("APPLICATION/JSON", 200), ("application/x-www-form-urlencoded", 200),
                           ("text/plain", 415), ("multipart/form-data; boundary=x", 415),
                           ("application/jsonx", 415), ("application/xml", 415)):
            with self.subTest(kind):
                status, _, answer = self.d.request("POST", "/v1/completions", body,
                                                   {"Content-Type": kind})
                self.assertEqual(status, want)
                if want != 200:
                    self.assert_error(status, answer, want)
        status, _, _ = self.ask(post(body).replace(b"Content-Type: application/json\r\n", b""))
        self.assertEqual(status, 200)

    def test_request_ids(self):
        for given, kept in (("abc-123_x.y:z/+=", True), ("x" * 128, True), ("x" * 129, False),
                            ("two words", False), ('quote"', False), ("", False)):
            for path, want in (("/health", 200), ("/nowhere", 404)):
                status, headers, _ = self.d.request("GET", path, headers={"x-request-id": given})
                self.assertEqual(status, want)
                self.assertEqual(headers["x-request-id"] == given, kept, given)
                self.assertRegex(headers["x-request-id"], r"^[A-Za-z0-9._:/+=-]+$")
        ids = {self.d.request("GET", "/health")[1]["x-request-id"] for _ in range(20)}
        self.assertEqual(len(ids), 20)

    # ---- connections

    def test_keep_alive_and_pipelining(self):
        with self.send(GET % (b"/health", b"") * 3 + post(ANSWER) * 3 + GET % (b"/nothing", b"")
                       + post(ANSWER) + GET % (b"/version", b"Connection: close\r\n")) as s:
            answers = read_to_end(s)
        heads = [int(part.split(b" ")[0]) for part in answers.split(b"HTTP/1.1 ")[1:]]
        self.assertEqual(heads, [200] * 6 + [404, 200, 200])

    def test_a_refused_body_keeps_the_connection(self):
        wrong = post(b"x" * 50000, path=b"/v1/nothing") + GET % (b"/health", b"")
        with self.send(wrong) as s:
            self.assertEqual(read_response(s)[0], 404)
            self.assertEqual(read_response(s)[0], 200)

    def test_byte_by_byte(self):
        with self.d.connect() as s:
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in post(ANSWER):
                s.sendall(bytes([byte]))
            self.assertEqual(read_response(s)[0], 200)

    def test_chunked_bodies(self):
        want = self.d.complete(**ANSWER)["choices"][0]["text"]
        body = json.dumps(dict(ANSWER, user="x" * 3000)).encode()
        for size in (1, 7, 1000, 100000):
            data = post(b"", b"Transfer-Encoding: chunked", length=False) + chunked(body, size)
            with self.subTest(size), self.send(data + GET % (b"/health", b"")) as s:
                status, _, answer = read_response(s)
                self.assertEqual((status, json.loads(answer)["choices"][0]["text"]), (200, want))
                self.assertEqual(read_response(s)[0], 200)

    def test_expect_continue(self):
        body = json.dumps(ANSWER).encode()
        head = post(body, b"Expect: 100-continue")[:-len(body)]
        with self.send(head) as s:
            self.assertEqual(read_head(s), (100, {}))
            s.sendall(body)
            self.assertEqual(read_response(s)[0], 200)
        for data, want in ((head.replace(b"/v1/completions", b"/v1/other"), 404),
                           (head.replace(b"application/json", b"text/plain"), 415),
                           (post(b"", b"Content-Length: 900000000", b"Expect: 100-continue",
                                 length=False), 413)):
            with self.subTest(want), self.send(data) as s:
                status, _, answer = read_response(s)
                self.assert_error(status, answer, want)     # and no 100 before it

    def test_a_body_that_is_too_large(self):
        large = 17 << 20
        cases = [post(b"", b"Content-Length: %d" % large, length=False),
                 post(b"", b"Transfer-Encoding: chunked", length=False)]
        for head in cases:
            with self.subTest(head), self.send(head) as s:
                piece = b" " * 65536
                if b"chunked" in head:
                    piece = b"10000\r\n" + piece + b"\r\n"
                for _ in range(large // 65536 - 1):    # a client that sends before it reads
                    s.sendall(piece)
                status, headers, answer = read_response(s)
                self.assert_error(status, answer, 413)
                self.assertEqual(headers["connection"], "close")
        self.assertEqual(self.d.request("POST", "/nothing", b"y" * (1 << 20))[0], 404)

    def test_half_closed(self):
        """A stream goes on when the client only stops sending; others count as gone."""
        for extra in ({}, {"user": "x" * 40000}):       # the latter is parsed on another thread
            with self.send(post(dict(ANSWER, stream=True, max_tokens=40, **extra))) as s:
                s.shutdown(socket.SHUT_WR)
                self.assertEqual(read_head(s)[0], 200)
                self.assertIn(b"data: [DONE]", read_to_end(s))
        with self.send(post(dict(ANSWER, max_tokens=20000, ignore_eos=True))) as s:
            s.shutdown(socket.SHUT_WR)
            self.assertTrue(is_closed(s))
        with self.send(GET % (b"/health", b"")) as s:
            s.shutdown(socket.SHUT_WR)
            self.assertEqual(read_response(s)[0], 200)
        self.d.wait_idle()

    def test_connections_that_say_nothing(self):
        silent = [self.d.connect() for _ in range(50)]
        for i, s in enumerate(silent):
            s.sendall(b"POST /v1/completions HT"[:i % 24])
        self.assert_alive()
        for s in silent:
            s.close()
        self.assert_alive()

    def test_http_1_0_stream(self):
        with self.d.post_raw(dict(ANSWER, stream=True), version="1.0") as s:
            data = read_to_end(s)
        head, body = data.split(b"\r\n\r\n", 1)
        self.assertNotIn(b"chunked", head.lower())
        self.assertTrue(events(body)[-1]["choices"][0]["finish_reason"])

    def test_stream_head(self):
        with self.d.post_raw(dict(ANSWER, stream=True)) as s:
            status, headers = read_head(s)
        self.assertEqual(status, 200)
        self.assertEqual(headers["content-type"], "text/event-stream; charset=utf-8")
        self.assertEqual(headers["cache-control"], "no-cache")
        self.assertEqual(headers["x-accel-buffering"], "no")
        self.assertEqual(headers["transfer-encoding"], "chunked")
        self.assertTrue(headers["x-request-id"])
        self.d.wait_idle()


class Slow(Case):
    options = {"idle_timeout": "1s", "body_timeout": "1s"}

    def drip(self, s, data, seconds):
        """Send a byte now and then until the server has enough; its answer, and when."""
        began = time.monotonic()
        s.setblocking(False)
        answer = b""
        while time.monotonic() - began < seconds:
            try:
                piece = s.recv(65536)
                if not piece:
                    break
                answer += piece
            except BlockingIOError:
                pass
            except ConnectionResetError:
                break
            try:
                if data:
                    s.sendall(data[:1])
                    data = data[1:]
            except (BrokenPipeError, ConnectionResetError):
                break
            time.sleep(0.05)
        return answer, time.monotonic() - began

    def test_slow_clients(self):
        long = 15 * PATIENCE
        head = GET % (b"/health", b"X: " + b"y" * 5000 + b"\r\n")
        body = post(dict(ANSWER, user="x" * 5000))
        start = body.index(b"\r\n\r\n") + 4
        refused = body.replace(b"/v1/completions", b"/v1/other")
        cases = [("a slow head", b"", head, None), ("half a head", head[:20], b"", None),
                 ("nothing", b"", b"", None), ("a second head", GET % (b"/health", b""), head, 200),
                 ("a slow body", body[:start], body[start:], 408),
                 ("half a body", body[:start + 100], b"", 408),
                 ("no body", body[:start], b"", 408),
                 ("a slow refused body", refused[:start], body[start:], 408)]
        def run(case):
            with self.d.connect() as s:
                s.sendall(case[1])
                return self.drip(s, case[2], long)

        with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
            results = list(pool.map(run, cases))
        for (name, _, _, want), (answer, seconds) in zip(cases, results):
            with self.subTest(name):
                self.assertLess(seconds, long)
                self.assertGreater(seconds, 0.5)
                if want == 408:
                    self.assert_error(int(answer.split(b" ")[1]), answer.split(b"\r\n\r\n")[1], 408)
                elif want:
                    self.assertEqual(answer.count(b"HTTP/1.1 %d" % want), 1)
                    self.assertEqual(answer.count(b"HTTP/1.1"), 1)
        self.d.wait_idle()

    def test_a_client_that_reads_nothing(self):
        body = dict(ANSWER, max_tokens=300, ignore_eos=True, stream=True, logprobs=20, n=20)
        with self.d.post_raw(body, receive_buffer=4096):
            self.assertTrue(self.d.wait_until(lambda: self.d.gauge("requests_open")))
            self.d.wait_idle(60)
        self.assertRegex(self.d.log_text(), r"path=/v1/completions status=200 disconnected=true ")


if __name__ == "__main__":
    unittest.main()
