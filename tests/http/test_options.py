"""Options that other tests do not need: each does what its help says."""
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

from daemon import BINARY, MODEL, ON_CPU, PATIENCE, Daemon

PROMPT = [300 + i * 37 % 900 for i in range(700)]
ASK = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}


def device(d):
    return next(iter(d.metrics()["asynctlsd:build_info"])).split('device="')[1]


class Options(unittest.TestCase):
    def test_prefix_cache(self):
        for option, least in (("yes", 640), ("no", 0)):
            with Daemon(prefix_cache=option) as d:
                texts = {d.complete(**ASK)["choices"][0]["text"] for _ in range(2)}
                self.assertEqual(len(texts), 1)
                cached = d.complete(**ASK)["usage"]["prompt_tokens_details"]["cached_tokens"]
                self.assertEqual(cached >= 640, least > 0)
                self.assertEqual(d.gauge("prefix_cache_hits_total"), 2 * cached)
                self.assertEqual(d.gauge("kv_cache_cached_perc") > 0, least > 0)

    def test_cache_salt(self):
        with Daemon() as d:
            def cached(**kw):
                usage = d.complete(**dict(ASK, **kw))["usage"]
                return usage["prompt_tokens_details"]["cached_tokens"]

            self.assertEqual(cached(cache_salt="a"), 0)
            self.assertEqual(cached(cache_salt="b"), 0)
            self.assertEqual(cached(), 0)
            self.assertGreater(cached(cache_salt="a"), 0)
            self.assertGreater(cached(), 0)

    @unittest.skipUnless(ON_CPU, "about the CPU back end")
    def test_cpu(self):
        texts = set()
        for isa in ("scalar", "auto"):
            with Daemon(cpu_isa=isa, cpu_threads="1", log_level="error") as d:
                self.assertIn("1 thread", device(d))
                self.assertEqual("scalar" in device(d), isa == "scalar")
                texts.add(d.complete(**dict(ASK, prompt=PROMPT[:20]))["choices"][0]["text"])
                self.assertEqual(d.log_text(), "")
        self.assertEqual(len(texts), 1)

    def test_memory(self):
        blocks = []
        for size in ("32mb", "64mb"):
            with Daemon(kv_cache_bytes=size) as d:
                blocks.append(d.gauge("kv_cache_blocks"))
        self.assertAlmostEqual(blocks[1] / blocks[0], 2, delta=0.1)

    def test_step_tokens(self):
        steps = []
        for tokens in ("128", "2048"):
            with Daemon(step_tokens=tokens, max_running="2") as d:
                d.complete(**dict(ASK, max_tokens=1))
                steps.append(d.gauge("steps_total"))
        self.assertEqual(steps, [6, 1])     # 700 tokens, cut at blocks of 64

    def test_sparse_attention(self):
        small = {"crossover": "256", "keep_blocks": "4", "keep_tokens": "128", "recent_tokens": "32"}
        rows = {}
        for name, options in (("dense", {}), ("coarse", small), ("bounds", dict(small, filter="bounds")),
                              ("exceptions", dict(small, layer_exceptions="0-1:dense;3:blocks=5,tokens=200"))):
            with Daemon(**options) as d:
                d.complete(**ASK)
                rows[name] = d.gauge("decode_rows_sparse_total")
                d.complete(**dict(ASK, attention="full"))
                self.assertEqual(d.gauge("decode_rows_sparse_total"), rows[name])
                self.assertGreater(d.gauge("decode_rows_dense_total"), 0)
        self.assertEqual(rows["dense"], 0)
        self.assertEqual(set(rows.values()), {0, 7})    # the prompt's last row gave the first

    def test_budget_as_large_as_the_context(self):
        options = {"crossover": "256", "keep_blocks": "16", "keep_tokens": "1024"}
        with Daemon(**options) as d:
            sparse, full = (d.complete(**dict(ASK, logprobs=5, attention=a))["choices"][0]
                            for a in ("sparse", "full"))
            self.assertGreater(d.gauge("decode_rows_sparse_total"), 0)
        self.assertEqual(sparse["text"], full["text"])
        for a, b in zip(sparse["logprobs"]["token_logprobs"], full["logprobs"]["token_logprobs"]):
            self.assertAlmostEqual(a, b, delta=1e-3 if ON_CPU else 5e-2)

    def test_calibrated_channels(self):
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            shutil.copytree(MODEL, model)
            text = Path(folder) / "text"
            text.write_text("The ship came in on the evening tide, and he went down to meet it. " * 30)
            done = subprocess.run([BINARY, "--model", str(model), "--calibrate", str(text),
                                   "--max-model-len", "512"], capture_output=True, text=True,
                                  timeout=120 * PATIENCE)
            self.assertEqual(done.returncode, 0, done.stderr)
            with Daemon(model=model, token_index="channels", crossover="256", keep_blocks="4",
                        keep_tokens="128", recent_tokens="32") as d:
                self.assertEqual(d.complete(**ASK)["usage"]["completion_tokens"], 8)
                self.assertEqual(d.gauge("decode_rows_sparse_total"), 7)

    def test_stall_timeout_of_zero(self):
        with Daemon(stall_timeout="0") as d:
            with d.post_raw(dict(ASK, max_tokens=500)):
                for _ in range(20):
                    self.assertEqual(d.request("GET", "/health")[0], 200)


if __name__ == "__main__":
    unittest.main()
