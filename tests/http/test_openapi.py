"""/openapi.json: that it is OpenAPI, and that the server does what it says."""
import copy
import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import jsonschema
from openapi_spec_validator import OpenAPIV31SpecValidator

from daemon import NAME, PATIENCE, Case, Daemon, events

KEY = {"Authorization": "Bearer secret"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {
    "type": "object", "properties": {"at": {"enum": ["x", "y"]}}, "required": ["at"]}}}
MESSAGES = [{"role": "user", "content": "Where is the old house?"}]


def fetch(d):
    status, headers, body = d.request("GET", "/openapi.json", headers=KEY)
    assert status == 200 and headers["Content-Type"] == "application/json", (status, headers)
    return json.loads(body)


def close(document, node, seen):
    """Lets the objects below `node` have no members but those described."""
    if isinstance(node, list):
        for v in node:
            close(document, v, seen)
    elif isinstance(node, dict):
        if isinstance(target := node.get("$ref"), str):
            if target not in seen:
                seen.add(target)
                kind, name = target.removeprefix("#/components/").split("/")
                close(document, document["components"][kind][name], seen)
            return
        if isinstance(node.get("properties"), dict):
            node.setdefault("additionalProperties", False)
        for v in node.values():
            close(document, v, seen)


def closed(document):
    """The document, its answers taken at their word: clients are to put up with members that are
    added, but one that the server writes and nobody described is a mistake."""
    document, seen = copy.deepcopy(document), set()
    for path in document["paths"].values():
        for operation in path.values():
            for response in operation["responses"].values():
                close(document, response, seen)
                for media in response.get("content", {}).values():
                    close(document, media.get("x-event-data"), seen)
    return document


def bodies(document):
    """(path, schema of the body) of every POST."""
    for path, operations in document["paths"].items():
        if "post" in operations:
            ref = operations["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
            yield path, document["components"]["schemas"][ref.rsplit("/", 1)[1]]


def check(document, value, schema):
    schema = dict(schema, components=document["components"])
    jsonschema.Draft202012Validator(schema).validate(value)


class Document(Case):
    options = {"api_key": "secret"}             # without one there is no /debug/state

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.document = fetch(cls.d)
        cls.closed = closed(cls.document)

    def post(self, path, body):
        return self.d.request("POST", path, body, KEY)

    def check(self, value, schema):
        check(self.closed, value, schema)

    def described(self, path, method, status, media):
        return self.closed["paths"][path][method]["responses"][str(status)]["content"][media]

    def test_is_openapi(self):
        OpenAPIV31SpecValidator(self.document).validate()

    def test_needs_the_key(self):
        status, _, body = self.d.request("GET", "/openapi.json")
        self.assert_error(status, body, 401, "invalid_api_key")
        self.assertEqual(self.d.request("HEAD", "/openapi.json", headers=KEY)[::2], (200, b""))

    def test_fields(self):
        """Each may have the default that is described, or null; and there is no other."""
        for path, schema in bodies(self.document):
            required = {k: schema["example"][k] for k in schema.get("required", ["prompt"])}
            if "max_tokens" in schema["properties"]:
                required["max_tokens"] = 1
            for name in schema["properties"].keys() - required.keys():
                with self.subTest(path, name=name):
                    value = schema["properties"][name].get("default")
                    status, _, answer = self.post(path, required | {name: value})
                    self.assertEqual(status, 200, answer)
            status, _, answer = self.post(path, required | {"undescribed": None})
            self.assertEqual(self.assert_error(status, answer, 400)["param"], "undescribed")

    def test_defaults(self):
        """What is described as the default is what the server does without the field."""
        base = {"prompt": "It was a dark evening", "temperature": 0, "seed": 1}
        fields = dict(bodies(self.document))["/v1/completions"]["properties"]
        defaults = {k: v["default"] for k, v in fields.items() if "default" in v}
        self.assertGreater(len(defaults), 10)
        with_all, without = self.complete(base | defaults), self.complete(base)
        self.assertEqual(with_all["usage"]["completion_tokens"], defaults["max_tokens"])
        self.assertEqual(with_all["choices"], without["choices"])

    def complete(self, body):
        status, _, answer = self.post("/v1/completions", body)
        self.assertEqual(status, 200, answer)
        return json.loads(answer)

    def test_answers_and_events(self):
        text, chat = "/v1/completions", "/v1/chat/completions"
        requests = [
            (text, {"prompt": ["It was", "The"], "max_tokens": 6, "logprobs": 2, "echo": True}),
            (text, {"prompt": "It was", "max_tokens": 6, "stop_token_ids": list(range(16))}),
            (text, {"prompt": "It was", "guided_choice": ["far", "near"]}),
            (chat, {"messages": MESSAGES, "max_tokens": 6}),
            (chat, {"messages": MESSAGES, "max_tokens": 6, "n": 2, "logprobs": True, "top_logprobs": 2}),
        ]
        for path, body in requests:
            for stream in ({}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}):
                with self.subTest(path, body=body, stream=stream):
                    status, headers, answer = self.post(path, body | stream)
                    self.assertEqual(status, 200, answer)
                    media = headers["Content-Type"].split(";")[0]
                    described = self.described(path, "post", 200, media)
                    if not stream:
                        self.check(json.loads(answer), described["schema"])
                        continue
                    chunks = events(answer)
                    self.assertTrue(chunks)
                    for chunk in chunks:
                        self.check(chunk, described["x-event-data"])

    def test_state(self):
        """While something runs, which generated requests do not wait for."""
        with self.d.connect() as s:
            data = json.dumps({"prompt": "It was", "max_tokens": 20000, "ignore_eos": True, "n": 2,
                               "stream": True}).encode()
            s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer secret\r\n"
                      b"Content-Length: %d\r\n\r\n" % len(data) + data)
            s.recv(1)
            state = json.loads(self.d.request("GET", "/debug/state", headers=KEY)[2])
        self.assertEqual(len(state["requests"]), 1)
        self.check(state, self.described("/debug/state", "get", 200, "application/json")["schema"])


