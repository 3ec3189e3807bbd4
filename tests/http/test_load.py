"""Many clients at once that come, read, and go away in the middle.

LOAD_SECONDS sets how long (5), LOAD_SEED what they do (drawn and printed)."""
import http.client
import json
import os
import random
import threading
import time
import unittest

from daemon import ON_CPU, PATIENCE, Daemon, events

CLIENTS = 64
SECONDS = float(os.environ.get("LOAD_SECONDS", "5"))
SEED = int(os.environ.get("LOAD_SEED", random.randrange(1 << 30)))
WORDS = ("the old house stood at end of road and nobody had lived in it for many years when she "
         "came back from sea with her brother who said nothing").split()


def make_requests():
    """A few questions; prompts share beginnings, so that the prefix cache has work."""
    choose = random.Random(7)
    start = " ".join(choose.choice(WORDS) for _ in range(90))
    requests = []
    for i in range(12):
        prompt = (start if i % 2 else "") + " ".join(
            choose.choice(WORDS) for _ in range(choose.choice((3, 30, 120))))
        requests.append({"prompt": prompt, "max_tokens": choose.choice((1, 20, 40, 90)),
                         "temperature": 0 if i % 3 else 1, "seed": 100 + i, "n": 2 if i == 5 else 1,
                         "ignore_eos": True, "stream_options": {"include_usage": True},
                         "stream": True})
    return requests


def texts_of(body):
    """(choices' texts, completion tokens) of a whole event stream."""
    documents = events(body)
    texts = {}
    for document in documents:
        assert "error" not in document, document
        for choice in document["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return [texts[i] for i in sorted(texts)], documents[-1]["usage"]["completion_tokens"]


class Client(threading.Thread):
    def __init__(self, daemon, requests, want, number, end):
        super().__init__()
        self.d, self.requests, self.want, self.end = daemon, requests, want, end
        self.random = random.Random(SEED + number)
        self.whole = self.cut = self.tokens = 0
        self.problem = None

    def run(self):
        try:
            while time.monotonic() < self.end:
                self.ask(self.random.randrange(len(self.requests)))
        except Exception as e:
            self.problem = repr(e)

    def ask(self, i):
        body = json.dumps(self.requests[i]).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.d.port, timeout=120 * PATIENCE)
        patience = self.random.choice((None, None, None, 0, 1, self.random.randrange(2, 4000)))
        try:
            connection.request("POST", "/v1/completions", body)
            if patience == 0:       # gone before the answer begins
                self.cut += 1
                return
            response = connection.getresponse()
            if patience:
                response.read(patience)
                self.cut += 1
                return
            answer = response.read()
            if response.status != 200:
                raise AssertionError(f"{response.status} {answer!r}")
            got = texts_of(answer)
            if got != self.want[i] if ON_CPU else got[1] != self.want[i][1]:
                raise AssertionError(f"request {i}: {got} is not {self.want[i]}")
            self.whole += 1
            self.tokens += got[1]
        finally:
            connection.close()


class Load(unittest.TestCase):
    def load(self, **options):
        """All clients on a daemon with these options; its metrics at the end."""
        print(f"load: {CLIENTS} clients, {SECONDS:g} s, seed {SEED}")
        requests = make_requests()
        with Daemon(max_running="40", log_level="warn", **options) as d:
            want = [texts_of(d.request("POST", "/v1/completions", r)[2]) for r in requests]
            before = d.gauge("generation_tokens_total")
            end = time.monotonic() + SECONDS
            clients = [Client(d, requests, want, i, end) for i in range(CLIENTS)]
            for c in clients:
                c.start()
            for c in clients:
                c.join()
            self.assertEqual([c.problem for c in clients if c.problem], [])
            whole = sum(c.whole for c in clients)
            self.assertGreater(whole, CLIENTS // 2)
            d.wait_idle(60)
            metrics = d.metrics()
            made = d.gauge("generation_tokens_total") - before
            self.assertGreaterEqual(made, sum(c.tokens for c in clients))
            finished = metrics["asynctlsd:request_success_total"]
            self.assertEqual({v for k, v in finished.items() if '"error"' in k}, {0})
            print(f"load: {whole} whole, {sum(c.cut for c in clients)} cut off, "
                  f"{made / SECONDS:.0f} tokens/s, "
                  f"{d.gauge('num_preemptions_total'):.0f} preemptions, "
                  f"{d.gauge('prefix_cache_hits_total'):.0f} cached tokens")
            self.assertEqual(d.request("GET", "/health")[0], 200)
            return metrics

    def test_load(self):
        # A pool for about ten of them: the others wait or are put back.
        self.load(kv_cache_bytes="16mb")

    def test_load_with_a_host_tier(self):
        # Nearly all decode sparsely, and so leave the device for the others to come in.
        metrics = self.load(kv_cache_bytes="26mb", host_kv_bytes="60mb", max_model_len="512",
                            crossover="64", keep_blocks="3", keep_tokens="80", recent_tokens="16",
                            hot_rows="80", offload_sequences="12")
        for name in ("offloads_total", "kv_offload_store_bytes_total"):
            self.assertGreater(sum(metrics["asynctlsd:" + name].values()), 0, name)
        for name in ("num_requests_offloaded", "num_requests_loading", "host_kv_blocks_used"):
            self.assertEqual(sum(metrics["asynctlsd:" + name].values()), 0, name)


if __name__ == "__main__":
    unittest.main()
