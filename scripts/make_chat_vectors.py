#!/usr/bin/env python3
"""Records tests/unit/data/chat/renders.json with the templates of the models themselves.

    python3 scripts/make_chat_vectors.py DIR        (needs: pip install jinja2)

DIR holds templates named after the chat formats of the server: qwen3.jinja, glm-4.7.jinja, ...
Each is run on the conversations below in the environment in which Hugging Face runs it, and
what it writes is recorded beside the request body that should give the same prompt.  The test
reads the file and needs neither Python nor the templates."""
import copy
import json
import sys
from pathlib import Path

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

OUT = Path(__file__).resolve().parent.parent / "tests/unit/data/chat/renders.json"
# Arguments in a string stay one.
VERBATIM = {"qwen3", "qwen3-thinking", "qwen3-instruct", "qwen3-instruct-early"}
ONE_CALL = {"llama-3.1", "llama-3.2"}
NO_TOOLS = {"chatml", "smollm2", "llama-3"}
THINKS = {"qwen3", "qwen3-thinking", "glm-4.7"}


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def result(text):
    return {"role": "tool", "content": text, "tool_call_id": "call_1"}


def calls(*pairs):
    return [{"id": f"call_{i}", "type": "function", "function": {"name": n, "arguments": a}}
            for i, (n, a) in enumerate(pairs)]


WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "Get weather: é",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"},
                                                    "days": {"type": "integer"}},
                   "required": ["city"]}}}
ODD = {"type": "function", "function": {
    "name": "odd", "description": "quotes \" and \\ and /, \t\n\b\f\r \u0001 \u007f \u2028 🙂 <b>&'",
    "strict": True,
    "parameters": {"type": "object", "properties": {
        "x": {"type": "number", "minimum": 0.1, "maximum": 1.0, "default": 100.0, "big": 1e22,
              "small": 1e-07, "edge": 1e16, "under": 9999999999999998.0, "long": 123456.789,
              "third": 0.3333333333333333, "tiny": 5e-324, "huge": 12345678901234567890123,
              "minus": -0.0, "zero": 0, "neg": -17, "e5": 0.0001, "e6": 0.00001234,
              "none": None, "yes": True, "no": False, "list": [], "object": {},
              "deep": [[], [1, [2, {"a": [3]}]], "s"]}}}}}
PARIS = calls(("get_weather", {"city": "Paris", "days": 2}))
THOUGHT = "<think>\nhmm\n</think>\n\nHello!"
TOOL_TURNS = [said("", reasoning_content="need tool", tool_calls=PARIS), result("18C"),
              result("19C")]

