"""From start to end: exit codes, readiness, draining, disconnects, metrics."""
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import unittest
from pathlib import Path

from daemon import (BINARY, DEFAULTS, MODEL, NAME, ON_CPU, PATIENCE, ROOT, Case, Daemon, events,
                    read_head, read_response, read_to_end)

PROMPT = "The old house stood at the end of the road, and"
LONG = {"prompt": PROMPT, "max_tokens": 20000, "ignore_eos": True, "temperature": 0}
CONFIG = str(ROOT / "configs" / "asynctlsd.conf")


def run(*argv, **env):
    """A process that ends by itself: (code, stdout, stderr)."""
    done = subprocess.run([BINARY, *argv], text=True, capture_output=True, timeout=60 * PATIENCE,
                          env=dict(os.environ, **env))
    return done.returncode, done.stdout, done.stderr


def unchunk(data):
    """The body of a chunked response."""
    body, rest = b"", data
    while rest:
        size, rest = rest.split(b"\r\n", 1)
        n = int(size, 16)
        if n == 0:
            return body
        body, rest = body + rest[:n], rest[n + 2:]
    raise AssertionError("the stream was cut off")


class Start(unittest.TestCase):
    def test_start_takes_less_than_a_second(self):
        seconds = []
        for _ in range(3):      # other programs may slow one of them down
            began = time.monotonic()
            with Daemon():
                seconds.append(time.monotonic() - began)
        self.assertLess(min(seconds), 1 * PATIENCE)

    def test_ready_line(self):
        with Daemon() as d:
            self.assertEqual(d.out[0], f"ready: http://127.0.0.1:{d.port}\n")
            self.assertTrue(d.wait_until(lambda: len(d.out) >= 4))
            command = "".join(d.out[1:]).replace("\\\n", " ").strip()
            self.assertTrue(command.startswith("curl "))
            answer = subprocess.run(command, shell=True, capture_output=True, timeout=60 * PATIENCE)
            self.assertTrue(events(answer.stdout)[-1]["choices"][0]["finish_reason"])

    def test_help_and_version(self):
        code, out, err = run("--help")
        self.assertEqual((code, err), (0, ""))
        self.assertIn("--max-waiting-tokens N  [2000000]", out)
        code, out, err = run("--version")
        self.assertEqual((code, err), (0, ""))
        self.assertRegex(out, r"^asynctlsd \d+\.\d+\.\d+\n$")

    def test_check_config(self):
        code, out, err = run("--config", CONFIG, "--model", MODEL, "--check-config", "--api-key", "s3",
                             ASYNCTLSD_PORT="9999")
        self.assertEqual((code, err), (0, ""))
        self.assertIn("\nport 9999\n", out)
        self.assertNotIn("s3", out)
        with tempfile.NamedTemporaryFile("w", suffix=".conf") as f:
            f.write(out)
            f.flush()
            self.assertEqual(run("--config", f.name, "--check-config", "--api-key", "s3")[1], out)

    def test_wrong_options(self):
        with tempfile.NamedTemporaryFile("w", suffix=".conf") as f:
            f.write("port 80\nporty 81\n")
            f.flush()
            cases = [(["--config", f.name], "no option 'porty'"), (["--prot", "1"], "no option --prot"),
                     ([], "no model is given"), (["--model", MODEL, "--port", "70000"], "port is '70000'"),
                     (["--model", MODEL, "--host", "0.0.0.0"], "insecure-no-key"),
                     (["--config", "/nowhere.conf"], "/nowhere.conf"),
                     (["--model", MODEL, "--step-tokens", "100"], "step-tokens (100)"),
                     (["--model", MODEL, "stray"], "'stray' is not an option")]
            for argv, want in cases:
                code, out, err = run(*argv)
                self.assertEqual((code, out), (1, ""), argv)
                self.assertTrue(err.startswith("asynctlsd: ") and err.count("\n") == 1, err)
                self.assertIn(want, err)

    def assert_refused(self, want, **options):
        """Ends with exit code 1 and a sentence in the log, without a ready line."""
        d = Daemon(wait=False, **options)
        self.assertEqual(d.wait(), 1, d.log_text())
        self.assertIn(want, d.log_text())
        self.assertEqual(d.out, [])

    def test_what_cannot_be_served(self):
        with tempfile.TemporaryDirectory() as folder:
            bad = Path(folder) / "model"
            shutil.copytree(MODEL, bad)
            config = json.loads((bad / "config.json").read_text())
            (bad / "config.json").write_text(json.dumps(dict(config, architectures=["Other"],
                                                             model_type="other")))
            cases = [("/nowhere", {"model": "/nowhere"}), ("config.json", {"model": str(bad)}),
                     ("max-model-len is 60000000", {"max_model_len": "60000000"}),
                     ("kv-cache-bytes", {"max_model_len": "60000", "kv_cache_bytes": "16mb"}),
                     ("from 1 blocks", {"keep_blocks": "1", "sink_tokens": "0", "recent_tokens": "1"}),
                     ("layer exceptions", {"layer_exceptions": "0-99:dense"}),
                     ("--calibrate", {"token_index": "channels"})]
            for want, options in cases:
                with self.subTest(want):
                    self.assert_refused(want, **options)

    def test_port_taken(self):
        with Daemon() as d:
            self.assert_refused(f"cannot listen on 127.0.0.1 port {d.port}", port=d.port)

    def test_host_that_is_none(self):
        self.assert_refused("host no.such.host.invalid", host="no.such.host.invalid", api_key="x")

    def test_options_of_the_network(self):
        with tempfile.NamedTemporaryFile("w") as f:
            f.write("# keys\nalpha\n\nbeta\n")
            f.flush()
            with Daemon(host="localhost", api_key_file=f.name, api_key="gamma") as d:
                for key, want in (("alpha", 200), ("beta", 200), ("gamma", 200), ("keys", 401)):
                    headers = {"Authorization": "Bearer " + key}
                    self.assertEqual(d.request("GET", "/v1/models", headers=headers)[0], want)
                self.assertIn("Authorization: Bearer $KEY", "".join(d.out))
        with Daemon(host="0.0.0.0", insecure_no_key="yes", wait=False) as d:
            d.wait_ready()
            self.assertTrue(d.out[0].startswith("ready: "))

    def test_loading(self):
        """Until the model is there: alive, not ready, and told so."""
        with tempfile.TemporaryDirectory() as folder:
            slow = Path(folder) / "model"
            shutil.copytree(MODEL, slow)
            # A second or more to parse, and refused in the end for its unknown key.
            text = (Path(MODEL) / "tokenizer.json").read_text().rstrip()
            (slow / "tokenizer.json").write_text(text[:-1] + ', "x": [' + "0," * 8000000 + "0]}")
            d = Daemon(wait=False, model=slow)
            try:
                self.assertTrue(d.wait_until(lambda: "listening on" in d.log_text()))
                d.port = int(d.log_text().split("port ")[1].split()[0])
                d.url = f"http://127.0.0.1:{d.port}"
                self.assertEqual(d.request("GET", "/health")[0], 200)
                for method, path in (("GET", "/ready"), ("GET", "/v1/models"),
                                     ("POST", "/v1/completions")):
                    body = {"prompt": "x"} if method == "POST" else None
                    status, headers, answer = d.request(method, path, body)
                    self.assertEqual((status, json.loads(answer)["error"]["code"]), (503, "loading"))
                    self.assertTrue(headers["Retry-After"])
                self.assertEqual(d.gauge("requests_open"), 0)
            finally:
                self.assertEqual(d.wait(), 1)
            self.assertIn("tokenizer.json", d.log_text())


