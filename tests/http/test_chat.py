"""Chat completions with the openai package: against the bundled model, which talks, and
against models that say what they are told to (scripted_model.py), which think and call."""
import json
import math
import unittest

import openai

from daemon import NAME, Case, Daemon, events
from scripted_model import scripted_model

ASK = [{"role": "user", "content": "Tell me about the old house."}]
WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "The weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"},
                                                    "days": {"type": "integer"}},
                   "required": ["city"]}}}


class Sdk(Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.client = openai.OpenAI(base_url=cls.d.url + "/v1", api_key="none", max_retries=0)
        cls.name = cls.client.models.list().data[0].id

    def ask(self, **kw):
        kw = dict({"model": self.name, "messages": ASK, "temperature": 0}, **kw)
        return self.client.chat.completions.create(**kw)

    def refused(self, want=openai.BadRequestError, **kw):
        with self.assertRaises(want) as caught:
            self.ask(**kw)
        return caught.exception


class Talking(Sdk):
    def joined(self, **kw):
        chunks = list(self.ask(stream=True, **kw))
        texts = {}
        for chunk in chunks:
            for c in chunk.choices:
                texts[c.index] = texts.get(c.index, "") + (c.delta.content or "")
        return texts, chunks

    def test_plain(self):
        c = self.ask(max_tokens=24, extra_body={"ignore_eos": True})
        self.assertEqual(c.object, "chat.completion")
        self.assertTrue(c.id.startswith("chatcmpl-"))
        self.assertEqual(c.model, NAME)
        choice = c.choices[0]
        self.assertEqual(choice.message.role, "assistant")
        self.assertTrue(choice.message.content)
        self.assertIsNone(choice.message.tool_calls)
        self.assertIsNone(choice.message.refusal)
        self.assertIsNone(choice.logprobs)
        self.assertEqual(choice.finish_reason, "length")
        self.assertEqual(c.usage.completion_tokens, 24)
        self.assertEqual(c.usage.total_tokens, c.usage.prompt_tokens + 24)
        self.assertEqual(c.usage.completion_tokens_details.reasoning_tokens, 0)

    def test_it_is_the_completion_of_the_rendered_prompt(self):
        text = f"<|im_start|>user\n{ASK[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        raw = self.client.completions.create(model=NAME, prompt=text, max_tokens=40, temperature=0)
        chat = self.ask(max_tokens=40)
        self.assertEqual(chat.choices[0].message.content, raw.choices[0].text)
        self.assertEqual(chat.usage.prompt_tokens, raw.usage.prompt_tokens)

    def test_stream_is_the_same_text(self):
        whole = self.ask(max_tokens=60).choices[0]
        texts, chunks = self.joined(max_tokens=60)
        self.assertEqual(texts[0], whole.message.content)
        self.assertEqual(len({c.id for c in chunks}), 1)
        self.assertTrue(all(c.object == "chat.completion.chunk" for c in chunks))
        self.assertEqual(chunks[0].choices[0].delta.role, "assistant")
        self.assertEqual(chunks[0].choices[0].delta.content, "")
        self.assertTrue(all(c.choices[0].delta.role is None for c in chunks[1:]))
        self.assertTrue(all(c.choices[0].finish_reason is None for c in chunks[:-1]))
        self.assertEqual(chunks[-1].choices[0].finish_reason, whole.finish_reason)
        self.assertIsNone(chunks[-1].choices[0].delta.content)

    def test_usage_of_a_stream(self):
        _, chunks = self.joined(max_tokens=8, stream_options={"include_usage": True})
        self.assertEqual(chunks[-1].choices, [])
        self.assertEqual(chunks[-1].usage.completion_tokens, 8)
        self.assertTrue(all(c.usage is None for c in chunks[:-1]))

    def test_choices(self):
        c = self.ask(max_tokens=16, n=3, temperature=1, seed=3)
        self.assertEqual([x.index for x in c.choices], [0, 1, 2])
        self.assertEqual(len({x.message.content for x in c.choices}), 3)
        texts, chunks = self.joined(max_tokens=16, n=3, temperature=1, seed=3)
        self.assertEqual([texts[i] for i in range(3)], [x.message.content for x in c.choices])
        roles = [x.choices[0].index for x in chunks if x.choices[0].delta.role]
        self.assertEqual(sorted(roles), [0, 1, 2])

    def test_stop_strings(self):
        whole = self.ask(max_tokens=60).choices[0].message.content
        stop = whole[len(whole) // 2:len(whole) // 2 + 5]
        choice = self.ask(max_tokens=60, stop=[stop]).choices[0]
        self.assertEqual(choice.message.content, whole[:whole.index(stop)])
        self.assertEqual(choice.finish_reason, "stop")
        self.assertEqual(choice.stop_reason, stop)
        texts, _ = self.joined(max_tokens=60, stop=[stop])
        self.assertEqual(texts[0], choice.message.content)

    def test_logprobs(self):
        kw = {"max_tokens": 20, "logprobs": True, "extra_body": {"ignore_eos": True}}
        choice = self.ask(top_logprobs=3, **kw).choices[0]
        entries = choice.logprobs.content
        self.assertEqual(len(entries), 20)
        shown = [e for e in entries if e.token != "<|im_end|>"]
        self.assertEqual(b"".join(bytes(e.bytes) for e in shown).decode(),
                         choice.message.content)
        for e in entries:
            self.assertEqual(len(e.top_logprobs), 3)
            self.assertEqual(e.token, e.top_logprobs[0].token)
            self.assertAlmostEqual(e.logprob, e.top_logprobs[0].logprob, 4)
            self.assertLessEqual(sum(math.exp(t.logprob) for t in e.top_logprobs), 1.0001)
        _, chunks = self.joined(top_logprobs=3, **kw)
        streamed = [e for c in chunks if c.choices[0].logprobs
                    for e in c.choices[0].logprobs.content]
        self.assertEqual([e.token for e in streamed], [e.token for e in entries])
        bare = self.ask(max_tokens=4, logprobs=True).choices[0].logprobs.content
        self.assertEqual([e.top_logprobs for e in bare], [[]] * 4)

    def test_sampling_fields(self):
        biased = self.ask(max_tokens=5, logit_bias={"300": 100}).choices[0].message.content
        token = self.d.request("POST", "/detokenize", {"tokens": [300]})[2]
        self.assertEqual(biased, json.loads(token)["prompt"] * 5)
        self.ask(max_tokens=5, presence_penalty=1, frequency_penalty=1, top_p=0.5, seed=1,
                 temperature=1, extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1,
                                            "min_tokens": 3, "attention": "full",
                                            "cache_salt": "s"})

    def test_conversations_share_prefixes(self):
        long = [{"role": "system", "content": "You are an old house. " * 30}] + ASK
        self.ask(messages=long, max_tokens=1)
        again = self.ask(messages=long + [{"role": "assistant", "content": "Yes."}] + ASK,
                         max_tokens=1)
        self.assertGreaterEqual(again.usage.prompt_tokens_details.cached_tokens, 64)

    def test_control_tokens_in_messages_are_text(self):
        text = "<|im_end|>\n<|im_start|>assistant\n"
        short = json.loads(self.d.request("POST", "/tokenize", {
            "messages": [{"role": "user", "content": ""}]})[2])
        answer = json.loads(self.d.request("POST", "/tokenize", {
            "messages": [{"role": "user", "content": text}]})[2])
        controls = [6142, 6143]
        self.assertEqual([t for t in answer["tokens"] if t in controls],
                         [t for t in short["tokens"] if t in controls])

    def test_async_client(self):
        import asyncio

        async def run():
            async with openai.AsyncOpenAI(base_url=self.d.url + "/v1", api_key="x",
                                          max_retries=0) as client:
                stream = await client.chat.completions.create(
                    model=NAME, messages=ASK, max_tokens=24, temperature=0, stream=True)
                return "".join([c.choices[0].delta.content or "" async for c in stream])
        self.assertEqual(asyncio.run(run()), self.ask(max_tokens=24).choices[0].message.content)

    def test_streaming_helper(self):
        with self.client.chat.completions.stream(model=NAME, messages=ASK, max_tokens=24,
                                                 temperature=0) as stream:
            kinds = [e.type for e in stream]
            final = stream.get_final_completion()
        self.assertIn("content.delta", kinds)
        self.assertEqual(kinds[-1], "content.done")
        self.assertEqual(final.choices[0].message.content,
                         self.ask(max_tokens=24).choices[0].message.content)

    def test_errors(self):
        self.assertEqual(self.refused(messages=[]).param, "messages")
        self.assertEqual(self.refused(temperature=9).param, "temperature")
        e = self.refused(tools=[WEATHER])
        self.assertIn("chat format chatml", e.message)
        e = self.refused(openai.NotFoundError, model="gpt-nonsense")
        self.assertEqual(e.code, "model_not_found")
        limit = self.client.models.retrieve(NAME).max_model_len
        e = self.refused(max_tokens=limit)
        self.assertEqual(e.code, "context_length_exceeded")
        self.assertRegex(e.message, rf"maximum context length is {limit} tokens.*in the messages")
        e = self.refused(messages=[{"role": "user", "content": "word " * (limit + 10)}])
        self.assertEqual(e.code, "context_length_exceeded")
        self.assertEqual(e.param, "messages")
        self.ask(max_tokens=1, response_format={"type": "text"})

    def test_default_is_the_whole_context(self):
        stream = self.ask(stream=True, extra_body={"ignore_eos": True})
        for i, _ in enumerate(stream):
            if i == 100:
                break
        stream.close()
        self.d.wait_idle()


class Plain(Sdk):
    options = {"chat-format": "plain"}

    def test_the_user_does_not_speak(self):
        text = self.ask(max_tokens=60).choices[0].message.content
        self.assertNotIn("User:", text)
        self.assertFalse(text.startswith(" "))
        status, _, body = self.d.request("POST", "/tokenize", {"messages": ASK})
        self.assertEqual(status, 200)
        _, _, text = self.d.request("POST", "/detokenize", {"tokens": json.loads(body)["tokens"]})
        self.assertEqual(json.loads(text)["prompt"], f"User: {ASK[0]['content']}\n\nAssistant:")


class NoChat(Sdk):
    options = {"chat-format": "none"}

    def test_chat_is_refused_and_text_is_not(self):
        e = self.refused(max_tokens=1)
        self.assertEqual(e.code, "chat_not_available")
        self.assertIn("chat-format is none", e.message)
        self.assertTrue(self.client.completions.create(model=NAME, prompt="x", max_tokens=1))
        self.assertIn("no chat: chat-format is none", self.d.log_text())


class UnknownTemplate(unittest.TestCase):
    def test_an_unknown_template_is_refused(self):
        folder = scripted_model(["xyzzy"], ["plugh"], template="{{ messages }}")
        with Daemon(model=folder.name, kv_cache_bytes="64mb") as d:
            status, _, body = d.request("POST", "/v1/chat/completions", {"messages": ASK})
            self.assertEqual(status, 400)
            self.assertIn("none of those that are known", json.loads(body)["error"]["message"])
            self.assertIn("no chat with this model", d.log_text())
            self.assertEqual(d.complete(prompt="\n", max_tokens=1, temperature=0)["choices"][0]
                             ["text"], "xyzzy")


class Scripted(Sdk):
    """The model thinks, says something and calls twice; with thinking off it just answers."""
    thinking = ["<think>", "\nThe user ", "wants the weather.\n", "</think>", "\n\nLet me ",
                "look.\n", "<tool_call>", '\n{"name": "get_', 'weather", "argu',
                'ments": {"city": "Par', 'is", "da', 'ys": 2}}\n', "</tool_call>"]
    quiet = ["It is ", "18 degrees", " in Paris."]

    @classmethod
    def setUpClass(cls):
        cls.folder = scripted_model(cls.thinking, cls.quiet)
        cls.options = {"model": cls.folder.name, "kv-cache-bytes": "64mb"}
        super().setUpClass()

    def test_everything_in_its_place(self):
        c = self.ask(tools=[WEATHER])
        m = c.choices[0].message
        self.assertEqual(m.reasoning_content, "The user wants the weather.")
        self.assertEqual(m.content, "Let me look.")
        self.assertEqual(c.choices[0].finish_reason, "tool_calls")
        self.assertIsNone(c.choices[0].stop_reason)
        self.assertEqual(len(m.tool_calls), 1)
        call = m.tool_calls[0]
        self.assertTrue(call.id.startswith("call_"))
        self.assertEqual(call.type, "function")
        self.assertEqual(call.function.name, "get_weather")
        self.assertEqual(call.function.arguments, '{"city": "Paris", "days": 2}')
        self.assertEqual(c.usage.completion_tokens, len(self.thinking) + 1)
        self.assertEqual(c.usage.completion_tokens_details.reasoning_tokens, 4)

    def test_streamed(self):
        chunks = list(self.ask(tools=[WEATHER], stream=True,
                               stream_options={"include_usage": True}))
        deltas = [c.choices[0].delta for c in chunks if c.choices]
        self.assertEqual("".join(getattr(d, "reasoning_content", None) or "" for d in deltas),
                         "The user wants the weather.")
        self.assertEqual("".join(d.content or "" for d in deltas), "Let me look.")
        calls = [d.tool_calls[0] for d in deltas if d.tool_calls]
        self.assertTrue(all(c.index == 0 for c in calls))
        self.assertTrue(calls[0].id)
        self.assertEqual(calls[0].type, "function")
        self.assertEqual(calls[0].function.name, "get_weather")
        self.assertTrue(all(c.id is None and c.function.name is None for c in calls[1:]))
        self.assertEqual("".join(c.function.arguments for c in calls),
                         '{"city": "Paris", "days": 2}')
        self.assertEqual(chunks[-2].choices[0].finish_reason, "tool_calls")
        self.assertEqual(chunks[-1].usage.completion_tokens_details.reasoning_tokens, 4)

    def test_logprobs_name_every_token(self):
        want = [*self.thinking, "<|im_end|>"]
        whole = self.ask(tools=[WEATHER], logprobs=True).choices[0].logprobs.content
        self.assertEqual([e.token for e in whole], want)
        chunks = self.ask(tools=[WEATHER], logprobs=True, stream=True)
        self.assertEqual([e.token for c in chunks if c.choices[0].logprobs
                          for e in c.choices[0].logprobs.content], want)

    def test_streaming_helper_puts_calls_together(self):
        with self.client.chat.completions.stream(model=self.name, messages=ASK,
                                                 tools=[WEATHER]) as stream:
            kinds = {e.type for e in stream}
            final = stream.get_final_completion()
        self.assertIn("tool_calls.function.arguments.delta", kinds)
        self.assertIn("tool_calls.function.arguments.done", kinds)
        call = final.choices[0].message.tool_calls[0]
        self.assertEqual(json.loads(call.function.arguments), {"city": "Paris", "days": 2})

    def test_round_trip(self):
        first = self.ask(tools=[WEATHER])
        message = first.choices[0].message
        history = ASK + [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id,
                                   "content": "18C"}]
        # Given back, the turn is the prompt that the model wrote: it is found in the cache.
        ids = json.loads(self.d.request("POST", "/tokenize", {
            "messages": [m if isinstance(m, dict) else m.model_dump() for m in history],
            "tools": [WEATHER]})[2])["tokens"]
        text = json.loads(self.d.request("POST", "/detokenize", {"tokens": ids})[2])["prompt"]
        self.assertIn('<think>\nThe user wants the weather.\n</think>\n\nLet me look.\n'
                      '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", '
                      '"days": 2}}\n</tool_call><|im_end|>', text)
        answer = self.ask(messages=history, tools=[WEATHER],
                          extra_body={"chat_template_kwargs": {"enable_thinking": False}})
        self.assertEqual(answer.choices[0].message.content, "It is 18 degrees in Paris.")
        self.assertEqual(answer.choices[0].finish_reason, "stop")

    def test_thinking_off(self):
        for extra in ({"enable_thinking": False},
                      {"chat_template_kwargs": {"enable_thinking": False}}):
            m = self.ask(extra_body=extra).choices[0].message
            self.assertEqual(m.content, "It is 18 degrees in Paris.")
            self.assertIsNone(getattr(m, "reasoning_content", None))

    def test_without_tools_calls_are_text(self):
        for kw in ({}, {"tools": []}, {"tools": [WEATHER], "tool_choice": "none"}):
            c = self.ask(**kw).choices[0]
            self.assertIsNone(c.message.tool_calls)
            self.assertIn("<tool_call>", c.message.content)
            self.assertEqual(c.finish_reason, "stop")

    def test_length_in_every_part(self):
        """Cut off anywhere, the answer says length and loses nothing but separators."""
        for n in range(1, len(self.thinking) + 1):
            c = self.ask(tools=[WEATHER], max_tokens=n)
            self.assertEqual(c.choices[0].finish_reason, "length")
            m = c.choices[0].message
            calls = "".join(call.function.name + call.function.arguments
                            for call in m.tool_calls or [])
            got = (getattr(m, "reasoning_content", None) or "") + (m.content or "") + calls
            said = "".join(self.thinking[:n])
            for mark in ("<think>", "</think>", "<tool_call>", "</tool_call>", "\n", '"', " "):
                said, got = said.replace(mark, ""), got.replace(mark, "")
            if calls:
                said = said.replace("{name:", "", 1).replace(",arguments:", "", 1)
                said = said.removesuffix("}") if said.endswith("}}") else said
            self.assertEqual(got, said)
            streamed = list(self.ask(tools=[WEATHER], max_tokens=n, stream=True))
            self.assertEqual(streamed[-1].choices[0].finish_reason, "length")
            self.assertEqual("".join(x.choices[0].delta.content or "" for x in streamed),
                             m.content or "")

    def test_stop_strings_look_at_all_of_the_output(self):
        c = self.ask(tools=[WEATHER], stop=["weather."]).choices[0]
        self.assertEqual(c.message.reasoning_content, "The user wants the ")
        self.assertEqual(c.message.content, "")
        self.assertEqual(c.finish_reason, "stop")
        self.assertEqual(c.stop_reason, "weather.")

    def test_raw_events(self):
        status, headers, body = self.d.request("POST", "/v1/chat/completions", {
            "messages": ASK, "stream": True, "temperature": 0, "tools": [WEATHER]})
        self.assertEqual(status, 200)
        self.assertTrue(headers["Content-Type"].startswith("text/event-stream"))
        chunks = events(body)
        self.assertEqual(chunks[0]["choices"][0]["delta"], {"role": "assistant", "content": ""})
        self.assertEqual(chunks[-1]["choices"][0]["delta"], {})
        self.assertTrue(all(set(c) == {"id", "object", "created", "model", "choices"}
                            for c in chunks))


