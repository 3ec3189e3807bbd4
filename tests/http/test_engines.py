"""Several engines in one daemon: who gets a request, what happens where one is full, and that all of
them are looked after.

ENGINES is the list of devices (cpu,cpu).  With GPUs set BACKEND to one of them as well."""
import json
import random
import re
import signal
import threading
import unittest
from pathlib import Path

import test_load
from daemon import DEFAULTS, ENGINES, ON_CPU, PATIENCE, Case, Daemon, read_head, read_response
from test_lifecycle import run
from test_notify import Frozen, engine_thread

N = len(ENGINES.split(","))
KEY = {"Authorization": "Bearer alpha"}
# As long as it takes: cut off by its client.
LONG = {"max_tokens": 6000, "ignore_eos": True, "stream": True, "temperature": 0}


def prompt_of(seed, n=400):
    choose = random.Random(seed)
    return [choose.randrange(300, 5000) for _ in range(n)]


def differences(before, after):
    return [b - a for a, b in zip(before, after)]


class Engines(Case):
    options = {"backend": ENGINES, "kv_cache_bytes": "64mb", "api_key": "alpha",
               "metrics_public": "yes"}

    def setUp(self):
        self.d.wait_idle()
        self.sockets = []

    def tearDown(self):
        for s in self.sockets:
            s.close()
        self.d.wait_idle()

    def complete(self, **body):
        status, _, answer = self.d.request("POST", "/v1/completions",
                                           dict({"max_tokens": 4, "temperature": 0}, **body), KEY)
        self.assertEqual(status, 200, answer)
        return json.loads(answer)

    def post(self, **body):
        """A socket on which a completion has been asked for, closed at the test's end."""
        s = self.d.connect()
        self.sockets.append(s)
        data = json.dumps(dict(LONG, **body)).encode()
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer alpha\r\n"
                  b"Content-Length: %d\r\n\r\n" % len(data) + data)
        return s

    def state(self):
        return json.loads(self.d.request("GET", "/debug/state", headers=KEY)[2])

    def who_computes(self, **body):
        """(the engine that got it, prompt tokens that it had cached)"""
        before = self.d.by_engine("prefix_cache_queries_total")
        answer = self.complete(**body)
        asked = differences(before, self.d.by_engine("prefix_cache_queries_total"))
        engine, = [i for i, n in enumerate(asked) if n]
        return engine, answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    def test_a_prompt_goes_where_its_beginning_is(self):
        first = [self.who_computes(prompt=prompt_of(seed)) for seed in range(2 * N)]
        self.assertEqual([cached for _, cached in first], [0] * 2 * N)
        self.assertEqual({engine for engine, _ in first}, set(range(N)))    # in turn while idle
        hits = self.d.by_engine("prefix_cache_hits_total")
        for seed in list(range(2 * N)) * 2:
            engine, cached = self.who_computes(prompt=prompt_of(seed) + prompt_of(seed + 100, 9))
            self.assertEqual((engine, cached), (first[seed][0], 384))
        found = differences(hits, self.d.by_engine("prefix_cache_hits_total"))
        self.assertEqual(sum(found), 4 * N * 384)
        self.assertTrue(all(found), found)

    def test_a_conversation_stays(self):
        text = "It was a dark evening in November, and the old house"
        where = set()
        for turn in range(4):
            answer = self.complete(prompt=text, max_tokens=100, ignore_eos=True)
            text += answer["choices"][0]["text"] + " And then he said:"
            engine, cached = self.who_computes(prompt=text)
            where.add(engine)
            self.assertGreaterEqual(cached, 64 * (turn + 1))   # what was decoded, too
        self.assertEqual(len(where), 1)

    def test_other_salts_are_other_prompts(self):
        self.who_computes(prompt=prompt_of(50), cache_salt="a")
        self.assertEqual(self.who_computes(prompt=prompt_of(50), cache_salt="b")[1], 0)
        self.assertEqual(self.who_computes(prompt=prompt_of(50), cache_salt="a")[1], 384)

    def test_load_spreads_and_clients_leave(self):
        aborted = self.d.by_engine("request_success_total")
        for seed in range(4 * N):
            self.post(prompt=prompt_of(200 + seed, 20))
        self.assertTrue(self.d.wait_until(
            lambda: self.d.by_engine("num_requests_running") == [4] * N),
            self.d.by_engine("num_requests_running"))
        engines = self.state()["engines"]
        self.assertEqual([e["engine"] for e in engines], list(range(N)))
        self.assertEqual([e["running"] for e in engines], [4] * N)
        self.assertTrue(all(e["busy"] and e["kv_pool"]["used"] for e in engines))
        for s in self.sockets:
            s.close()
        self.d.wait_idle()
        self.assertEqual(differences(aborted, self.d.by_engine("request_success_total")), [4] * N)

    def test_choices_of_a_prompt_stay_together(self):
        prompts = [prompt_of(300 + i, 100) for i in range(2 * N)]
        self.post(prompt=prompts, n=2, temperature=1)
        self.assertTrue(self.d.wait_until(lambda: self.d.gauge("num_requests_running") == 4 * N))
        choices = [c["engine"] for c in self.state()["requests"][0]["choices"]]
        self.assertEqual(choices[::2], choices[1::2])
        self.assertEqual(set(choices), set(range(N)))

    def test_answers_of_several_prompts_come_in_order(self):
        prompts = [prompt_of(400 + i, 50) for i in range(3 * N)]
        body = {"max_tokens": 12, "ignore_eos": True}
        alone = [self.complete(prompt=p, **body)["choices"][0]["text"] for p in prompts]
        together = self.complete(prompt=prompts, **body)["choices"]
        self.assertEqual([c["index"] for c in together], list(range(3 * N)))
        if ON_CPU:
            self.assertEqual([c["text"] for c in together], alone)

    def test_what_is_told_of_them(self):
        engines = self.state()["engines"]
        m = self.d.metrics()
        self.assertEqual(len(engines), N)
        for name, samples in m.items():
            about_http = name.split(":")[1].startswith(("http_", "requests_"))
            self.assertEqual({'engine="' in labels for labels in samples}, {not about_http}, name)
        infos = m["asynctlsd:build_info"]
        for i, e in enumerate(engines):
            self.assertEqual([f'engine="{i}"' in k and f'device="{e["device"]}"' in k
                              for k in infos].count(True), 1)
            self.assertEqual(e["kv_pool"]["blocks"], self.d.by_engine("kv_cache_blocks")[i])
        for path in ("/health", "/ready"):
            self.assertEqual(self.d.request("GET", path)[0], 200)
        names = {(t / "comm").read_text().strip()
                 for t in Path(f"/proc/{self.d.process.pid}/task").iterdir()}
        self.assertLessEqual({f"engine {i}" for i in range(N)}, names)


