"""Structured answers and forced calls in chats, with the openai package: against the bundled
model, which would rather tell stories, and against models that say what they are told to."""
import enum
import json
import typing
import unittest

import openai
import pydantic

from daemon import events
from jsonschema import Draft202012Validator
from scripted_model import scripted_glm, scripted_model
from test_chat import ASK, Sdk


class Kind(enum.Enum):
    COTTAGE = "cottage"
    CASTLE = "castle"


class Room(pydantic.BaseModel):
    """A place in a house."""
    name: str = pydantic.Field(max_length=12, description="What people call it")
    windows: int = pydantic.Field(ge=0, le=9)


class House(pydantic.BaseModel):
    kind: Kind
    owner: typing.Optional[str] = pydantic.Field(max_length=12)
    state: typing.Literal["old", "new"]
    entrance: Room
    rooms: list[Room] = pydantic.Field(max_length=2)


class Weather(pydantic.BaseModel):
    city: typing.Literal["Paris", "Rome"]
    rain: bool


def json_schema(model, **more):
    return {"type": "json_schema", "json_schema": {"name": model.__name__,
                                                   "schema": model.model_json_schema(), **more}}


class Structured(Sdk):
    def content(self, **kw):
        return self.ask(max_tokens=500, temperature=1, **kw).choices[0].message.content

    def test_the_sdk_parses(self):
        for seed in range(4):
            answer = self.client.chat.completions.parse(
                model=self.name, messages=ASK, response_format=House, max_tokens=500, seed=seed)
            choice = answer.choices[0]
            self.assertEqual(choice.finish_reason, "stop")
            self.assertIsInstance(choice.message.parsed, House)
            self.assertIsNone(choice.message.tool_calls)

    def test_the_sdk_parses_a_stream(self):
        with self.client.chat.completions.stream(
                model=self.name, messages=ASK, response_format=House, max_tokens=500,
                seed=5) as stream:
            for _ in stream:
                pass
            final = stream.get_final_completion()
        self.assertIsInstance(final.choices[0].message.parsed, House)

    def test_ways_to_ask(self):
        schema = Weather.model_json_schema()
        ways = [{"response_format": json_schema(Weather)},
                {"response_format": json_schema(Weather, strict=True, description="d")},
                {"response_format": json_schema(Weather, strict=False)},
                {"extra_body": {"guided_json": schema}},
                {"extra_body": {"structured_outputs": {"json": schema}}}]
        texts = {self.content(seed=3, **way) for way in ways}
        self.assertEqual(len(texts), 1)
        Draft202012Validator(schema).validate(json.loads(texts.pop()))
        self.assertIn(self.content(extra_body={"guided_choice": ["yes", "no"]}), ["yes", "no"])
        self.assertRegex(self.content(extra_body={"guided_regex": "[A-Z][a-z]{3,9}\\."}),
                         r"^[A-Z][a-z]{3,9}\.$")
        self.assertNotIn(self.ask(max_tokens=9, response_format={"type": "text"})
                         .choices[0].message.content[:1], ["{", ""])

    def test_json_object(self):
        for seed in range(4):
            choice = self.ask(max_tokens=300, temperature=1, seed=seed,
                              response_format={"type": "json_object"}).choices[0]
            if choice.finish_reason == "stop":
                self.assertIsInstance(json.loads(choice.message.content), dict)
            else:
                self.assertTrue(choice.message.content.startswith("{"))

    def test_choices_and_streams_are_the_same_texts(self):
        kw = {"n": 3, "seed": 7, "temperature": 1, "max_tokens": 500,
              "response_format": json_schema(House)}
        whole = [c.message.content for c in self.ask(**kw).choices]
        self.assertGreater(len(set(whole)), 1)
        texts = [""] * 3
        for chunk in self.ask(stream=True, **kw):
            for c in chunk.choices:
                texts[c.index] += c.delta.content or ""
        self.assertEqual(texts, whole)
        for text in texts:
            House.model_validate_json(text)

    def test_refusals(self):
        cases = [
            ({"type": "json_schema"}, "response_format", "must be an object"),
            ({"type": "json_schema", "json_schema": {"name": "x"}}, "response_format", "'schema'"),
            ({"type": "json_schema", "json_schema": {"name": 1, "schema": {}}}, "response_format",
             "must be a string"),
            ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}},
             "response_format", "'not' that is not supported"),
            ({"type": "xml"}, "response_format", "must be"),
        ]
        for fmt, param, sentence in cases:
            e = self.refused(response_format=fmt)
            self.assertEqual(e.param, param)
            self.assertIn(sentence, e.message)
        e = self.refused(response_format={"type": "json_object"},
                         extra_body={"guided_regex": "a"})
        self.assertIn("together", e.message)
        self.assertEqual(self.refused(tool_choice="required").param, "tool_choice")


