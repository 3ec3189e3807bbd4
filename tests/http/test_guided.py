"""Structured output: whatever the seed, the temperature and the way of asking, what comes out is
valid, or a beginning of what is."""
import json
import re
import threading
import unittest

from daemon import NAME, Case, events
from jsonschema import Draft202012Validator
from openai import OpenAI

PERSON = {
    "type": "object", "title": "Person", "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "born": {"type": "string", "format": "date"},
        "size": {"anyOf": [{"type": "number", "exclusiveMinimum": 0, "maximum": 3}, {"type": "null"}]},
        "tags": {"type": "array", "items": {"enum": ["tall", "old", 7, None]}, "maxItems": 3},
        "code": {"type": "string", "pattern": "^[A-Z]{2}-\\d{1,3}$"},
    },
    "required": ["name", "age", "code"],
}
TREE = {
    "$defs": {"node": {
        "type": "object",
        "properties": {"word": {"type": "string", "maxLength": 6},
                       "parts": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2}},
        "required": ["word"],
    }},
    "$ref": "#/$defs/node",
}
SCHEMAS = {
    "person": PERSON,
    "tree": TREE,
    "list": {"type": "array", "minItems": 2, "maxItems": 4, "items": {"type": "boolean"}},
    "map": {"type": "object", "additionalProperties": {"type": "integer", "maximum": 9}},
    "choice": {"oneOf": [{"const": "a \"quoted\" word"}, {"enum": [1.5, -2, True]}]},
}
PROMPT = "The old man said: "


def parse(text):
    """As JSON, strictly; no member twice."""
    def members(pairs):
        keys = [k for k, _ in pairs]
        assert len(keys) == len(set(keys)), keys
        return dict(pairs)

    def constant(name):
        raise AssertionError(name)

    return json.loads(text, object_pairs_hook=members, parse_constant=constant)


