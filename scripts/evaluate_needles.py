#!/usr/bin/env python3
"""What two-level attention costs in retrieval, measured through the server.

    evaluate_needles.py                                    the table of docs/ATTENTION.md
    evaluate_needles.py --tokens 98304 --needles 48 --filters coarse
    evaluate_needles.py --text book.txt --keep-blocks 32 --keep-tokens 512
    evaluate_needles.py -- --selection lagged              any option of the server

Facts ("The access code of the silver lantern is 4821357.") are set into a long text at
random places, and each is asked for at its end, greedily, with full attention and with
two levels.  An answer is right when all its seven digits are.  One server is started
for each filter and asked for both kinds, so that they share the prompt's keys and
values; the first digit of an answer comes from the prompt's last row, which is always
computed with full attention, and the other six from decode steps.

Without --text the model writes the text itself (sampled with fixed seeds).  Needs
nothing but Python and the daemon.
"""
import argparse
import json
import random
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import child_process

ROOT = Path(__file__).resolve().parent.parent
ATTRIBUTES = ("access code|serial number|page number|room number|catalogue number|weight|"
              "ticket number|house number|account number|secret number|lock code|"
              "registration number|telephone number").split("|")
ADJECTIVES = ("silver|broken|ancient|crimson|hollow|quiet|golden|wooden|frozen|painted|narrow|"
              "velvet|rusty|hidden|marble|distant|copper|wandering|gentle|forgotten").split("|")
NOUNS = ("lantern|bridge|compass|garden|mirror|anchor|violin|harbour|cabinet|tower|ladder|orchard|"
         "chapel|kettle|saddle|beacon|locket|carriage|fountain|ledger").split("|")
OPENINGS = ("It was a dark evening in November, and the old house|The captain looked at the sea|"
            "In the year of the great frost|She had never seen the garden|There was once a man who|"
            "My dear friend, the letter|The road to the village|At last the door was opened").split("|")
DIGITS = 7