TOOL = {"type": "function", "function": {"name": "get_weather",
                                         "parameters": Weather.model_json_schema()}}
OTHER = {"type": "function", "function": {
    "name": "ring", "parameters": {"type": "object", "properties": {
        "times": {"type": "integer", "minimum": 1, "maximum": 3}}, "required": ["times"]}}}


class Scripted(Sdk):
    """A model for each subclass, which has its scripts."""
    thinking, quiet = ["xyzzy"], ["plugh"]
    make = staticmethod(scripted_model)

    @classmethod
    def setUpClass(cls):
        cls.folder = cls.make(cls.thinking, cls.quiet)
        cls.options = {"model": cls.folder.name, "kv-cache-bytes": "64mb"}
        super().setUpClass()

    def ask(self, **kw):
        return super().ask(**dict({"max_tokens": 200}, **kw))


class Thinking(Scripted):
    """Thinks first, then answers as it is asked to."""
    thinking = ["<think>", "\n{not JSON} ", "yet, </thin", "k\n", "</think>", '\n\n{"city": "Par',
                'is", "rain": ', "false}"]
    quiet = ['{"city": "Ro', 'me", "rain": true}', " And so on."]

    def test_thoughts_are_free_and_the_answer_is_not(self):
        answer = self.client.chat.completions.parse(model=self.name, messages=ASK, temperature=0,
                                                    max_tokens=100, response_format=Weather)
        message = answer.choices[0].message
        self.assertEqual(message.reasoning_content, "{not JSON} yet, </think")
        self.assertEqual(message.content, '{"city": "Paris", "rain": false}')
        self.assertEqual(message.parsed, Weather(city="Paris", rain=False))
        self.assertEqual(answer.choices[0].finish_reason, "stop")
        # Every token of the script but the end of the turn: nothing may follow.
        self.assertEqual(answer.usage.completion_tokens, len(self.thinking))
        self.assertEqual(answer.usage.completion_tokens_details.reasoning_tokens, 5)

    def test_streamed(self):
        deltas = [c.choices[0].delta for c in self.ask(stream=True,
                                                       response_format=json_schema(Weather))]
        self.assertEqual("".join(getattr(d, "reasoning_content", None) or "" for d in deltas),
                         "{not JSON} yet, </think")
        self.assertEqual("".join(d.content or "" for d in deltas),
                         '{"city": "Paris", "rain": false}')

    def test_without_thinking(self):
        answer = self.ask(response_format=json_schema(Weather),
                          extra_body={"enable_thinking": False}).choices[0]
        self.assertEqual(answer.message.content, '{"city": "Rome", "rain": true}')
        self.assertEqual(answer.finish_reason, "stop")
        self.assertIsNone(getattr(answer.message, "reasoning_content", None))

    def test_beside_tools_it_may_answer(self):
        message = self.ask(response_format=json_schema(Weather), tools=[OTHER]).choices[0].message
        self.assertEqual(message.content, '{"city": "Paris", "rain": false}')
        self.assertIsNone(message.tool_calls)


