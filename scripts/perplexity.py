#!/usr/bin/env python3
"""Perplexity of a text, as a running server computes it.

    perplexity.py tests/texts/harbour.txt --url http://127.0.0.1:8000
    perplexity.py book.txt --tokens 4096 --parts 4 --json

The text goes to the server as token ids and comes back with the log-probability of each but
the first.  These are of a prompt, so they are computed with full attention: this compares
weights, tokenizers and arithmetic.  What sparse attention does to prose is in evaluate.py.

    perplexity.py tests/texts/harbour.txt --reference FOLDER

computes the same with transformers in float32, which then has to be installed; that is where
the numbers in tests/http/smollm2_reference.json come from.
"""
import argparse
import json
import math
import sys
import urllib.error
import urllib.request
from pathlib import Path


def post(url, path, body):
    request = urllib.request.Request(url.rstrip("/") + path, json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as e:
        sys.exit(f"perplexity: {path} answers {e.code}: {e.read().decode(errors='replace')}")
    except OSError as e:
        sys.exit(f"perplexity: {url} does not answer: {e}")


def from_server(url, text, n_tokens):
    """(ids, log-probability of each but the first)"""
    ids = post(url, "/tokenize", {"prompt": text})["tokens"][:n_tokens]
    model = json.load(urllib.request.urlopen(url.rstrip("/") + "/v1/models"))["data"][0]["id"]
    # One token more than is needed: not every server takes a request for none.
    answer = post(url, "/v1/completions", {"model": model, "prompt": ids, "max_tokens": 1,
                                           "temperature": 0, "echo": True, "logprobs": 0})
    return ids, answer["choices"][0]["logprobs"]["token_logprobs"][1:len(ids)]


def from_transformers(folder, text, n_tokens):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"][:n_tokens]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    return ids, [logprobs[n, token].item() for n, token in enumerate(ids[1:])]


def summary(ids, logprobs, parts):
    def perplexity(values):
        return math.exp(-sum(values) / len(values))

    n = len(logprobs)
    cuts = [n * i // parts for i in range(parts + 1)]
    return {"n_tokens": len(ids), "perplexity": round(perplexity(logprobs), 4),
            "parts": [{"from": a + 1, "to": b, "perplexity": round(perplexity(logprobs[a:b]), 4)}
                      for a, b in zip(cuts, cuts[1:])]}


def main():
    ap = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("text", type=Path)
    ap.add_argument("--url", default="http://127.0.0.1:8000")
    ap.add_argument("--reference", metavar="FOLDER", help="a model for transformers")
    ap.add_argument("--tokens", type=int, help="of the text's beginning; all of it if not given")
    ap.add_argument("--parts", type=int, default=1, help="parts of the text to show by themselves")
    ap.add_argument("--json", action="store_true", help="with ids and log-probabilities")
    args = ap.parse_args()
    if args.tokens is not None and args.tokens < 2:
        ap.error("--tokens is at least 2")
    try:
        text = args.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        sys.exit(f"perplexity: {args.text} cannot be read: {e}")
    ids, logprobs = from_transformers(args.reference, text, args.tokens) if args.reference else \
        from_server(args.url, text, args.tokens)
    if not 1 <= args.parts <= len(logprobs):
        sys.exit(f"perplexity: {len(ids)} tokens cannot be shown in {args.parts} parts")
    result = summary(ids, logprobs, args.parts)
    if args.json:
        print(json.dumps({**result, "ids": ids, "logprobs": [round(x, 4) for x in logprobs]}))
        return
    print(f"{result['n_tokens']} tokens, perplexity {result['perplexity']}")
    if args.parts > 1:
        for part in result["parts"]:
            print(f"  {part['from']:7} to {part['to']:7}: {part['perplexity']}")


if __name__ == "__main__":
    main()