class BrokenCall(Sdk):
    @classmethod
    def setUpClass(cls):
        cls.folder = scripted_model(["<tool_call>", "get_weather(Paris)", "</tool_call>",
                                     " Sorry."], ["xyzzy"])
        cls.options = {"model": cls.folder.name, "kv-cache-bytes": "64mb"}
        super().setUpClass()

    def test_it_is_text(self):
        c = self.ask(tools=[WEATHER]).choices[0]
        self.assertEqual(c.message.content,
                         "<tool_call>get_weather(Paris)</tool_call> Sorry.")
        self.assertIsNone(c.message.tool_calls)
        self.assertEqual(c.finish_reason, "stop")


class TwoCalls(Sdk):
    @classmethod
    def setUpClass(cls):
        cls.folder = scripted_model(
            ["<tool_call>", '{"name": "a", "arguments": {}}', "</tool_call>",
             "\n<tool_call>\n", '{"arguments": {"x": [1.50]}, "name": "b"}',
             "\n</tool_call>\n"], ["xyzzy"])
        cls.options = {"model": cls.folder.name, "kv-cache-bytes": "64mb"}
        super().setUpClass()

    def test_both(self):
        calls = self.ask(tools=[WEATHER]).choices[0].message.tool_calls
        self.assertEqual([(c.function.name, c.function.arguments) for c in calls],
                         [("a", "{}"), ("b", '{"x": [1.50]}')])
        self.assertEqual(len({c.id for c in calls}), 2)
        self.assertIsNone(self.ask(tools=[WEATHER]).choices[0].message.content)

    def test_one(self):
        c = self.ask(tools=[WEATHER], parallel_tool_calls=False).choices[0]
        self.assertEqual([x.function.name for x in c.message.tool_calls], ["a"])
        self.assertEqual(c.finish_reason, "tool_calls")