class Full(Case):
    """One runs and one waits in each engine; more is too much."""
    options = {"backend": ENGINES, "max_running": "1", "max_waiting": "1", "max_choices": "1"}

    def assert_becomes(self, name, want):
        self.assertTrue(self.d.wait_until(lambda: sorted(self.d.by_engine(name)) == sorted(want)),
                        (name, self.d.by_engine(name)))

    def test_the_next_engine_before_429(self):
        """The prompt's engine is the best for each of them, until it has no room."""
        body = dict(LONG, prompt=prompt_of(1))
        sockets = []
        for i in range(2 * N):
            sockets.append(self.d.post_raw(body))
            engines, waits = divmod(i, 2)
            self.assert_becomes("num_requests_running",
                                [1] * (engines + 1) + [0] * (N - engines - 1))
            self.assert_becomes("num_requests_waiting",
                                [1] * (engines + waits) + [0] * (N - engines - waits))
        status, headers, answer = self.d.request("POST", "/v1/completions", body)
        self.assert_error(status, answer, 429, "rate_limit_exceeded")
        self.assertIn("Retry-After", headers)
        # Who leaves makes room, wherever that is.
        sockets[-1].close()
        self.assert_becomes("num_requests_waiting", [1] * (N - 1) + [0])
        sockets.append(self.d.post_raw(body))
        self.assert_becomes("num_requests_waiting", [1] * N)
        for s in sockets:
            s.close()
        self.d.wait_idle()


class Shares(unittest.TestCase):
    def test_a_share_of_every_engine(self):
        with Daemon(backend=ENGINES, api_key="alpha,beta", key_waiting_share="0.5", max_running="1",
                    max_waiting="2", metrics_public="yes") as d:
            def post(key, i):
                s = d.connect()
                data = json.dumps(dict(LONG, prompt=prompt_of(i, 20))).encode()
                s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer %s"
                          b"\r\nContent-Length: %d\r\n\r\n" % (key, len(data)) + data)
                return s

            def refused(key):
                s = post(key, 99)
                status, _, body = read_response(s)
                s.close()
                return status, json.loads(body)["error"]["code"]

            sockets = []
            for i in range(2 * N):
                sockets.append(post(b"alpha", i))
                self.assertTrue(d.wait_until(
                    lambda: d.gauge("num_requests_running") == min(i + 1, N) and
                    d.gauge("num_requests_waiting") == max(i + 1 - N, 0)))
            self.assertEqual(refused(b"alpha"), (429, "key_queue_full"))
            for i in range(N):
                sockets.append(post(b"beta", i))
            self.assertTrue(d.wait_until(lambda: d.by_engine("num_requests_waiting") == [2] * N))
            self.assertEqual(refused(b"beta")[0], 429)
            for s in sockets:
                s.close()
            d.wait_idle()