class Stop(unittest.TestCase):
    def test_idle(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            d = Daemon()
            with d.connect() as s:      # an idle connection holds nothing up
                s.sendall(b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n")
                read_response(s)
                began = time.monotonic()
                d.signal(number)
                self.assertEqual(d.wait(), 0, d.log_text())
                self.assertLess(time.monotonic() - began, 2 * PATIENCE)

    def test_drain(self):
        """What runs is finished; what comes is refused; then the process ends."""
        d = Daemon(drain_timeout="10m")
        want = d.complete(**dict(LONG, max_tokens=1500))["choices"][0]["text"]
        running = d.post_raw(dict(LONG, max_tokens=1500, stream=True))
        whole = d.post_raw(dict(LONG, max_tokens=1500))
        idle = d.connect()
        idle.sendall(b"GET /ready HTTP/1.1\r\nHost: t\r\n\r\n")
        self.assertEqual(read_response(idle)[0], 200)
        self.assertTrue(d.wait_until(lambda: d.gauge("num_requests_running") == 2))
        d.signal(signal.SIGTERM)
        self.assertTrue(d.wait_until(lambda: "draining" in d.log_text()))
        idle.sendall(b"GET /ready HTTP/1.1\r\nHost: t\r\n\r\n")
        status, headers, body = read_response(idle)
        self.assertEqual((status, json.loads(body)["error"]["code"]), (503, "shutting_down"))
        self.assertTrue(headers["retry-after"])
        self.assertEqual(headers["connection"], "close")
        with self.assertRaises(ConnectionError):
            d.connect()
        self.assertEqual(read_head(running)[0], 200)
        chunks = events(unchunk(read_to_end(running)))
        self.assertEqual("".join(c["choices"][0]["text"] for c in chunks), want)
        status, _, body = read_response(whole)
        self.assertEqual((status, json.loads(body)["choices"][0]["text"]), (200, want))
        self.assertEqual(d.wait(), 0, d.log_text())

    def test_new_requests_while_draining(self):
        d = Daemon()
        running = d.post_raw(dict(LONG, stream=True))
        late = d.connect()
        late.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: 40\r\n\r\n{")
        self.assertTrue(d.wait_until(lambda: d.gauge("num_requests_running") == 1))
        d.signal(signal.SIGTERM)
        self.assertTrue(d.wait_until(lambda: "draining" in d.log_text()))
        late.sendall(b" " * 39)
        status, headers, body = read_response(late)
        self.assertEqual((status, json.loads(body)["error"]["code"]), (503, "shutting_down"))
        self.assertTrue(headers["retry-after"])
        running.close()         # the last one: the process ends as soon as it is gone
        began = time.monotonic()
        self.assertEqual(d.wait(), 0, d.log_text())
        self.assertLess(time.monotonic() - began, 5 * PATIENCE)

    def test_drain_timeout(self):
        """Streams get an error event, other answers a status; nobody is left hanging."""
        d = Daemon(drain_timeout="300ms")
        stream, whole = d.post_raw(dict(LONG, stream=True)), d.post_raw(LONG)
        self.assertTrue(d.wait_until(lambda: d.gauge("num_requests_running") == 2))
        d.signal(signal.SIGTERM)
        self.assertEqual(read_head(stream)[0], 200)
        chunks = events(unchunk(read_to_end(stream)))
        self.assertEqual(chunks[-1]["error"]["code"], "shutting_down")
        status, headers, body = read_response(whole)
        self.assertEqual((status, json.loads(body)["error"]["code"]), (503, "shutting_down"))
        self.assertTrue(headers["retry-after"])
        self.assertEqual(d.wait(), 0, d.log_text())

    def test_second_signal(self):
        d = Daemon()
        stream = d.post_raw(dict(LONG, stream=True))
        self.assertTrue(d.wait_until(lambda: d.gauge("num_requests_running") == 1))
        d.signal(signal.SIGTERM)
        self.assertTrue(d.wait_until(lambda: "draining" in d.log_text()))
        began = time.monotonic()
        d.signal(signal.SIGTERM)
        self.assertEqual(d.wait(), 1)
        self.assertLess(time.monotonic() - began, 2 * PATIENCE)
        stream.close()


class Gone(Case):
    """Clients that go away, in every phase."""
    options = {"max_running": "2", "ping_interval": "100ms", "step_tokens": "66"}

    def blockers(self):
        """Two requests that keep the batch full."""
        sockets = [self.d.post_raw(dict(LONG, stream=True)) for _ in range(2)]
        self.assertTrue(self.d.wait_until(lambda: self.d.gauge("num_requests_running") == 2))
        return sockets

    def test_while_queued(self):
        blockers = self.blockers()
        for stream in (False, True):
            waiting = [self.d.post_raw(dict(LONG, stream=stream)) for _ in range(3)]
            self.assertTrue(self.d.wait_until(lambda: self.d.gauge("num_requests_waiting") == 3))
            for s in waiting:
                s.close()
            self.assertTrue(self.d.wait_until(lambda: self.d.gauge("num_requests_waiting") == 0))
            self.assertEqual(self.d.gauge("num_requests_running"), 2)
        for s in blockers:
            s.close()
        self.d.wait_idle()

    def test_in_prefill(self):
        for stream in (False, True):
            before = self.d.gauge("generation_tokens_total")
            s = self.d.post_raw({"prompt": [300 + i % 900 for i in range(20000)], "max_tokens": 5,
                                 "stream": stream})
            self.assertTrue(self.d.wait_until(lambda: self.d.gauge("num_requests_running") == 1))
            self.assertGreater(self.d.gauge("kv_cache_usage_perc"), 0)
            s.close()
            self.d.wait_idle()
            self.assertEqual(self.d.gauge("generation_tokens_total"), before)

    def test_in_decode(self):
        for stream in (False, True):
            before = self.d.gauge("generation_tokens_total")
            s = self.d.post_raw(dict(LONG, stream=stream, n=2))
            self.assertTrue(self.d.wait_until(
                lambda: self.d.gauge("generation_tokens_total") > before + 10))
            s.close()
            self.d.wait_idle()

    def test_by_reset(self):
        s = self.d.post_raw(dict(LONG, stream=True))
        self.assertTrue(self.d.wait_until(lambda: self.d.gauge("num_requests_running") == 1))
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        s.close()
        self.d.wait_idle()

    def test_half_closed_then_gone(self):
        blockers = self.blockers()
        s = self.d.post_raw(dict(LONG, stream=True))
        self.assertTrue(self.d.wait_until(lambda: self.d.gauge("num_requests_waiting") == 1))
        s.shutdown(socket.SHUT_WR)
        self.assertEqual(read_head(s)[0], 200)      # it is told to wait
        self.assertEqual(self.d.gauge("num_requests_waiting"), 1)
        s.close()
        self.assertTrue(self.d.wait_until(lambda: self.d.gauge("num_requests_waiting") == 0))
        for s in blockers:
            s.close()
        self.d.wait_idle()

    def test_while_sending_a_large_body(self):
        s = self.d.connect()
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: 9000000\r\n\r\n"
                  + b" " * 100000)
        s.close()
        text = json.dumps(dict(LONG, prompt="word " * 20000, stream=True)).encode()
        s = self.d.connect()
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n"
                  % len(text) + text)
        s.close()                                   # while it is being parsed
        self.d.wait_idle()

    def test_pings(self):
        """Comments keep a silent stream alive, while queued and in prefill."""
        blockers = self.blockers()
        s = self.d.post_raw(dict(LONG, max_tokens=3, stream=True))
        self.assertEqual(read_head(s)[0], 200)
        time.sleep(0.6)
        for b in blockers:
            b.close()
        data = unchunk_until(s, b"[DONE]")
        comments = [line for line in data.split(b"\n\n") if line.startswith(b":")]
        self.assertGreaterEqual(len(comments), 2)
        self.assertEqual(set(comments), {b": ping"})
        self.assertTrue(events(data)[-1]["choices"][0]["finish_reason"])
        if ON_CPU:      # a GPU is done with it before the first ping is due
            s = self.d.post_raw({"prompt": [300 + i % 700 for i in range(5000)], "max_tokens": 2,
                                 "stream": True})
            read_head(s)
            self.assertIn(b": ping\n\n", unchunk_until(s, b"[DONE]"))
        self.d.wait_idle()


def unchunk_until(s, mark):
    """The chunked body on a socket that stays open."""
    data = b""
    while not data.endswith(b"\r\n0\r\n\r\n"):
        piece = s.recv(65536)
        assert piece, data
        data += piece
    assert mark in data
    return unchunk(data)


class Metrics(Case):
    options = {"served_model_name": 'odd"name'}

    def test_names_and_labels(self):
        self.d.complete(**dict(LONG, max_tokens=3))
        m = self.d.metrics()
        for name in ("num_requests_running", "num_requests_waiting", "waiting_tokens",
                     "kv_cache_usage_perc", "kv_cache_cached_perc", "kv_cache_blocks",
                     "prefix_cache_queries_total", "prefix_cache_hits_total", "prompt_tokens_total",
                     "prompt_tokens_cached_total", "generation_tokens_total",
                     "num_preemptions_total", "recomputed_tokens_total", "decode_rows_sparse_total",
                     "decode_rows_dense_total", "steps_total", "step_seconds_total",
                     "step_host_seconds_total", "request_success_total", "requests_open",
                     "requests_parsing", "build_info", "cache_config_info",
                     "http_requests_total"):
            for labels in m["asynctlsd:" + name]:
                self.assertIn('model_name="odd\\"name"', labels)
        for name in ("time_to_first_token_seconds", "inter_token_latency_seconds",
                     "e2e_request_latency_seconds", "request_queue_time_seconds",
                     "request_inference_time_seconds", "request_prefill_time_seconds",
                     "request_decode_time_seconds", "request_prompt_tokens",
                     "request_generation_tokens", "request_params_n", "request_params_max_tokens",
                     "request_num_preemptions", "request_time_per_output_token_seconds",
                     "iteration_tokens_total"):
            buckets = list(m[f"asynctlsd:{name}_bucket"].values())
            self.assertEqual(buckets, sorted(buckets))
            self.assertEqual(buckets[-1], sum(m[f"asynctlsd:{name}_count"].values()))
            self.assertIn('le="+Inf"', list(m[f"asynctlsd:{name}_bucket"])[-1])
        text = self.d.request("GET", "/metrics")[2].decode()
        for name in {line.split("{")[0] for line in text.splitlines() if line[0] != "#"}:
            base = name
            for end in ("_bucket", "_sum", "_count"):
                base = base.removesuffix(end)
            self.assertIn(f"# TYPE {base} ", text)
            self.assertIn(f"# HELP {base} ", text)

    def test_counters(self):
        names = ("prompt_tokens_total", "generation_tokens_total", "request_success_total",
                 "request_prompt_tokens_sum", "request_generation_tokens_sum",
                 "request_generation_tokens_count", "time_to_first_token_seconds_count",
                 "inter_token_latency_seconds_count", "e2e_request_latency_seconds_count",
                 "request_params_n_count", "request_queue_time_seconds_count",
                 "prefix_cache_queries_total", "prefix_cache_hits_total",
                 "request_time_per_output_token_seconds_count", "iteration_tokens_total_sum",
                 "iteration_tokens_total_count", "steps_total")

        def read():
            m = self.d.metrics()
            return {name: sum(m["asynctlsd:" + name].values()) for name in names}

        self.d.wait_idle()
        before = read()
        prompt = [400 + i for i in range(200)]
        usage = [self.d.complete(**dict(LONG, prompt=p, max_tokens=t, n=n, temperature=1))["usage"]
                 for p, t, n in ((prompt, 10, 1), (prompt, 5, 1), (PROMPT, 7, 3), ([prompt] * 2, 1, 1))]
        status, _, _ = self.d.request("POST", "/v1/completions", {"prompt": 5})
        self.assertEqual(status, 400)
        self.d.wait_idle()
        delta = {name: value - before[name] for name, value in read().items()}
        words = usage[2]["prompt_tokens"]
        self.assertEqual([u["completion_tokens"] for u in usage], [10, 5, 21, 2])
        self.assertEqual(usage[3]["prompt_tokens"], 400)
        self.assertEqual(delta["generation_tokens_total"], 38)
        self.assertEqual(delta["request_generation_tokens_sum"], 38)
        self.assertEqual(delta["prompt_tokens_total"], 800 + 3 * words)
        self.assertEqual(delta["request_prompt_tokens_sum"], 800 + 3 * words)
        for name in ("request_success_total", "request_generation_tokens_count",
                     "time_to_first_token_seconds_count", "e2e_request_latency_seconds_count",
                     "request_queue_time_seconds_count"):
            self.assertEqual(delta[name], 7, name)
        self.assertEqual(delta["inter_token_latency_seconds_count"], 38 - 7)
        self.assertEqual(delta["request_params_n_count"], 4)
        # Two choices had one token.  The last token of each is never computed.
        self.assertEqual(delta["request_time_per_output_token_seconds_count"], 5)
        self.assertEqual(delta["iteration_tokens_total_sum"],
                         800 + 3 * words - delta["prefix_cache_hits_total"] + 38 - 7)
        self.assertEqual(delta["iteration_tokens_total_count"], delta["steps_total"])
        self.assertEqual(delta["prefix_cache_queries_total"], 800 + 3 * words)
        self.assertEqual(delta["prefix_cache_hits_total"],
                         usage[1]["prompt_tokens_details"]["cached_tokens"] +
                         usage[3]["prompt_tokens_details"]["cached_tokens"])

    def test_step_sizes(self):
        """A prompt of 200 tokens is one step in the bucket of 129 to 256."""
        def read():
            return {k.split('le="')[1][:-1]: v for k, v in
                    self.d.metrics()["asynctlsd:iteration_tokens_total_bucket"].items()}

        self.d.wait_idle()
        before = read()
        self.d.complete(prompt=[700 + i for i in range(200)], max_tokens=1)
        self.d.wait_idle()
        delta = {le: v - before[le] for le, v in read().items()}
        self.assertEqual((delta["128"], delta["256"], delta["+Inf"]), (0, 1, 1))

    def test_chat_counts_too(self):
        def read():
            m = self.d.metrics()
            durations = m.get("asynctlsd:http_request_duration_seconds_count", {})
            return ([sum(m["asynctlsd:" + name].values()) for name in
                     ("time_to_first_token_seconds_count", "e2e_request_latency_seconds_count",
                      "request_params_n_count")] +
                    [sum(v for k, v in durations.items() if '"/v1/chat/completions"' in k)])

        self.d.wait_idle()
        before = read()
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        self.assertEqual(self.d.request("POST", "/v1/chat/completions", body)[0], 200)
        self.d.wait_idle()
        self.assertEqual([a - b for a, b in zip(read(), before)], [1, 1, 1, 1])

    def test_host_time(self):
        """Without a device to wait for, all of a step and what lies between two is the host's."""
        def read():
            return [self.d.gauge(name) for name in ("step_seconds_total", "step_host_seconds_total")]

        self.d.wait_idle()
        steps, host = read()
        began = time.monotonic()
        self.d.complete(**dict(LONG, max_tokens=30))
        self.d.wait_idle()
        seconds = time.monotonic() - began
        steps, host = [after - before for after, before in zip(read(), (steps, host))]
        self.assertGreater(steps, 0)
        if ON_CPU:
            self.assertGreaterEqual(host, 0.99 * steps)
        self.assertLessEqual(host, seconds)

    def test_http_counts(self):
        def count(route, code):
            return sum(v for k, v in self.d.metrics()["asynctlsd:http_requests_total"].items()
                       if f'route="{route}"' in k and f'code="{code}"' in k)

        before = count("none", 404), count("/v1/models/", 404), count("/version", 200)
        for path in ("/x", "/y", "/v1/models/z", "/version"):
            self.d.request("GET", path)
        after = count("none", 404), count("/v1/models/", 404), count("/version", 200)
        self.assertEqual([a - b for a, b in zip(after, before)], [2, 1, 1])

    def test_disconnects_are_counted(self):
        def aborted():
            return sum(v for k, v in self.d.metrics()["asynctlsd:request_success_total"].items()
                       if 'finished_reason="abort"' in k)

        before = aborted()
        self.d.post_raw(dict(LONG, stream=True)).close()
        self.assertTrue(self.d.wait_until(lambda: aborted() == before + 1))


class Health(unittest.TestCase):
    def test_stall(self):
        """A step that takes longer than stall-timeout is reported, and forgiven."""
        with Daemon(stall_timeout="1ms", step_tokens="8192", cpu_threads="1",
                    check_invariants="no") as d:
            with d.post_raw({"prompt": [300 + i % 900 for i in range(5000)], "max_tokens": 1}) as s:
                self.assertTrue(d.wait_until(lambda: d.request("GET", "/health")[0] == 503))
                status, headers, body = d.request("GET", "/health")
                if status == 503:
                    self.assertEqual(json.loads(body)["error"]["code"], "engine_stalled")
                self.assertEqual(d.request("GET", "/ready")[0], 200)
                self.assertEqual(read_response(s)[0], 200)
            d.wait_idle()
            self.assertEqual(d.request("GET", "/health")[0], 200)


if __name__ == "__main__":
    unittest.main()
