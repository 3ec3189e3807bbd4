"""A daemon with a host tier: the same answers, its metrics, what it refuses, how it ends."""
import signal
import threading
import unittest

from daemon import ON_CPU, Daemon, read_response, read_to_end

BLOCK = 64 * 8192 + 8 * 2 * 2176    # bytes of one of the bundled model
SPARSE = {"crossover": "100", "keep_blocks": "4", "keep_tokens": "96", "recent_tokens": "32"}
SMALL = dict(SPARSE, max_model_len="1024", kv_cache_bytes=str(60 * BLOCK))
TIER = dict(SMALL, host_kv_bytes=str(100 * BLOCK))
GAUGES = ("host_kv_blocks", "host_kv_blocks_used", "host_kv_blocks_cached", "num_requests_offloaded")


def text(i, n):
    return [300 + (i * 131 + k * 37) % 900 for k in range(n)]


def asks():
    return [{"prompt": text(i % 4, 40 + i * 71), "max_tokens": 30 + i * 7, "ignore_eos": True,
             "temperature": 0.8 * (i % 2), "seed": i, "logprobs": 2} for i in range(10)]


def answers(d):
    """Of all at once."""
    out = [None] * 10

    def ask(i, body):
        out[i] = d.complete(**body)["choices"]
    threads = [threading.Thread(target=ask, args=pair) for pair in enumerate(asks())]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    d.wait_idle()
    return out


def total(d, name):
    return sum(v for v in d.metrics()["asynctlsd:" + name].values())


