"""Options that other tests do not need: each does what its help says."""
import json
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
                              ("means", dict(small, filter="means")),
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
            self.assertAlmostEqual(a, b, delta=1e-3 if ON_CPU else 0.2)

    def test_lengths_around_the_edges(self):
        """Blocks, budget, crossover, and the greatest context that the model has."""
        limit, crossover, budget, n_out = 700, 256, 128, 8
        options = {"crossover": crossover, "keep_blocks": "4", "keep_tokens": budget,
                   "recent_tokens": "32"}
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            shutil.copytree(MODEL, model)
            config = json.loads((model / "config.json").read_text())
            config["max_position_embeddings"] = limit
            (model / "config.json").write_text(json.dumps(config))
            with Daemon(model=model, **options) as d:
                for n in (1, 63, 64, 65, budget - 1, budget, budget + 1, crossover - n_out,
                          crossover - 1, crossover, crossover + 1, limit - n_out - 1,
                          limit - n_out):
                    with self.subTest(n):
                        self.check_length(d, PROMPT[:n], n_out, crossover)
                usage = d.complete(**dict(ASK, prompt=PROMPT[:-1], max_tokens=1))["usage"]
                self.assertEqual(usage["total_tokens"], limit)
                for n, m in ((limit, 1), (limit - n_out + 1, n_out)):
                    status, _, answer = d.request("POST", "/v1/completions",
                                                  dict(ASK, prompt=PROMPT[:n], max_tokens=m))
                    error = json.loads(answer)["error"]
                    self.assertEqual((status, error["code"]), (400, "context_length_exceeded"))
                    self.assertIn(f"length is {limit} tokens. However, you requested {limit + 1} "
                                  f"tokens ({n} in the prompt, {m} in the completion)",
                                  error["message"])

    def check_length(self, d, prompt, n_out, crossover):
        """Which decode rows are sparse, and that without one both kinds agree to the bit."""
        before = d.gauge("decode_rows_sparse_total")
        sparse, full = (d.complete(**dict(ASK, prompt=prompt, max_tokens=n_out, logprobs=5,
                                          attention=a)) for a in ("sparse", "full"))
        self.assertEqual(sparse["usage"]["completion_tokens"], n_out)
        self.assertEqual(full["usage"]["completion_tokens"], n_out)
        # The prompt's last row gives the first token; each other comes from a row of its own.
        rows = sum(position >= crossover for position in range(len(prompt),
                                                               len(prompt) + n_out - 1))
        self.assertEqual(d.gauge("decode_rows_sparse_total") - before, rows)
        if rows == 0:
            self.assertEqual(sparse["choices"], full["choices"])

    def test_default_crossover(self):
        """The device's own, see kernels/backend.h."""
        crossover, n_out = 4096 if ON_CPU else 8192, 8
        with Daemon() as d:
            self.check_length(d, (PROMPT * 12)[:crossover - 4], n_out, crossover)

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