class Server:
    def __init__(self, args, options):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [args.asynctlsd, "--model", args.model, "--port", str(port),
                   "--log-level", "warn", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            while not self.is_ready():
                if self.process.poll() is not None:
                    sys.exit(f"the server did not start: {' '.join(command)}")
                time.sleep(0.05)
        except BaseException:
            self.stop()
            raise

    def is_ready(self):
        try:
            urllib.request.urlopen(self.url + "/ready").close()
            return True
        except OSError:
            return False

    def complete(self, **body):
        request = urllib.request.Request(
            self.url + "/v1/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def stop(self):
        child_process.stop(self.process)


def write_text(server, n_tokens, seed):
    """Prose by the model, more than n_tokens of it."""
    pieces, per_piece = n_tokens // 1200 + 1, 1600    # some of it goes, see below

    def piece(i):
        answer = server.complete(prompt=OPENINGS[i % len(OPENINGS)], max_tokens=per_piece,
                                 temperature=0.9, top_k=100, top_p=1, seed=seed * 1000 + i,
                                 ignore_eos=True)
        return answer["choices"][0]["text"]

    with child_process.threads(16) as pool:
        texts = list(pool.map(piece, range(pieces)))
    # What the model makes up about facts would be needles of its own, and now and then it says the
    # same word for pages.
    sentences = [s for t in texts for s in re.split(r"(?<=[.!?]) ", t)
                 if not re.search(r"\d|<\||(\S+)(\s*\1){7}", s)]
    return " ".join(sentences)


def count_tokens(server, text):
    answer = server.complete(prompt=text, max_tokens=1)
    return answer["usage"]["prompt_tokens"]


def cut_to(text, n_tokens, tokens_of_all):
    """About n_tokens of text, at the end of a sentence."""
    end = text.rfind(". ", 0, int(len(text) * n_tokens / tokens_of_all))
    return text[:end + 1]


def make_facts(n, rng):
    names = [(a, f"{b} {c}") for a in ATTRIBUTES for b in ADJECTIVES for c in NOUNS]
    return [(a, s, "".join(rng.choices("0123456789", k=DIGITS)))
            for a, s in rng.sample(names, n)]


def plant(text, facts, rng):
    sentences = re.split(r"(?<=[.!?]) ", text)
    places = sorted(rng.sample(range(1, len(sentences)), len(facts)), reverse=True)
    for place, (a, s, v) in zip(places, facts):
        sentences.insert(place, f"The {a} of the {s} is {v}.")
    return " ".join(sentences)


def ask(server, haystack, facts, attention):
    """Right answers, right digits, and how many decode steps were two-level."""
    def one(fact):
        a, s, v = fact
        prompt = f"{haystack} What is the {a} of the {s}? The {a} of the {s} is"
        answer = server.complete(prompt=prompt, max_tokens=DIGITS + 1, temperature=0,
                                 attention=attention)
        found = answer["choices"][0]["text"].strip()[:DIGITS]
        return found == v, sum(x == y for x, y in zip(found, v))

    results = [one(f) for f in facts]
    return sum(r for r, _ in results), sum(d for _, d in results)


def sparse_rows(server):
    text = urllib.request.urlopen(server.url + "/metrics").read().decode()
    return sum(float(line.split()[-1]) for line in text.splitlines()
               if line.startswith("asynctlsd:decode_rows_sparse_total"))


def main():
    ap = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--asynctlsd", default=str(ROOT / "build" / "asynctlsd"))
    ap.add_argument("--model", default=str(ROOT / "models" / "asynctlsd-books-9m"))
    ap.add_argument("--tokens", type=int, default=32768)
    ap.add_argument("--needles", type=int, default=100)
    ap.add_argument("--filters", default="coarse,bounds")
    ap.add_argument("--keep-blocks", type=int, default=64)
    ap.add_argument("--keep-tokens", type=int, default=1024)
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--text", type=Path, help="a text to hide the facts in")
    ap.add_argument("--within", type=float, metavar="SHARE",
                    help="fail when the coarse filter loses more than this share of answers")
    ap.add_argument("options", nargs="*", metavar="-- OPTION", help="for the server, after --")
    args = ap.parse_args()
    child_process.ends_with_script()
    rng, haystack, lost = random.Random(args.seed), None, 0
    facts = make_facts(args.needles, rng)

    print(f"{args.needles} needles in {args.tokens} tokens, {args.keep_blocks} blocks, "
          f"{args.keep_tokens} tokens\n\n| attention | right | digits | seconds |\n|---|---|---|---|")
    for name in args.filters.split(","):
        server = Server(args, ["--filter", name, "--keep-blocks", str(args.keep_blocks),
                               "--keep-tokens", str(args.keep_tokens), *args.options])
        try:
            if haystack is None:
                text = args.text.read_text() if args.text else \
                    write_text(server, args.tokens, args.seed)
                sample = text[:20000]
                rate = len(sample) / count_tokens(server, sample)
                room = args.tokens - 40 - 22 * args.needles
                haystack = plant(cut_to(text, room, len(text) / rate), facts, rng)
            ask(server, haystack, facts[:1], "full")  # fills the prefix cache
            right = {}
            for attention in ("full", "sparse"):
                began, rows = time.time(), sparse_rows(server)
                right[attention], digits = ask(server, haystack, facts, attention)
                rows = sparse_rows(server) - rows
                label = "full" if attention == "full" else f"two levels, {name} filter"
                print(f"| {label} | {right[attention] / len(facts):.2f} "
                      f"| {digits / len(facts) / DIGITS:.3f} | {time.time() - began:.1f} |",
                      flush=True)
                if (attention == "sparse") != (rows > 0):
                    sys.exit(f"{label}: {rows:.0f} decode rows were two-level")
            if name == "coarse":
                lost = (right["full"] - right["sparse"]) / len(facts)
        finally:
            server.stop()
    if args.within is not None and lost > args.within:
        sys.exit(f"the coarse filter lost {lost:.3f} of the answers, more than {args.within}")


if __name__ == "__main__":
    main()