# name, body, the formats it is not for
CASES = [
    ("one", {"messages": [user("Hi")]}, ()),
    ("system", {"messages": [system("Be terse."), user("Hi")]}, ()),
    ("late system", {"messages": [user("a"), system("b"), user("c")]}, ()),
    ("turns", {"messages": [user("Hi"), said(THOUGHT), user("Again")]}, ()),
    ("no generation", {"messages": [user("Hi"), said("Hello")],
                       "add_generation_prompt": False}, ()),
    ("thought, no generation", {"messages": [system("s"), user("Hi"), said(THOUGHT)],
                                "add_generation_prompt": False}, ()),
    ("ends with the assistant", {"messages": [user("Hi"), said("\n\nHello\n")]}, ()),
    ("only an assistant", {"messages": [said("x")]}, ()),
    ("blanks", {"messages": [system(" \n s\t"), user("\n u \u00a0\u3000"), said(" a "),
                             user("")]}, ()),
    ("reasoning", {"messages": [user("Hi"), said("x", reasoning_content="r"), user("Again"),
                                said("y", reasoning_content="\n r2 \n")],
                   "add_generation_prompt": False}, ()),
    ("odd marks", {"messages": [user("a"), said("</think>b</think>\n\nc<think>d")]}, ()),
    ("odd marks at the end", {"messages": [user("a"), said("x<think>\n\ny\n</think>\n\nz")]}, ()),
    ("a user's response", {"messages": [user("q"), said("a", reasoning_content="r"),
                                        user("<tool_response>x</tool_response>")]}, ()),
    ("only a user's response", {"messages": [user("<tool_response>\n</tool_response>"),
                                             said("a", reasoning_content="r")]}, ()),
    ("no thought", {"messages": [user("a"), said(THOUGHT, reasoning_content=""), user("b"),
                                 said(THOUGHT, reasoning_content="")],
                    "add_generation_prompt": False}, ()),
    ("null for a thought", {"messages": [user("a"), said(THOUGHT, reasoning_content=None)],
                            "add_generation_prompt": False}, ()),
    ("two systems", {"messages": [system("a"), system("b"), user("c")]}, ()),
    ("only a system", {"messages": [system("a")]}, ()),
    ("nothing said", {"messages": [system(""), user("a"), said(""), user(""), said("")]}, ()),
    ("begins with the assistant", {"messages": [said(THOUGHT), user("a"), system("b")]}, ()),
    ("parts", {"messages": [user([{"type": "text", "text": "a"},
                                  {"type": "text", "text": "b"}])]}, ()),
    ("thinking off", {"messages": [system("Be terse."), user("Hi")], "enable_thinking": False},
     ("qwen3-thinking",)),
    ("thinking on", {"messages": [user("Hi")], "chat_template_kwargs": {"enable_thinking": True}},
     ("other",)),
    ("thoughts kept", {"messages": [user("Hi"), said(THOUGHT), user("Again")],
                       "chat_template_kwargs": {"clear_thinking": False}}, ("not glm",)),
    ("date", {"messages": [system("s"), user("Hi")],
              "chat_template_kwargs": {"date_string": "31 Dec 1999"}}, ("not llama",)),
    ("empty tools", {"messages": [user("Hi")], "tools": []}, ()),
    ("null", {"messages": [user("Hi"), {"role": "assistant", "content": None}, user("?")]}, ()),
]
TOOL_CASES = [
    ("tools", {"messages": [user("Hi")], "tools": [WEATHER]}, ()),
    ("odd tools", {"messages": [system("s"), user("Hi")], "tools": [WEATHER, ODD]}, ()),
    ("tool turns", {"messages": [system("Be terse."), user("Hi"), *TOOL_TURNS],
                    "tools": [WEATHER]}, ()),
    ("tool turns without tools", {"messages": [user("Hi"), *TOOL_TURNS, said("cold"),
                                               user("And now?")]}, ()),
    ("null beside a call", {"messages": [
        user("Hi"), {"role": "assistant", "content": None,
                     "tool_calls": calls(("f", {"a": "x", "b": [1, 2.5, True, None]}))},
        result("ok")]}, ()),
    ("calls in strings", {"messages": [
        user("Hi"), said("", tool_calls=calls(("f", '{"a":1}'), ("g", "{}"))), result("ok")]}, ()),
    ("a call in a string", {"messages": [
        user("Hi"), said("", tool_calls=calls(("f", '{ "a":1.0,\n"b" : "é\\u00e9\\/" }'))),
        result('say "ok"\n')]}, ()),
    ("text and calls", {"messages": [
        user("Hi"), said("Let me see.\n", reasoning_content="t",
                         tool_calls=calls(("f", {}), ("g", {"s": "<b>\n"}))),
        result("1"), user("?"), said("x", tool_calls=PARIS), result("2"), result("3"),
        said("done")]}, ()),
    ("text and a call", {"messages": [
        user("Hi"), said("Let me see.", reasoning_content="t", tool_calls=PARIS), result("2"),
        said("done")], "tools": [WEATHER], "add_generation_prompt": False}, ()),
    ("rounds of calls", {"messages": [
        user("Hi"), said(THOUGHT, tool_calls=PARIS), result("1"),
        said(None, tool_calls=PARIS), result(""), said("b", reasoning_content="r"),
        said("", tool_calls=PARIS), result("3"), result("<tool_response>\n4")],
        "tools": [WEATHER]}, ()),
    ("begins with a result", {"messages": [result("1"), user("Hi"), said("x"), result("2"),
                                           system("s"), result("3")]}, ()),
    ("tools and an empty system", {"messages": [system(""), user(" Hi "), system("b")],
                                   "tools": [WEATHER]}, ()),
    ("tools and the assistant first", {"messages": [said("Hello"), user("Hi")],
                                       "tools": [WEATHER]}, ()),
]


def environment():
    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                        extensions=[jinja2.ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    return env


def as_template_wants(name, messages):
    """What the server does to messages before it renders them."""
    messages = copy.deepcopy(messages)
    for m in messages:
        m["content"] = m["content"] or ""
        if isinstance(m["content"], list):
            m["content"] = "".join(part["text"] for part in m["content"])
        for call in m.get("tool_calls", []):
            function = call["function"]
            if isinstance(function["arguments"], str) and name not in VERBATIM:
                function["arguments"] = json.loads(function["arguments"])
    return messages


def fits(name, body, excluded):
    n_calls = max(len(m.get("tool_calls", [])) for m in body["messages"])
    return not (name in excluded or ("other" in excluded and name not in THINKS) or
                ("not glm" in excluded and name != "glm-4.7") or
                ("not llama" in excluded and name not in ONE_CALL) or
                (name in ONE_CALL and n_calls > 1))


def render(template, name, body):
    kwargs = dict(body.get("chat_template_kwargs", {}))
    if "enable_thinking" in body:
        kwargs["enable_thinking"] = body["enable_thinking"]
    return template.render(messages=as_template_wants(name, body["messages"]),
                           tools=body.get("tools") or None, documents=None,
                           add_generation_prompt=body.get("add_generation_prompt", True),
                           bos_token="<|begin_of_text|>", **kwargs)


def main():
    renders = []
    for path in sorted(Path(sys.argv[1]).glob("*.jinja")):
        name = path.stem
        template = environment().from_string(path.read_text())
        cases = CASES + ([] if name in NO_TOOLS else TOOL_CASES)
        for case, body, excluded in cases:
            if not fits(name, body, excluded):
                continue
            body = copy.deepcopy(body)
            if name == "llama-3.2":     # without a date it takes today's
                body.setdefault("chat_template_kwargs", {})["date_string"] = "01 Feb 2026"
            renders.append({"format": name, "case": case,
                            "body": json.dumps(body, ensure_ascii=False),
                            "text": render(template, name, body)})
    OUT.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps(r) for r in renders)
    OUT.write_text('{"renders":[\n' + rows + "\n]}\n")
    print(f"{len(renders)} renders")


if __name__ == "__main__":
    main()