class Guided(Case):
    def ask(self, **body):
        choices = self.d.complete(**dict({"prompt": PROMPT, "max_tokens": 400}, **body))["choices"]
        return choices[0]

    def test_schemas(self):
        for name, schema in SCHEMAS.items():
            validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
            whole = 0
            for seed in range(8):
                choice = self.ask(guided_json=schema, seed=seed, temperature=(seed % 4) / 2)
                if choice["finish_reason"] == "stop":
                    validator.validate(json.loads(choice["text"]))
                    whole += 1
            self.assertGreaterEqual(whole, 5, name)

    def test_ways_to_ask(self):
        ask = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
        ways = [{"guided_json": PERSON}, {"guided_json": json.dumps(PERSON)}, {"response_format": ask},
                {"structured_outputs": {"json": PERSON}},
                {"structured_outputs": {"json": json.dumps(PERSON), "regex": None}}]
        texts = {self.ask(seed=3, **way)["text"] for way in ways}
        self.assertEqual(len(texts), 1)
        Draft202012Validator(PERSON).validate(parse(texts.pop()))

    def test_json_object(self):
        for way in ({"response_format": {"type": "json_object"}},
                    {"structured_outputs": {"json_object": True}}):
            for seed in range(4):
                choice = self.ask(seed=seed, **way)
                if choice["finish_reason"] == "stop":
                    self.assertIsInstance(json.loads(choice["text"]), dict)
                else:
                    self.assertTrue(choice["text"].startswith("{"))

    def test_regex_and_choice(self):
        pattern = r"(\+\d{1,3} )?\d{3}-\d{4}( or so)?"
        for seed in range(6):
            self.assertRegex(self.ask(guided_regex=pattern, seed=seed)["text"], f"^{pattern}$")
            choice = self.ask(guided_choice=["yes", "no", "不"], seed=seed, temperature=2)
            self.assertIn(choice["text"], ["yes", "no", "不"])
            self.assertEqual(choice["finish_reason"], "stop")
        text = self.ask(structured_outputs={"regex": "é{3}ß?[^a]"}, seed=1)["text"]
        self.assertRegex(text, "^é{3}ß?[^a]$")

    def test_streams_are_the_same_text(self):
        for seed in range(3):
            body = {"prompt": PROMPT, "max_tokens": 300, "guided_json": TREE, "seed": seed}
            whole = self.d.complete(**body)["choices"][0]
            _, _, answer = self.d.request("POST", "/v1/completions", dict(body, stream=True))
            pieces = [e["choices"][0] for e in events(answer)]
            self.assertEqual("".join(p["text"] for p in pieces), whole["text"])
            self.assertEqual(pieces[-1]["finish_reason"], whole["finish_reason"])

    def test_every_cut_is_a_beginning(self):
        whole = self.ask(guided_json=PERSON, seed=5)["text"]
        for n in range(1, 12):
            cut = self.ask(guided_json=PERSON, seed=5, max_tokens=n)
            self.assertEqual(cut["finish_reason"], "length")
            self.assertTrue(whole.startswith(cut["text"].rstrip("\ufffd")))
        stopped = self.ask(guided_json=PERSON, seed=5, stop="age")
        self.assertEqual(stopped["text"], whole[:whole.index("age")])
        self.assertEqual(stopped["stop_reason"], "age")

    def test_choices_of_one_request(self):
        answer = self.d.complete(prompt=[PROMPT, "And then "], n=4, best_of=4, max_tokens=60, seed=9,
                                 guided_regex="[a-z]{3,8}( [a-z]+){2}\\.", logprobs=3)
        texts = [c["text"] for c in answer["choices"]]
        self.assertEqual(len(texts), 8)
        self.assertGreater(len(set(texts)), 3)
        for c in answer["choices"]:
            if c["finish_reason"] == "stop":
                self.assertRegex(c["text"], r"^[a-z]{3,8}( [a-z]+){2}\.$")
            # Of the model's own distribution: what is not allowed is among the top ones.
            self.assertTrue(any(not re.match("[a-z .]+$", t) for top in c["logprobs"]["top_logprobs"]
                                for t in top))

    def test_options_that_ban_tokens(self):
        for extra in ({"ignore_eos": True}, {"min_tokens": 100}, {"presence_penalty": 2},
                      {"logit_bias": {str(i): -100 for i in range(300, 600)}},
                      {"temperature": 2, "top_k": 1}, {"repetition_penalty": 5, "top_p": 0.1}):
            choice = self.ask(guided_choice=["yes", "no"], **extra)
            self.assertIn(choice["text"], ["yes", "no"], extra)
            self.assertEqual(choice["finish_reason"], "stop", extra)

    def test_nothing_left_is_an_error(self):
        ids = [i for i in range(256)]
        for n in range(0, 256, 16):              # whichever token is "a": until all are banned
            status, _, body = self.d.request("POST", "/v1/completions", {
                "prompt": PROMPT, "guided_regex": "a", "min_tokens": 5, "max_tokens": 9,
                "stop_token_ids": ids[n:n + 16]})
            if status != 200:
                self.assertIn("no token is left", self.assert_error(status, body, 400)["message"])
                return
        self.fail("no token was banned")

    def test_many_at_once(self):
        failures = []

        def one(seed):
            name = sorted(SCHEMAS)[seed % len(SCHEMAS)]
            choice = self.ask(guided_json=SCHEMAS[name], seed=seed)
            try:
                if choice["finish_reason"] == "stop":
                    Draft202012Validator(SCHEMAS[name]).validate(json.loads(choice["text"]))
            except Exception as e:
                failures.append((name, seed, e))

        threads = [threading.Thread(target=one, args=(s,)) for s in range(24)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        self.assertEqual(failures, [])

    def test_refusals(self):
        regex, schema = "guided_regex", "response_format"
        cases = [
            ({"guided_regex": "(?=a)"}, regex, "look-ahead"),
            ({"guided_regex": ""}, regex, "empty text"),
            ({"guided_regex": "(a|b)*a(a|b){20}"}, regex, "too complex"),
            ({"guided_regex": "(a{1000}){1000}"}, regex, "too large"),
            ({"guided_regex": 1}, regex, "string"),
            ({"guided_choice": []}, "guided_choice", "list of strings"),
            ({"guided_choice": ["a", 1]}, "guided_choice", "list of strings"),
            ({"guided_choice": [""]}, "guided_choice", "empty string"),
            ({"guided_json": "{"}, "guided_json", "JSON schema"),
            ({"guided_json": {"not": {}}}, "guided_json", "'not' that is not supported"),
            ({"guided_json": {"$ref": "#"}}, "guided_json", "no text"),
            ({"response_format": {"type": "json_schema"}}, schema, "must be an object"),
            ({"response_format": {"type": "json_schema", "json_schema": {}}}, schema, "'schema'"),
            ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "x": 1}}},
             "response_format.json_schema", "'x'"),
            ({"response_format": {"type": "xml"}}, schema, "must be"),
            ({"structured_outputs": {}}, "structured_outputs", "must have"),
            ({"structured_outputs": {"grammar": "x"}}, "structured_outputs", "'grammar'"),
            ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs",
             "more than one"),
            ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "together"),
            ({"guided_grammar": "root ::= a"}, "guided_grammar", "not supported"),
        ]
        for body, param, sentence in cases:
            status, _, answer = self.d.request("POST", "/v1/completions", dict(body, prompt="x"))
            error = self.assert_error(status, answer, 400, kind="invalid_request_error")
            self.assertEqual(error["param"], param, body)
            self.assertIn(sentence, error["message"], body)
        for body in ({"response_format": {"type": "text"}}, {"guided_json": None}):
            self.assertEqual(len(self.d.complete(prompt="x", max_tokens=3, **body)["choices"]), 1)

    def test_sdk(self):
        client = OpenAI(base_url=self.d.url + "/v1", api_key="none")
        ask = {"type": "json_schema", "json_schema": {"name": "t", "schema": TREE}}
        answer = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=300, seed=2,
                                           extra_body={"response_format": ask})
        Draft202012Validator(TREE).validate(json.loads(answer.choices[0].text))


if __name__ == "__main__":
    unittest.main()