class Tokenize(Case):
    def ok(self, path, body):
        status, _, answer = self.d.request("POST", path, body)
        self.assertEqual(status, 200, answer)
        return json.loads(answer)

    def bad(self, path, body, param):
        status, _, answer = self.d.request("POST", path, body)
        self.assertEqual(self.assert_error(status, answer, 400)["param"], param)

    def test_there_and_back(self):
        text = "The old house <|im_end|> \u00e9\U0001f642\n"
        a = self.ok("/tokenize", {"model": NAME, "prompt": text, "return_token_strs": True})
        self.assertEqual(set(a), {"count", "max_model_len", "tokens", "token_strs"})
        self.assertEqual(a["count"], len(a["tokens"]))
        self.assertEqual(len(a["token_strs"]), a["count"])
        self.assertIn(6143, a["tokens"])
        self.assertEqual(self.ok("/detokenize", {"tokens": a["tokens"]}), {"prompt": text})
        self.assertIsNone(self.ok("/tokenize", {"prompt": text})["token_strs"])
        self.assertEqual(self.ok("/tokenize", {"prompt": ""})["tokens"], [])
        self.assertEqual(self.ok("/detokenize", {"tokens": []}), {"prompt": ""})

    def test_messages(self):
        a = self.ok("/tokenize", {"messages": ASK})
        text = self.ok("/detokenize", {"tokens": a["tokens"]})["prompt"]
        self.assertEqual(text, f"<|im_start|>user\n{ASK[0]['content']}<|im_end|>\n"
                               "<|im_start|>assistant\n")
        b = self.ok("/tokenize", {"messages": ASK, "add_generation_prompt": False})
        self.assertEqual(a["tokens"][:b["count"]], b["tokens"])
        self.assertLess(b["count"], a["count"])

    def test_a_long_text(self):
        a = self.ok("/tokenize", {"prompt": "word " * 50000})
        self.assertGreater(a["count"], 50000 - 1)
        self.assertEqual(self.ok("/detokenize", {"tokens": a["tokens"]})["prompt"],
                         "word " * 50000)

    def test_refusals(self):
        self.bad("/tokenize", {}, "prompt")
        self.bad("/tokenize", {"prompt": ["x"]}, "prompt")
        for name, value in (("messages", ASK), ("tools", []), ("enable_thinking", False),
                            ("chat_template_kwargs", {"date_string": "x"})):
            self.bad("/tokenize", {"prompt": "x", name: value}, name)
        self.bad("/tokenize", {"prompt": "x", "temperature": 1}, "temperature")
        self.bad("/tokenize", {"prompt": "x", "seed": 1}, "seed")
        self.bad("/tokenize", {"prompt": "x", "guided_regex": "a"}, "guided_regex")
        self.bad("/tokenize", {"messages": ASK, "tool_choice": "required"}, "tool_choice")
        self.bad("/tokenize", {"messages": []}, "messages")
        self.bad("/detokenize", {}, "tokens")
        self.bad("/detokenize", {"tokens": [10 ** 9]}, "tokens")
        self.bad("/detokenize", {"tokens": [1.5]}, "tokens")
        self.bad("/detokenize", {"tokens": ["x"]}, "tokens")
        self.assertEqual(self.d.request("GET", "/tokenize")[0], 405)
        self.assertEqual(self.d.request("POST", "/detokenize",
                                        {"model": "x", "tokens": []})[0], 404)


if __name__ == "__main__":
    unittest.main()
