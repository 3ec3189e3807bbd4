"""The openai package against a running server."""
import json
import math
import random
import re
import threading
import unittest
from pathlib import Path

import openai

from daemon import MODEL, NAME, ON_CPU, Case, Daemon

PROMPT = "The old house stood at the end of the road, and"


class Sdk(Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.client = openai.OpenAI(base_url=cls.d.url + "/v1", api_key="none", max_retries=0)

    def ask(self, **kw):
        kw = dict({"model": NAME, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}, **kw)
        return self.client.completions.create(**kw)

    def joined(self, **kw):
        """Text by choice, and the chunks, of a streamed answer."""
        chunks = list(self.ask(stream=True, **kw))
        texts = {}
        for chunk in chunks:
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
        return texts, chunks

    def test_plain(self):
        c = self.ask()
        self.assertEqual(c.object, "text_completion")
        self.assertTrue(c.id.startswith("cmpl-"))
        self.assertEqual(c.model, NAME)
        self.assertEqual(len(c.choices), 1)
        self.assertTrue(c.choices[0].text)
        self.assertEqual(c.choices[0].finish_reason, "length")
        self.assertIsNone(c.choices[0].logprobs)
        self.assertEqual(c.usage.completion_tokens, 24)
        self.assertEqual(c.usage.total_tokens, c.usage.prompt_tokens + 24)
        self.assertTrue(c._request_id)

    def test_default_max_tokens(self):
        c = self.client.completions.create(model=NAME, prompt=PROMPT,
                                           extra_body={"ignore_eos": True, "max_tokens": None})
        self.assertEqual(c.usage.completion_tokens, 16)

    def test_stream_is_the_same_text(self):
        whole = self.ask(max_tokens=80).choices[0]
        texts, chunks = self.joined(max_tokens=80)
        self.assertEqual(texts[0], whole.text)
        self.assertEqual(len({c.id for c in chunks}), 1)
        self.assertEqual(len({c.created for c in chunks}), 1)
        self.assertTrue(all(len(c.choices) == 1 for c in chunks))
        self.assertEqual([c.choices[0].finish_reason for c in chunks[:-1]],
                         [None] * (len(chunks) - 1))
        self.assertEqual(chunks[-1].choices[0].finish_reason, whole.finish_reason)
        self.assertTrue(all(c.choices[0].text for c in chunks[:-1]), "an empty chunk")

    def test_stream_usage(self):
        _, chunks = self.joined(stream_options={"include_usage": True})
        self.assertEqual(chunks[-1].choices, [])
        self.assertEqual(chunks[-1].usage.completion_tokens, 24)
        self.assertTrue(all(c.usage is None for c in chunks[:-1]))
        _, chunks = self.joined()
        self.assertTrue(all(c.usage is None and c.choices for c in chunks))

    def test_async_client(self):
        import asyncio

        async def run():
            async with openai.AsyncOpenAI(base_url=self.d.url + "/v1", api_key="x",
                                          max_retries=0) as client:
                stream = await client.completions.create(model=NAME, prompt=PROMPT, max_tokens=24,
                                                         temperature=0, stream=True)
                return "".join([c.choices[0].text async for c in stream])
        self.assertEqual(asyncio.run(run()), self.ask().choices[0].text)

    def test_batch(self):
        prompts = [PROMPT, "She looked out of the window", "When the morning came"]
        single = [self.ask(prompt=p) for p in prompts]
        batch = self.ask(prompt=prompts)
        self.assertEqual([c.index for c in batch.choices], [0, 1, 2])
        self.assertEqual([c.text for c in batch.choices], [s.choices[0].text for s in single])
        self.assertEqual(batch.usage.prompt_tokens, sum(s.usage.prompt_tokens for s in single))
        self.assertEqual(batch.usage.completion_tokens, 3 * 24)
        texts, _ = self.joined(prompt=prompts)
        self.assertEqual([texts[i] for i in range(3)], [c.text for c in batch.choices])

    def test_batch_with_n(self):
        c = self.ask(prompt=[PROMPT, "In the year"], n=3, temperature=1, seed=5)
        self.assertEqual([x.index for x in c.choices], list(range(6)))
        self.assertEqual(c.usage.completion_tokens, 6 * 24)
        alone = self.ask(prompt="In the year", n=3, temperature=1, seed=5)
        if ON_CPU:      # a GPU rounds differently in other batches
            self.assertEqual([x.text for x in c.choices[3:]], [x.text for x in alone.choices])
        self.assertEqual(c.usage.prompt_tokens,
                         alone.usage.prompt_tokens + self.ask().usage.prompt_tokens)
        texts, _ = self.joined(prompt=[PROMPT, "In the year"], n=3, temperature=1, seed=5)
        self.assertEqual([texts[i] for i in range(6)], [x.text for x in c.choices])

    def test_token_arrays(self):
        one = self.ask(prompt=[300, 301, 302, 303], echo=True, logprobs=0, max_tokens=4)
        self.assertEqual(one.usage.prompt_tokens, 4)
        self.assertEqual(len(one.choices[0].logprobs.tokens), 8)
        two = self.ask(prompt=[[300, 301, 302, 303], [400, 401]], max_tokens=4)
        self.assertEqual(two.usage.prompt_tokens, 6)
        self.assertTrue(one.choices[0].text.endswith(two.choices[0].text))

    def test_seeds(self):
        a = self.ask(temperature=1, seed=11, n=3)
        b = self.ask(temperature=1, seed=11, n=3)
        self.assertEqual([c.text for c in a.choices], [c.text for c in b.choices])
        self.assertEqual(len({c.text for c in a.choices}), 3)
        self.assertEqual(self.ask(temperature=1, seed=11).choices[0].text, a.choices[0].text)
        self.assertNotEqual(self.ask(temperature=1, seed=12).choices[0].text, a.choices[0].text)
        self.assertNotEqual(self.ask(temperature=1).choices[0].text,
                            self.ask(temperature=1).choices[0].text)

    @unittest.skipUnless(ON_CPU, "a GPU rounds differently in other batches")
    def test_seed_in_a_crowd(self):
        want = self.ask(temperature=1, seed=21, max_tokens=64).choices[0].text
        got = []

        def one():
            got.append(self.ask(temperature=1, seed=21, max_tokens=64).choices[0].text)

        threads = [threading.Thread(target=one) for _ in range(8)]
        threads += [threading.Thread(target=self.ask, kwargs=dict(prompt="x" * 50 * i,
                                                                  temperature=1, max_tokens=30))
                    for i in range(1, 5)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        self.assertEqual(got, [want] * 8)

    def test_best_of(self):
        kw = dict(temperature=1, seed=31, max_tokens=12, extra_body={"ignore_eos": True})
        every = self.ask(n=4, logprobs=0, **kw)
        best = self.ask(n=2, best_of=4, **kw)
        ranked = sorted(every.choices, key=lambda c: -sum(c.logprobs.token_logprobs))
        self.assertEqual([c.text for c in best.choices], [c.text for c in ranked[:2]])
        self.assertEqual([c.index for c in best.choices], [0, 1])
        self.assertEqual(best.usage.completion_tokens, 4 * 12)
        self.assertIsNone(best.choices[0].logprobs)

    def check_logprobs(self, choice, n_top):
        lp = choice.logprobs
        n = len(lp.tokens)
        self.assertEqual((len(lp.token_logprobs), len(lp.top_logprobs), len(lp.text_offset)),
                         (n, n, n))
        for token, offset in zip(lp.tokens, lp.text_offset):
            if not token.startswith("bytes:"):
                self.assertEqual(choice.text[offset:offset + len(token)], token)
        for token, value, top in zip(lp.tokens, lp.token_logprobs, lp.top_logprobs):
            if value is None:
                self.assertIsNone(top)
                continue
            self.assertLessEqual(value, 1e-6)
            self.assertIn(token, top)
            self.assertLessEqual(len(top), n_top + 1)
            self.assertLessEqual(sum(math.exp(v) for v in top.values()), 1.001)
            self.assertLessEqual(value, max(top.values()) + 1e-9)

    def test_logprobs(self):
        for n_top in (0, 1, 5):
            choice = self.ask(logprobs=n_top).choices[0]
            self.assertEqual("".join(choice.logprobs.tokens), choice.text)
            self.check_logprobs(choice, n_top)
            for value, top in zip(choice.logprobs.token_logprobs, choice.logprobs.top_logprobs):
                self.assertEqual(value, max(top.values()))   # greedy

    def test_streamed_logprobs(self):
        for echo in (False, True):
            whole = self.ask(logprobs=3, max_tokens=40, echo=echo).choices[0]
            joined = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
            for chunk in self.ask(logprobs=3, max_tokens=40, echo=echo, stream=True):
                for name in joined:
                    joined[name] += getattr(chunk.choices[0].logprobs, name)
            for name in joined:
                self.assertEqual(joined[name], getattr(whole.logprobs, name), name)

    def test_random_requests_stream_as_they_answer(self):
        """Broken characters, stop strings, echo, several choices: both ways agree."""
        choose = random.Random(5)
        for _ in range(40):
            prompt = choose.choice(("naïve café — “quoted” …", "数学は楽しい 🙂", PROMPT,
                                    [choose.randrange(5000) for _ in range(9)]))
            kw = dict(prompt=prompt, temperature=choose.choice((0, 1, 2)), n=choose.choice((1, 3)),
                      seed=choose.randrange(100), max_tokens=choose.choice((1, 8, 40)),
                      logprobs=choose.choice((0, 3)), echo=choose.random() < 0.4,
                      extra_body={"ignore_eos": choose.random() < 0.5,
                                  "include_stop_str_in_output": choose.random() < 0.3,
                                  "skip_special_tokens": choose.random() < 0.7})
            text = self.ask(**kw).choices[0].text
            at = choose.randrange(max(1, len(text) - 4))
            if choose.random() < 0.7 and text[at:at + 2]:
                kw["stop"] = [text[at:at + choose.choice((1, 2, 4))], "\x01never"]
            whole = self.ask(**kw)
            texts, chunks = self.joined(**kw)
            self.assertEqual(texts, {c.index: c.text for c in whole.choices}, kw)
            for c in whole.choices:
                parts = [k.choices[0] for k in chunks if k.choices[0].index == c.index]
                for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                    joined = sum((getattr(p.logprobs, name) for p in parts), [])
                    self.assertEqual(joined, getattr(c.logprobs, name), kw)
                self.assertEqual((parts[-1].finish_reason, parts[-1].stop_reason),
                                 (c.finish_reason, c.stop_reason))
                for token, offset in zip(c.logprobs.tokens, c.logprobs.text_offset):
                    if not token.startswith(("bytes:", "<|")) and "stop" not in kw:
                        self.assertEqual(c.text[offset:offset + len(token)], token, kw)

    def test_echo(self):
        plain = self.ask().choices[0].text
        self.assertEqual(self.ask(echo=True).choices[0].text, PROMPT + plain)
        texts, chunks = self.joined(echo=True, n=2)
        self.assertEqual(texts, {0: PROMPT + plain, 1: PROMPT + plain})
        self.assertTrue(chunks[0].choices[0].text.startswith(PROMPT))

    def test_scoring(self):
        for max_tokens in (0, 1):
            c = self.ask(echo=True, max_tokens=max_tokens, logprobs=2)
            choice = c.choices[0]
            n = c.usage.prompt_tokens
            self.assertEqual(c.usage.completion_tokens, max_tokens)
            self.assertEqual(len(choice.logprobs.tokens), n + max_tokens)
            self.assertEqual("".join(choice.logprobs.tokens[:n]), PROMPT)
            self.assertIsNone(choice.logprobs.token_logprobs[0])
            self.assertTrue(all(v is not None for v in choice.logprobs.token_logprobs[1:]))
            self.check_logprobs(choice, 2)
        self.assertEqual(self.ask(echo=True, max_tokens=0).choices[0].text, PROMPT)
        texts, chunks = self.joined(echo=True, max_tokens=0)
        self.assertEqual(texts[0], PROMPT)
        self.assertEqual(chunks[-1].choices[0].finish_reason, "length")

    def test_scoring_as_evaluators_do(self):
        ids = [[300 + i for i in range(20)], [500 + i for i in range(35)]]
        c = self.ask(prompt=ids, echo=True, max_tokens=1, logprobs=1, seed=1234)
        for choice, prompt in zip(c.choices, ids):
            self.assertEqual(len(choice.logprobs.token_logprobs), len(prompt) + 1)
            self.check_logprobs(choice, 1)

    def test_scores_agree_with_generation(self):
        lp = self.ask(logprobs=0, max_tokens=20, extra_body={"ignore_eos": True}).choices[0]
        scored = self.ask(prompt=PROMPT + lp.text, echo=True, max_tokens=0, logprobs=0).choices[0]
        if scored.logprobs.tokens[-20:] == lp.logprobs.tokens:
            for a, b in zip(lp.logprobs.token_logprobs, scored.logprobs.token_logprobs[-20:]):
                self.assertAlmostEqual(a, b, delta=0.01 if ON_CPU else 0.2)
        else:
            self.skipTest("the text has another tokenization")

    def test_stop(self):
        text = self.ask(max_tokens=60).choices[0].text
        words = text.split(" ")
        for stop in (words[5], text[20:27], text[30:31]):
            want = text[:text.index(stop)]
            c = self.ask(max_tokens=60, stop=stop).choices[0]
            self.assertEqual((c.text, c.finish_reason), (want, "stop"))
            self.assertEqual(c.stop_reason, stop)
            texts, _ = self.joined(max_tokens=60, stop=["\x01never", stop])
            self.assertEqual(texts[0], want)
            c = self.ask(max_tokens=60, stop=stop,
                         extra_body={"include_stop_str_in_output": True}).choices[0]
            self.assertEqual(c.text, want + stop)
        c = self.ask(max_tokens=60, stop=text[20:27], logprobs=0).choices[0]
        self.assertTrue("".join(c.logprobs.tokens).startswith(c.text))

    def test_unfinished_stop_is_text(self):
        text = self.ask(max_tokens=30).choices[0].text
        texts, _ = self.joined(max_tokens=30, stop=text[-4:] + "\x01")
        self.assertEqual(texts[0], text)

    def test_stop_ids(self):
        force = {"logit_bias": {"500": 100}}
        c = self.ask(extra_body=dict(force, stop_token_ids=[7, 500]))
        self.assertEqual((c.choices[0].text, c.choices[0].finish_reason), ("", "stop"))
        self.assertEqual((c.choices[0].stop_reason, c.usage.completion_tokens), (500, 1))
        c = self.ask(extra_body=dict(force, stop_token_ids=[500], include_stop_str_in_output=True))
        word = c.choices[0].text
        self.assertTrue(word)
        for free in ({"ignore_eos": True}, {"min_tokens": 24}):
            c = self.ask(extra_body=dict(force, stop_token_ids=[500], **free))
            self.assertEqual((c.choices[0].finish_reason, c.usage.completion_tokens), ("length", 24))
            self.assertEqual(c.choices[0].text == word * 24, "ignore_eos" in free)
        texts, chunks = self.joined(extra_body=dict(force, stop_token_ids=[500]))
        self.assertEqual((texts, chunks[-1].choices[0].finish_reason), ({0: ""}, "stop"))

    def test_end_of_text(self):
        eos = json.loads((Path(MODEL) / "config.json").read_text())["eos_token_id"]
        force = {"logit_bias": {str(eos): 100}}
        c = self.ask(extra_body=force)
        self.assertEqual((c.choices[0].text, c.choices[0].finish_reason), ("", "stop"))
        self.assertIsNone(c.choices[0].stop_reason)
        texts, _ = self.joined(extra_body=force)
        self.assertEqual(texts, {0: ""})
        c = self.ask(extra_body=dict(force, min_tokens=5))
        self.assertEqual((c.choices[0].finish_reason, c.usage.completion_tokens), ("stop", 6))
        c = self.ask(extra_body=dict(force, ignore_eos=True), logprobs=0).choices[0]
        self.assertEqual((c.finish_reason, c.text, set(c.logprobs.text_offset)), ("length", "", {0}))
        word = c.logprobs.tokens[0]
        c = self.ask(extra_body=dict(force, ignore_eos=True, skip_special_tokens=False),
                     logprobs=0).choices[0]
        self.assertEqual(c.text, word * 24)
        self.assertEqual(c.logprobs.text_offset, [len(word) * i for i in range(24)])

    def test_sampling(self):
        greedy = self.ask(max_tokens=40).choices[0].text
        for extra in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}):
            c = self.ask(max_tokens=40, temperature=1, seed=1, extra_body=extra)
            self.assertEqual(c.choices[0].text, greedy, extra)
        hot = self.ask(max_tokens=40, temperature=2, seed=1).choices[0].text
        self.assertNotEqual(hot, greedy)
        first = self.ask(max_tokens=1, logprobs=5).choices[0].logprobs.top_logprobs[0]
        seen = set()
        for seed in range(20):
            c = self.ask(max_tokens=1, temperature=2, seed=seed, extra_body={"top_k": 3})
            seen.add(c.choices[0].text)
        self.assertLessEqual(seen, set(sorted(first, key=first.get)[-3:]))
        self.assertGreater(len(seen), 1)

    def test_penalties(self):
        def repeats(**kw):
            tokens = self.ask(max_tokens=60, logprobs=0, **kw).choices[0].logprobs.tokens
            return len(tokens) - len(set(tokens))

        plain = repeats()
        self.assertGreater(plain, 5)
        self.assertLess(repeats(presence_penalty=2, frequency_penalty=2), plain)
        self.assertLess(repeats(extra_body={"repetition_penalty": 10}), plain)
        # Log-probabilities are the model's own, before any of it.
        for extra in ({"logit_bias": {"500": 100}}, {"repetition_penalty": 9}):
            a = self.ask(logprobs=5, max_tokens=1).choices[0].logprobs.top_logprobs[0]
            b = self.ask(logprobs=5, max_tokens=1, extra_body=extra).choices[0].logprobs
            for token, value in a.items():
                self.assertAlmostEqual(b.top_logprobs[0][token], value, delta=1e-4)

    def test_unicode(self):
        for prompt in ("naïve café — “quoted” …", "数学は楽しい 🙂", "\u2028 line \u2029"):
            c = self.ask(prompt=prompt, echo=True, temperature=2, seed=3, max_tokens=40)
            self.assertTrue(c.choices[0].text.startswith(prompt))
            texts, _ = self.joined(prompt=prompt, echo=True, temperature=2, seed=3, max_tokens=40)
            self.assertEqual(texts[0], c.choices[0].text)

    def test_full_attention(self):
        a = self.ask(max_tokens=32).choices[0].text
        b = self.ask(max_tokens=32, extra_body={"attention": "full"}).choices[0].text
        self.assertEqual(a, b)      # short contexts are dense anyway

    def test_cached_tokens(self):
        prompt = "A prompt of many words that fills more than one block of the cache. " * 12
        self.ask(prompt=prompt, max_tokens=1)
        again = self.ask(prompt=prompt, max_tokens=1)
        cached = again.usage.prompt_tokens_details.cached_tokens
        self.assertGreaterEqual(cached, 64)
        self.assertLess(cached, again.usage.prompt_tokens)

    def test_errors(self):
        def bad(want, **kw):
            with self.assertRaises(want) as caught:
                self.ask(**kw)
            return caught.exception

        e = bad(openai.BadRequestError, temperature=5)
        self.assertEqual(e.param, "temperature")
        self.assertEqual(e.type, "invalid_request_error")
        self.assertTrue(e.request_id)
        bad(openai.BadRequestError, extra_body={"max_tokens": "many"})
        bad(openai.BadRequestError, stream=True, n=0)
        bad(openai.BadRequestError, stream_options={"include_usage": True})
        bad(openai.BadRequestError, prompt=[10 ** 9])
        bad(openai.BadRequestError, prompt=[])
        bad(openai.BadRequestError, stream=True, n=1, best_of=2)
        e = bad(openai.NotFoundError, model="gpt-nonsense")
        self.assertEqual(e.code, "model_not_found")
        limit = self.client.models.retrieve(NAME).max_model_len
        for stream in (False, True):
            e = bad(openai.BadRequestError, prompt=[300] * 10, max_tokens=limit, stream=stream)
            self.assertEqual(e.code, "context_length_exceeded")
            self.assertRegex(e.message, rf"maximum context length is {limit} tokens.*requested "
                             rf"{limit + 10} tokens \(10 in the prompt, {limit} in the completion")

    def test_models(self):
        models = list(self.client.models.list())
        self.assertEqual(models[0].id, NAME)
        one = self.client.models.retrieve(NAME)
        self.assertEqual(one.object, "model")
        with self.assertRaises(openai.NotFoundError):
            self.client.models.retrieve("other")

    def test_break_out_of_a_stream(self):
        stream = self.ask(stream=True, max_tokens=20000, extra_body={"ignore_eos": True})
        for i, _ in enumerate(stream):
            if i == 3:
                break
        stream.close()
        self.d.wait_idle()