class Calls(unittest.TestCase):
    def test_calls(self):
        with Daemon(chat_format="qwen2.5", api_key="secret") as d:
            document = closed(fetch(d))
            body = {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "required", "max_tokens": 100,
                    "temperature": 0}
            content = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
            whole, stream = (d.request("POST", "/v1/chat/completions", body | extra, KEY)
                             for extra in ({}, {"stream": True}))
            answer, chunks = json.loads(whole[2]), events(stream[2])
            self.assertTrue(answer["choices"][0]["message"]["tool_calls"])
            self.assertTrue(any("tool_calls" in c["choices"][0]["delta"] for c in chunks))
            check(document, answer, content["application/json"]["schema"])
            for chunk in chunks:
                check(document, chunk, content["text/event-stream"]["x-event-data"])


class Generated(unittest.TestCase):
    """Requests made from the document, right and wrong ones: no answer may be a 5xx, or other than
    described, and what the document forbids has to be refused."""

    def test_server_does_what_it_says(self):
        # Short contexts, so that no request asks for much.
        with tempfile.TemporaryDirectory() as folder, \
                Daemon(api_key="secret", chat_format="qwen2.5", max_model_len=128, max_choices=2) as d:
            path = Path(folder, "openapi.json")
            path.write_text(json.dumps(closed(fetch(d))))
            # Fields limit each other in ways that a schema does not say, so what it allows may
            # still be refused.
            run = subprocess.run(
                [sys.executable, "-m", "schemathesis.cli", "run", str(path), "--url", d.url,
                 "-H", "Authorization: " + KEY["Authorization"], "--checks", "all",
                 "--exclude-checks", "positive_data_acceptance", "--warnings", "off",
                 "--phases", "examples,coverage,fuzzing", "--max-examples", "16", "--seed", "1",
                 "--request-timeout", str(20 * PATIENCE), "--generation-database", "none",
                 "--no-color"], cwd=folder, capture_output=True, text=True, timeout=120 * PATIENCE)
            self.assertEqual(run.returncode, 0, run.stdout[-6000:] + run.stderr[-2000:])
            self.assertIn("Tested: %d" % sum(map(len, fetch(d)["paths"].values())), run.stdout)
            answers = d.request("GET", "/metrics", headers=KEY)[2].decode()
            for route in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
                self.assertIn(f'{{model_name="{NAME}",route="{route}",code="200"}}', answers)


if __name__ == "__main__":
    unittest.main()