class Unwilling(Scripted):
    """Thinks no end of it, ends its turn in the middle, and never answers what it should."""
    thinking = ["<think>", "Hm. "]
    quiet = ["It is ", "18 degrees."]

    def test_a_turn_does_not_end_in_thoughts(self):
        choice = self.ask(response_format=json_schema(Weather), max_tokens=20).choices[0]
        self.assertEqual(choice.finish_reason, "length")
        self.assertTrue(choice.message.reasoning_content.startswith("Hm. "))
        self.assertFalse(choice.message.content)

    def test_the_structure_wins(self):
        for seed in range(4):
            answer = self.client.chat.completions.parse(
                model=self.name, messages=ASK, response_format=Weather, max_tokens=200, seed=seed,
                extra_body={"enable_thinking": False})
            self.assertIsInstance(answer.choices[0].message.parsed, Weather)

    def test_one_call_is_forced(self):
        named = {"type": "function", "function": {"name": "get_weather"}}
        seen = set()
        for seed in range(12):
            for kw in ({"tool_choice": "required", "parallel_tool_calls": False},
                       {"tool_choice": named}):
                c = self.ask(tools=[TOOL, OTHER], temperature=1, seed=seed,
                             extra_body={"enable_thinking": False}, **kw).choices[0]
                self.assertEqual(c.finish_reason, "tool_calls")
                self.assertIsNone(c.message.content)
                call, = c.message.tool_calls
                tool = TOOL if call.function.name == "get_weather" else OTHER
                Draft202012Validator(tool["function"]["parameters"]).validate(
                    json.loads(call.function.arguments))
                if kw["tool_choice"] == "required":
                    seen.add(call.function.name)
                else:
                    self.assertEqual(call.function.name, "get_weather")
        self.assertEqual(seen, {"get_weather", "ring"})

    def test_the_sdk_parses_arguments(self):
        answer = self.client.chat.completions.parse(
            model=self.name, messages=ASK, tools=[openai.pydantic_function_tool(Weather)],
            tool_choice="required", parallel_tool_calls=False, max_tokens=200, seed=1,
            extra_body={"enable_thinking": False})
        call, = answer.choices[0].message.tool_calls
        self.assertIsInstance(call.function.parsed_arguments, Weather)


class Calling(Scripted):
    """Thinks and calls twice."""
    thinking = ["<think>", "\nWhere? ", "</think>", "\n\n<tool_call>\n", '{"name": "get_',
                'weather", "arguments": ', '{"city": "Paris", "rain": true}', "}\n</tool_call>",
                "\n<tool_call>", '\n{"name": "ring", "argu', 'ments": {"times": 2}}\n',
                "</tool_call>"]
    quiet = ["I would ", "rather not."]

    def test_several_calls(self):
        for kw in ({"tool_choice": "required"}, {"response_format": json_schema(Weather)},
                   {"tool_choice": "required", "response_format": json_schema(Weather)}):
            c = self.ask(tools=[TOOL, OTHER], **kw)
            message = c.choices[0].message
            self.assertEqual(message.reasoning_content, "Where? ")
            self.assertEqual([(t.function.name, json.loads(t.function.arguments))
                              for t in message.tool_calls],
                             [("get_weather", {"city": "Paris", "rain": True}),
                              ("ring", {"times": 2})])
            self.assertEqual(c.choices[0].finish_reason, "tool_calls")
            self.assertEqual(c.usage.completion_tokens, len(self.thinking) + 1)

    def test_one_call_ends_the_turn(self):
        for kw in ({"tool_choice": "required", "parallel_tool_calls": False},
                   {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}}):
            c = self.ask(tools=[TOOL, OTHER], **kw)
            self.assertEqual(len(c.choices[0].message.tool_calls), 1)
            self.assertEqual(c.usage.completion_tokens, 8)

    def test_streamed(self):
        status, _, body = self.d.request("POST", "/v1/chat/completions", {
            "messages": ASK, "stream": True, "temperature": 0, "max_tokens": 100,
            "tools": [TOOL, OTHER], "tool_choice": "required"})
        self.assertEqual(status, 200)
        chunks = [e["choices"][0] for e in events(body)]
        calls = [t for c in chunks for t in c["delta"].get("tool_calls", [])]
        self.assertEqual([t["function"]["name"] for t in calls if "name" in t["function"]],
                         ["get_weather", "ring"])
        self.assertEqual("".join(t["function"].get("arguments", "") for t in calls),
                         '{"city": "Paris", "rain": true}{"times": 2}')
        self.assertEqual(chunks[-1]["finish_reason"], "tool_calls")


NOTE = {"type": "function", "function": {"name": "note", "parameters": {
    "type": "object", "properties": {
        "text": {"type": "string", "maxLength": 8},
        "kind": {"$ref": "#/$defs/kind"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
        "by": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]}},
    "$defs": {"kind": {"enum": ["1", "null", "a<b"]}}, "required": ["text", "kind"]}}}