class Answers(unittest.TestCase):
    @unittest.skipUnless(ON_CPU, "a GPU rounds differently in other batches")
    def test_are_those_of_one_engine(self):
        bodies = [{"prompt": prompt_of(seed, 30 + 150 * (seed % 3)), "max_tokens": 40, "n": 1 + seed % 2,
                   "temperature": seed % 3 / 2, "seed": seed, "logprobs": 2, "ignore_eos": True}
                  for seed in range(12)]
        for body in bodies[::3]:        # one grammar, which both engines walk and make states of
            body["guided_regex"] = "([a-z]+, ){4,9}(?:[A-Z][a-z]{3,9} ?)+"

        def answers(backend):
            out = [None] * len(bodies)
            with Daemon(backend=backend, crossover="128", keep_blocks="3", keep_tokens="80") as d:
                def ask(i):
                    out[i] = d.complete(**bodies[i])["choices"]
                threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(bodies))]
                for t in threads:
                    t.start()
                for t in threads:
                    t.join()
                used = d.by_engine("generation_tokens_total")
            return out, used

        one, _ = answers(ENGINES.split(",")[0])
        several, used = answers(ENGINES)
        self.assertTrue(all(used), used)
        self.assertEqual(one, several)


class Ends(unittest.TestCase):
    def test_sigterm_under_load_loses_nothing(self):
        with Daemon(backend=ENGINES, drain_timeout="60s") as d:
            sockets = [d.post_raw({"prompt": prompt_of(i, 50), "max_tokens": 300, "stream": True,
                                   "ignore_eos": True, "stream_options": {"include_usage": True}})
                       for i in range(6 * N)]
            self.assertTrue(d.wait_until(lambda: all(d.by_engine("num_requests_running"))))
            d.signal(signal.SIGTERM)
            for s in sockets:
                self.assertEqual(read_head(s)[0], 200)
                body = b""
                while b"[DONE]" not in body and (piece := s.recv(65536)):
                    body += piece
                self.assertIn(b'"completion_tokens":300', body)
            self.assertEqual(d.wait(60), 0)

    def test_drain_timeout_cancels_in_all(self):
        with Daemon(backend=ENGINES, drain_timeout="300ms") as d:
            sockets = [d.post_raw(dict(LONG, prompt=prompt_of(i, 20))) for i in range(2 * N)]
            self.assertTrue(d.wait_until(
                lambda: d.by_engine("num_requests_running") == [2] * N))
            d.signal(signal.SIGTERM)
            self.assertEqual(d.wait(), 0)
            for s in sockets:
                s.close()

    def test_one_that_stalls_is_seen(self):
        """The others go on, and still the process counts as unwell."""
        with Daemon(backend=ENGINES, stall_timeout=f"{int(1000 * PATIENCE)}ms") as d:
            sockets = [d.post_raw(dict(LONG, prompt=prompt_of(i, 20))) for i in range(N)]
            self.assertTrue(d.wait_until(lambda: d.by_engine("num_requests_running") == [1] * N))
            for _ in range(10):     # until it is caught without a lock that the loop wants
                with Frozen(engine_thread(d.process.pid, 1)):
                    try:
                        self.assertTrue(d.wait_until(
                            lambda: d.request("GET", "/health", timeout=3)[0] == 503, 10))
                        self.assertTrue(d.wait_until(
                            lambda: "engine 1: no step for" in d.log_text()))
                        break
                    except TimeoutError:
                        continue
            else:
                self.fail("the engine has a lock whenever it is looked at")
            self.assertNotIn("engine 0: no step", d.log_text())
            self.assertTrue(d.wait_until(lambda: d.request("GET", "/health")[0] == 200))
            for s in sockets:
                s.close()


class Starts(unittest.TestCase):
    def assert_refused(self, want, **options):
        argv = [w for k, v in dict(DEFAULTS, **options).items() for w in ("--" + k, v)]
        code, out, err = run(*argv)
        self.assertEqual((code, out), (1, ""))
        self.assertIn(want, err)

    def test_lists_that_are_refused(self):
        for backend, want in (("cuda:0,cuda:0", "backend lists cuda:0 twice"),
                              ("cpu,gpu", "no device is called 'gpu'"),
                              ("cpu,,cpu", "backend has an entry that is empty"),
                              ("auto,cpu", "backend auto stands alone"),
                              (",".join(["cpu"] * 17), "17 devices; 16 are the most")):
            self.assert_refused(want, backend=backend)

    def test_who_cannot_start_is_named(self):
        self.assert_refused(f"engine 0 ({ENGINES.split(',')[0]}): ", backend=ENGINES,
                            **{"kv-cache-bytes": "1kb"})

    def test_one_file_for_several_engines(self):
        self.assert_refused(f"selects: backend lists {N} devices", backend=ENGINES,
                            **{"selection-dump": "/nonexistent/dump"})

    def test_host_tiers_that_do_not_fit_together(self):
        available = int(re.search(r"MemAvailable:\s+(\d+) kB",
                                  Path("/proc/meminfo").read_text())[1]) * 1024
        self.assert_refused(f"for each of {N} engines", backend=ENGINES,
                            **{"host-kv-bytes": str(available * 3 // 4)})


class Load(test_load.Load):
    """Many clients that come and go, with the answers that each question had at first."""

    def load(self, **options):
        metrics = super().load(backend=ENGINES, **options)
        steps = [v for k, v in metrics["asynctlsd:steps_total"].items()]
        self.assertEqual(len(steps), N)
        self.assertTrue(all(n > 50 for n in steps), steps)
        return metrics


if __name__ == "__main__":
    unittest.main()