class Keys(unittest.TestCase):
    def test_keys(self):
        with Daemon(api_key="alpha,beta", served_model_name="org/name,short") as d:
            def client(key):
                return openai.OpenAI(base_url=d.url + "/v1", api_key=key, max_retries=0)

            for key in ("alpha", "beta"):
                c = client(key).completions.create(model="short", prompt="x", max_tokens=1)
                self.assertEqual(len(c.choices), 1)
            for key in ("alph", "alphaa", "gamma", "Alpha"):
                with self.assertRaises(openai.AuthenticationError) as caught:
                    client(key).completions.create(model="short", prompt="x", max_tokens=1)
                self.assertEqual(caught.exception.code, "invalid_api_key")
            self.assertEqual(client("alpha").models.retrieve("org/name").id, "org/name")
            for path, want in (("/v1/models", 401), ("/metrics", 401), ("/version", 401),
                               ("/nothing", 401), ("/health", 200), ("/ready", 200)):
                self.assertEqual(d.request("GET", path)[0], want, path)
            key = {"Authorization": "bearer  beta"}
            self.assertEqual(d.request("GET", "/metrics", headers=key)[0], 200)
            self.assertEqual(d.request("GET", "/nothing", headers=key)[0], 404)
            self.assertNotIn("alpha", d.log_text())

    def test_public_metrics(self):
        with Daemon(api_key="alpha", metrics_public="yes") as d:
            self.assertTrue(re.search("num_requests", str(d.metrics())))
            self.assertEqual(d.request("GET", "/version")[0], 401)


if __name__ == "__main__":
    unittest.main()