class Offload(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        with Daemon(**SPARSE) as d:
            cls.want = answers(d)
            cls.names_without = set(d.metrics())

    def assert_idle(self, d):
        """Nobody uses the tier; what is in it is kept."""
        def idle():
            m = {g: d.gauge(g) for g in GAUGES}
            return m["host_kv_blocks_used"] == m["num_requests_offloaded"] == 0 and m
        m = d.wait_until(idle)
        self.assertTrue(m, {g: d.gauge(g) for g in GAUGES})
        self.assertEqual(m["host_kv_blocks"], 100)
        self.assertGreater(m["host_kv_blocks_cached"], 0)
        self.assertEqual(d.gauge("num_requests_loading"), 0)

    def check(self, **options):
        with Daemon(**dict(TIER, **options)) as d:
            got = answers(d)
            if ON_CPU:
                self.assertEqual(got, self.want)
            self.assert_idle(d)
            self.assertGreater(total(d, "offloads_total"), 0)
            self.assertGreater(total(d, "kv_offload_store_bytes_total"), 0)
            layers = d.metrics()["asynctlsd:hot_row_misses_total"]
            self.assertEqual(len(layers), 8)
            return set(d.metrics()) - self.names_without

    def test_auto(self):
        names = self.check()
        self.assertGreater(len(names), 8)
        for name in names:
            self.assertRegex(name, "host_kv|offload|hot_row|streamed|loading")

    def test_always(self):
        self.check(offload="always", kv_cache_bytes="64mb")

    def test_few_hot_rows_and_one_at_a_time(self):
        self.check(hot_rows="96", offload_sequences="1", kv_cache_bytes=str(30 * BLOCK))

    def test_without_a_tier_no_metrics_of_one(self):
        self.assertFalse([n for n in self.names_without if "host_kv" in n or "offload" in n])

    def test_prefix_out_of_the_tier(self):
        ask = {"prompt": text(1, 900), "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        with Daemon(**dict(TIER, kv_cache_bytes=str(38 * BLOCK), offload_sequences="1")) as d:
            first = d.complete(**ask)
            for i in range(5, 9):
                d.complete(**dict(ask, prompt=text(i, 900)))
            loaded = d.gauge("kv_offload_load_bytes_total")
            again = d.complete(**ask)
            self.assertEqual(again["usage"]["prompt_tokens_details"]["cached_tokens"], 896)
            self.assertEqual(first["choices"], again["choices"])
            self.assertEqual(d.gauge("kv_offload_load_bytes_total") - loaded, 14 * BLOCK)

    def test_longer_than_the_pool(self):
        """45 blocks or so hold neither prompt; one at a time streams through them."""
        ask = {"prompt": text(3, 3500), "max_tokens": 60, "temperature": 0, "ignore_eos": True,
               "logprobs": 1}
        asks = [ask, dict(ask, prompt=text(2, 3400), attention="full", max_tokens=5),
                dict(ask, prompt=text(1, 100))]
        with Daemon(**SPARSE) as d:
            want = [d.complete(**a)["choices"] for a in asks]
        with Daemon(**dict(SPARSE, kv_cache_bytes="37mb", host_kv_bytes="80mb", hot_rows="384",
                           max_model_len="4096", offload_sequences="1")) as d:
            self.assertLess(d.gauge("kv_cache_blocks"), 3400 // 64)
            got = [None] * len(asks)

            def run(i):
                got[i] = d.complete(**asks[i])["choices"]
            threads = [threading.Thread(target=run, args=(i,)) for i in range(len(asks))]
            for t in threads:
                t.start()
            self.assertTrue(d.wait_until(lambda: d.gauge("num_requests_streamed") == 1))
            for t in threads:
                t.join()
            if ON_CPU:
                self.assertEqual(got, want)
            self.assertTrue(d.wait_until(lambda: d.gauge("num_requests_streamed") == 0))

    # ---- what is refused

    def test_a_tier_must_hold_the_longest(self):
        self.assert_refused("max-model-len is 4096; the host tier holds",
                            **dict(SPARSE, kv_cache_bytes="37mb", host_kv_bytes="20mb",
                                   max_model_len="4096", offload_sequences="1"))

    def assert_refused(self, want, **options):
        d = Daemon(wait=False, **options)
        self.assertEqual(d.wait(), 1, d.log_text())
        self.assertEqual(d.out, [])
        errors = [line for line in d.log_text().splitlines() if " E " in line]
        self.assertEqual(len(errors), 1, errors)
        self.assertRegex(errors[0], want)

    def test_always_needs_a_tier(self):
        self.assert_refused("offload always .*host-kv-bytes", offload="always")

    def test_always_needs_all_layers_sparse(self):
        self.assert_refused("offload always: .* layer 2 dense",
                            **dict(TIER, offload="always", layer_exceptions="0:blocks=4,2-3:dense"))

    def test_hot_rows_hold_what_is_kept(self):
        self.assert_refused("hot-rows is 95.* 96", **dict(TIER, hot_rows="95"))

    def test_a_tier_larger_than_the_machine(self):
        self.assert_refused("host tier of 1677721. MB: .* [0-9]+ MB of memory",
                            **dict(TIER, host_kv_bytes="16tb"))

    def test_a_tier_smaller_than_a_block(self):
        self.assert_refused("host-kv-bytes is 1000; .*block", **dict(TIER, host_kv_bytes="1000"))

    def test_a_pool_that_hot_rows_leave_nothing_of(self):
        self.assert_refused("kv-cache-bytes", **dict(TIER, kv_cache_bytes="2mb"))

    # ---- the end

    def test_end_while_blocks_are_stored(self):
        """In the midst of a prompt, each of whose steps fills a block, and of its answer."""
        ask = {"prompt": text(2, 900), "max_tokens": 120, "temperature": 0, "ignore_eos": True}
        with Daemon(**dict(TIER, step_tokens="72", max_running="8")) as d:
            s = d.post_raw(ask)
            self.assertTrue(d.wait_until(lambda: d.gauge("kv_offload_store_bytes_total") > 0))
            d.signal(signal.SIGTERM)
            status, _, body = read_response(s)
            self.assertEqual(status, 200, body)
            self.assertEqual(d.wait(), 0)

    def test_end_with_work_left(self):
        """What drain-timeout cuts off was offloaded, loading or waiting."""
        with Daemon(**dict(TIER, offload="always", drain_timeout="100ms", max_model_len="1000")) as d:
            sockets = [d.post_raw({"prompt": text(i, 300), "max_tokens": 600, "ignore_eos": True,
                                   "stream": True}) for i in range(8)]
            self.assertTrue(d.wait_until(lambda: d.gauge("num_requests_offloaded") > 0))
            d.signal(signal.SIGTERM)
            for s in sockets:
                read_to_end(s)
            self.assertEqual(d.wait(), 0)


if __name__ == "__main__":
    unittest.main()
