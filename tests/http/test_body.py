"""Bodies of /v1/completions that are not what they should be, and every limit on them."""
import json
import unittest

from daemon import NAME, Case

GOOD = {"prompt": "It was", "max_tokens": 2, "temperature": 0}

NOT_JSON = [
    b"", b" ", b"{", b"}", b"[", b"nul", b"{}x", b"{}{}", b'{"prompt"}', b'{"prompt":}',
    b'{"prompt":"x",}', b"{'prompt':'x'}", b'{prompt:"x"}', b'{"prompt":"x" "n":1}',
    b'\xef\xbb\xbf{"prompt":"x"}', b'{"prompt":"\xff\xfe"}', b'{"prompt":"\xc0\x80"}',
    b'{"prompt":"\xed\xa0\x80"}', b'{"prompt":"\x01"}', b'{"prompt":"a\x00b"}', b'\x00',
    b'{"prompt":"a\\u0000b"}', b'{"prompt":"\\ud800"}', b'{"prompt":"\\udc00\\ud800"}',
    b'{"prompt":"\\x41"}', b'{"prompt":"\\u12g4"}', b'{"prompt":"unfinished',
    b'{"temperature":NaN}', b'{"temperature":Infinity}', b'{"temperature":-Infinity}',
    b'{"n":01}', b'{"n":+1}', b'{"n":1.}', b'{"n":.5}', b'{"n":1e}', b'{"n":0x10}',
    b'{"temperature":012}',
    b'{"n":1' + b"0" * 5000 + b"}", b"[" * 100000, b'{"a":' * 5000, b"[" * 500 + b"]" * 500,
    b'{"prompt":[' + b"1," * 1100000 + b"1]}", b"prompt=x&max_tokens=2",
    b"<xml/>", b"{" + b",".join(b'"k%d":1' % i for i in range(1000)) + b"}",
]