class GlmCalling(Scripted):
    """Thinks and calls twice, in pairs of names and values."""
    make = staticmethod(scripted_glm)
    thinking = ["Where to", "? "]
    quiet = ["<tool_call>", "get_", "weather<arg_key>city", "</arg_key><arg_value>Par",
             "is</arg_value>", "<arg_key>rain</arg_key>", "<arg_value>", "true", "</arg_value>",
             "</tool_call>", "<tool_call>ring", "<arg_key>times</arg_key><arg_value>2",
             "</arg_value></tool_call>"]
    calls = [("get_weather", {"city": "Paris", "rain": True}), ("ring", {"times": 2})]

    def test_several_calls(self):
        for kw in ({"tool_choice": "required"}, {"response_format": json_schema(Weather)}, {}):
            c = self.ask(tools=[TOOL, OTHER], **kw)
            message = c.choices[0].message
            self.assertEqual(message.reasoning_content, "Where to? ")
            self.assertEqual([(t.function.name, json.loads(t.function.arguments))
                              for t in message.tool_calls], self.calls)
            self.assertIsNone(message.content)
            self.assertEqual(c.choices[0].finish_reason, "tool_calls")
            # And the two tokens that end the thoughts and the turn.
            self.assertEqual(c.usage.completion_tokens, len(self.thinking + self.quiet) + 2)

    def test_one_call_ends_the_turn(self):
        for kw in ({"tool_choice": "required", "parallel_tool_calls": False},
                   {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}}):
            c = self.ask(tools=[TOOL, OTHER], extra_body={"enable_thinking": False}, **kw)
            self.assertEqual(len(c.choices[0].message.tool_calls), 1)
            self.assertEqual(c.usage.completion_tokens, 10)

    def test_streamed(self):
        chunks = [c.choices[0] for c in self.ask(tools=[TOOL, OTHER], tool_choice="required",
                                                 stream=True)]
        calls = [t for c in chunks for t in c.delta.tool_calls or []]
        self.assertEqual([t.function.name for t in calls if t.function.name],
                         [name for name, _ in self.calls])
        self.assertEqual("".join(t.function.arguments or "" for t in calls),
                         "".join(json.dumps(arguments) for _, arguments in self.calls))
        self.assertEqual(chunks[-1].finish_reason, "tool_calls")


class GlmUnwilling(Scripted):
    """Never calls by itself."""
    make = staticmethod(scripted_glm)
    thinking, quiet = ["Hm. "], ["It is ", "18 degrees."]

    def test_a_call_is_forced(self):
        tools = {t["function"]["name"]: t["function"]["parameters"] for t in (TOOL, OTHER, NOTE)}
        seen = set()
        for seed in range(24):
            c = self.ask(tools=[TOOL, OTHER, NOTE], tool_choice="required", temperature=1,
                         seed=seed, parallel_tool_calls=False, max_tokens=500,
                         extra_body={"enable_thinking": False}).choices[0]
            self.assertEqual(c.finish_reason, "tool_calls")
            self.assertIsNone(c.message.content)
            call, = c.message.tool_calls
            Draft202012Validator(tools[call.function.name]).validate(
                json.loads(call.function.arguments))
            seen.add(call.function.name)
        self.assertEqual(seen, set(tools))

    def test_beside_tools_it_may_answer(self):
        message = self.ask(tools=[NOTE], extra_body={
            "guided_regex": "It is [0-9]+ degrees[.]"}).choices[0].message
        self.assertEqual(message.content, "It is 18 degrees.")
        self.assertEqual(message.reasoning_content, "Hm. ")
        self.assertIsNone(message.tool_calls)

    def test_what_cannot_be_followed_is_refused(self):
        e = self.refused(tool_choice="required", tools=[{"type": "function", "function": {
            "name": "f", "parameters": {"type": "object", "properties": {
                "x": {"enum": ["</arg_value>"]}}}}}])
        self.assertEqual(e.param, "tools")
        self.assertIn("'enum' in 'x' with a string that contains </arg_value>", e.message)


if __name__ == "__main__":
    unittest.main()