# param, changed fields
WRONG = [
    ("prompt", {"prompt": None}), ("prompt", {"prompt": 5}), ("prompt", {"prompt": {}}),
    ("prompt", {"prompt": True}), ("prompt", {"prompt": ""}), ("prompt", {"prompt": []}),
    ("prompt", {"prompt": [""]}), ("prompt", {"prompt": [[]]}), ("prompt", {"prompt": ["a", 1]}),
    ("prompt", {"prompt": [1, "a"]}), ("prompt", {"prompt": [[1], 2]}),
    ("prompt", {"prompt": [1, [2]]}), ("prompt", {"prompt": [[["a"]]]}),
    ("prompt", {"prompt": [1.5]}), ("prompt", {"prompt": [-1]}), ("prompt", {"prompt": [1 << 40]}),
    ("prompt", {"prompt": [10 ** 30]}), ("prompt", {"prompt": [1e300]}),
    ("prompt", {"prompt": ["a"] * 129}), ("prompt", {"prompt": [None]}),
    ("max_tokens", {"max_tokens": -1}), ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": 1.5}), ("max_tokens", {"max_tokens": "5"}),
    ("max_tokens", {"max_tokens": 10 ** 25}), ("max_tokens", {"max_tokens": True}),
    ("min_tokens", {"min_tokens": 3}), ("min_tokens", {"min_tokens": -3}),
    ("n", {"n": 0}), ("n", {"n": 129}), ("n", {"n": -1}), ("n", {"n": "1"}), ("n", {"n": [1]}),
    ("best_of", {"n": 3, "best_of": 2}), ("best_of", {"best_of": 129}), ("best_of", {"best_of": 0}),
    ("best_of", {"best_of": 2, "stream": True}),
    ("n", {"n": 65, "prompt": ["a", "b"]}), ("best_of", {"best_of": 100, "prompt": ["a", "b"]}),
    ("temperature", {"temperature": -0.1}), ("temperature", {"temperature": 2.01}),
    ("temperature", {"temperature": "1"}), ("temperature", {"temperature": [1]}),
    ("top_p", {"top_p": 0}), ("top_p", {"top_p": 1.1}),
    ("top_k", {"top_k": -2}), ("top_k", {"top_k": 1.5}), ("top_k", {"top_k": 1 << 40}),
    ("min_p", {"min_p": -0.1}), ("min_p", {"min_p": 1.1}),
    ("presence_penalty", {"presence_penalty": 2.1}),
    ("frequency_penalty", {"frequency_penalty": -2.1}),
    ("repetition_penalty", {"repetition_penalty": 0}),
    ("repetition_penalty", {"repetition_penalty": 10.1}),
    ("logit_bias", {"logit_bias": []}), ("logit_bias", {"logit_bias": {"x": 1}}),
    ("logit_bias", {"logit_bias": {"999999": 1}}), ("logit_bias", {"logit_bias": {"-1": 1}}),
    ("logit_bias", {"logit_bias": {"1": 101}}), ("logit_bias", {"logit_bias": {"1": "5"}}),
    ("logit_bias", {"logit_bias": {str(i): 1 for i in range(1025)}}),
    ("seed", {"seed": 1.5}), ("seed", {"seed": "1"}), ("seed", {"seed": 1 << 64}),
    ("stop", {"stop": ""}), ("stop", {"stop": 5}), ("stop", {"stop": ["a", ""]}),
    ("stop", {"stop": ["a", 5]}), ("stop", {"stop": [["a"]]}), ("stop", {"stop": ["x"] * 17}),
    ("stop", {"stop": "x" * 1025}), ("stop_token_ids", {"stop_token_ids": [1 << 31]}),
    ("stop_token_ids", {"stop_token_ids": 5}), ("stop_token_ids", {"stop_token_ids": [1.5]}),
    ("logprobs", {"logprobs": -1}), ("logprobs", {"logprobs": 21}), ("logprobs", {"logprobs": True}),
    ("logprobs", {"logprobs": "5"}),
    ("logprobs", {"logprobs": 20, "n": 128, "max_tokens": 2000}),
    ("echo", {"echo": 1}), ("echo", {"echo": "yes"}), ("stream", {"stream": "true"}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
    ("stream_options", {"stream": True, "stream_options": 5}),
    ("stream_options", {"stream": True, "stream_options": {"other": True}}),
    ("stream_options.include_usage", {"stream": True, "stream_options": {"include_usage": 1}}),
    ("ignore_eos", {"ignore_eos": 0}), ("skip_special_tokens", {"skip_special_tokens": "no"}),
    ("attention", {"attention": "dense"}), ("attention", {"attention": True}),
    ("cache_salt", {"cache_salt": ""}), ("cache_salt", {"cache_salt": 7}),
    ("user", {"user": 5}), ("model", {"model": 5}), ("model", {"model": ["x"]}),
    ("Prompt", {"Prompt": "x"}), ("max_token", {"max_token": 5}), ("x" * 60, {"x" * 5000: 1}),
    ("suffix", {"suffix": "end"}), ("messages", {"messages": []}), ("tools", {"tools": [1]}),
    ("guided_grammar", {"guided_grammar": "x"}), ("response_format", {"response_format": {"type": "x"}}),
    ("truncate_prompt_tokens", {"truncate_prompt_tokens": 5}),
]

NULLS = ("model", "top_p", "top_k", "min_p", "presence_penalty", "n", "best_of",
         "frequency_penalty", "repetition_penalty", "logit_bias", "seed", "stop", "stop_token_ids",
         "logprobs", "echo", "stream", "stream_options", "min_tokens", "ignore_eos", "attention",
         "include_stop_str_in_output", "skip_special_tokens", "add_special_tokens", "cache_salt",
         "user", "suffix", "tools", "response_format")


class Body(Case):
    def post(self, body, **headers):
        return self.d.request("POST", "/v1/completions", body, headers)

    def test_what_is_not_json(self):
        for body in NOT_JSON:
            with self.subTest(body[:60]):
                status, headers, answer = self.post(body)
                error = self.assert_error(status, answer, 400, kind="invalid_request_error")
                self.assertEqual(headers["Content-Type"], "application/json")
                self.assertTrue(headers["x-request-id"])
                self.assertLess(len(error["message"]), 400)
        for body in (b"[]", b"5", b'"text"', b"null", b"true"):
            with self.subTest(body):
                self.assert_error(*self.post(body)[::2], 400)

    def test_duplicate_keys(self):
        for body in (b'{"prompt":"a","prompt":"b"}', b'{"prompt":"a","n":1,"n":1}',
                     b'{"prompt":"a","\\u0070rompt":"b"}'):
            error = self.assert_error(*self.post(body)[::2], 400)
            self.assertIn("twice", error["message"])

    def test_wrong_fields(self):
        for param, change in WRONG:
            with self.subTest(str(change)[:80]):
                error = self.assert_error(*self.post(dict(GOOD, **change))[::2], 400,
                                          kind="invalid_request_error")
                self.assertEqual(error["param"], param)
                self.assertRegex(error["message"], param.split(".")[0] + "|the limit is 128")

    def test_numbers_beyond_every_type(self):
        for param, value in (("temperature", b"1e400"), ("temperature", b"-1e400"),
                             ("seed", b"1e400"), ("max_tokens", b"1e400"),
                             ("logit_bias", b'{"1":1e400}'), ("stop_token_ids", b"[1e400]")):
            with self.subTest(param):
                body = b'{"prompt":"x","%s":%s}' % (param.encode(), value)
                error = self.assert_error(*self.post(body)[::2], 400)
                self.assertEqual(error["param"], param)

    def test_harmless_fields(self):
        want = self.d.complete(**GOOD)["choices"][0]["text"]
        cases = [{name: None for name in NULLS}, {"user": "me"}, {"metadata": {"a": "b"}},
                 {"tools": []}, {"response_format": {"type": "text"}}, {"store": False},
                 {"model": NAME}, {"logit_bias": {}}, {"stop": []}, {"top_k": -1}, {"top_k": 0},
                 {"seed": -(1 << 63)}, {"seed": (1 << 63) - 1}, {"seed": 9007199254740993},
                 {"temperature": 0.0}, {"temperature": 0e5}]
        for change in cases:
            with self.subTest(str(change)[:60]):
                answer = self.d.complete(**dict(GOOD, **change))
                self.assertEqual(answer["choices"][0]["text"], want)

    def test_unknown_model(self):
        for name in ("other", "", NAME.upper(), NAME + " "):
            error = self.assert_error(*self.post(dict(GOOD, model=name))[::2], 404,
                                      code="model_not_found", kind="not_found_error")
            self.assertEqual(error["param"], "model")

    def test_lengths(self):
        limit = self.d.complete(**GOOD) and json.loads(
            self.d.request("GET", "/v1/models")[2])["data"][0]["max_model_len"]
        for n, m in ((1, limit), (limit, 1), (limit + 1, 1), (2, limit - 1), (limit * 2, 5)):
            for stream in (False, True):
                error = self.assert_error(
                    *self.post({"prompt": [300] * n, "max_tokens": m, "stream": stream})[::2], 400,
                    code="context_length_exceeded")
                self.assertEqual(error["message"],
                                 f"This model's maximum context length is {limit} tokens. However, "
                                 f"you requested {n + m} tokens ({n} in the prompt, {m} in the "
                                 "completion).")
        error = self.assert_error(*self.post({"prompt": "word and " * 200000})[::2], 400,
                                  code="context_length_exceeded")
        self.assertIn("at least", error["message"])

    def test_text_is_not_echoed_raw(self):
        """What a client sends comes back in errors only cut short and as valid JSON."""
        for name in ("\u2028x", '"quoted"', "<script>", "naïve\n"):
            status, _, answer = self.post({**GOOD, name: 1})
            self.assertEqual(self.assert_error(status, answer, 400)["param"], name)


class Limits(Case):
    options = {"max_body_bytes": "4kb", "max_bodies_bytes": "16kb", "max_choices": "4",
               "max_prompts": "3", "max_stops": "2", "max_stop_bytes": "8", "max_logit_bias": "2",
               "max_logprobs": "3", "max_logprob_entries": "40", "max_json_values": "100",
               "max_request_bytes": "64kb", "max_model_len": "300", "served_model_name": "a/b,c"}

    def test_limits(self):
        fits = [{"n": 4}, {"prompt": ["a", "b", "c"]}, {"stop": ["a" * 8, "b"]},
                {"logit_bias": {"1": 1, "2": 2}}, {"logprobs": 3}, {"model": "a/b"}, {"model": "c"},
                {"prompt": [5] * 90}, {"user": "x" * 3900}, {"prompt": [[5]] * 3},
                {"max_tokens": 290, "ignore_eos": True}]
        over = [("n", {"n": 5}), ("prompt", {"prompt": ["a"] * 4}), ("stop", {"stop": ["a"] * 3}),
                ("stop", {"stop": "a" * 9}), ("logit_bias", {"logit_bias": {"1": 1, "2": 2, "3": 3}}),
                ("logprobs", {"logprobs": 4}), ("logprobs", {"logprobs": 3, "max_tokens": 11}),
                ("logprobs", {"logprobs": 0, "n": 4, "max_tokens": 11}),
                (None, {"prompt": [5] * 100}), ("max_tokens", {"max_tokens": 299, "prompt": [5, 5]})]
        for change in fits:
            with self.subTest(str(change)[:50]):
                self.d.complete(**dict(GOOD, **change))
        for param, change in over:
            with self.subTest(str(change)[:50]):
                status, _, answer = self.d.request("POST", "/v1/completions", dict(GOOD, **change))
                self.assertEqual(self.assert_error(status, answer, 400)["param"], param)
        status, _, answer = self.d.request("POST", "/v1/completions", dict(GOOD, user="x" * 4096))
        self.assert_error(status, answer, 413)
        models = json.loads(self.d.request("GET", "/v1/models")[2])["data"]
        self.assertEqual([(m["id"], m["root"], m["max_model_len"]) for m in models],
                         [("a/b", "a/b", 300), ("c", "a/b", 300)])
        for path in ("/v1/models/a/b", "/v1/models/a%2Fb"):
            self.assertEqual(json.loads(self.d.request("GET", path)[2])["id"], "a/b")
        self.assertEqual(self.d.complete(**GOOD)["model"], "a/b")


if __name__ == "__main__":
    unittest.main()
