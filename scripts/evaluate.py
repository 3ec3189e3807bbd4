#!/usr/bin/env python3
"""What sparse attention costs, task by task, measured through the server.

    evaluate.py --out build/evaluation.jsonl                       everything, for hours
    evaluate.py --quick                                            minutes, to see that it works
    evaluate.py --tokens 32768,98304 --tasks needle,json_facts --configs 256,1024,published
    evaluate.py --model DIR --chat --text book.txt                 a model that follows instructions
    evaluate.py --url http://127.0.0.1:8000 --text book.txt        a server that is running
    evaluate.py --url http://127.0.0.1:8000 --as-served --text book.txt    one that is not ours
    evaluate.py -- --selection lagged                              any option of the server

Each sample is asked with full attention and, for each configuration, with sparse attention;
the prompt, and so the first token of an answer, is always computed with full attention.  A
configuration is a number of kept tokens, everything else as by default, or `published`: bounds
of blocks, 128 blocks, 1,024 tokens.  Most tasks are in evaluation_tasks.py.  Two look at single
decode steps: `recall` (a passage begins again: is its next token the likeliest?) and `prose`,
which is no task but the log-probability of the token that follows a long text.

A score is the share of what is expected that the answer has, averaged over samples, with a Wilson
interval of 95 % for the number of samples; where a sample asks for several things that is wider
than it has to be.  Answers are greedy.  With --out every answer is kept as a line of JSON, and an
evaluation that was interrupted goes on where it was.  Needs nothing but Python and the daemon.
"""
import argparse
import hashlib
import json
import math
import signal
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from evaluate_needles import ROOT, Server, count_tokens, write_text
from evaluation_tasks import TASKS, Haystack, Maker, right_of

LENGTHS = "4096,8192,16384,32768,65536,98304"
PUBLISHED = ["--filter", "bounds", "--keep-blocks", "128", "--keep-tokens", "1024"]
QUICK = {"tokens": "2048", "samples": 4, "configs": "256,published"}
# In contexts as short as --quick's everything would be full attention.
QUICK_OPTIONS = ["--crossover", "512"]
MIN_TOKENS = 2048
PROSE, RECALL = "prose", "recall"
NEED_IDS = ("border", RECALL, PROSE)
ALL_TASKS = [*TASKS, RECALL, PROSE]
# Tokens of a passage that begins again: given, and asked for.
GIVEN, RECALLED = 8, 16
FULL, AS_SERVED = "full", "as served"
Z = 1.96


class Client:
    """A server, ours or another, by its address."""

    def __init__(self, url):
        self.url = url.rstrip("/")
        self.model = self.get("/v1/models")["data"][0]["id"]

    def get(self, path):
        return json.loads(self.read(path))

    def read(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data,
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.read()
        except urllib.error.HTTPError as e:
            text = e.read().decode(errors="replace")
            sys.exit(f"evaluate: {path} answers {e.code}: {text[:500]}")
        except OSError as e:
            sys.exit(f"evaluate: {self.url} does not answer: {e}")

    def complete(self, **body):
        return json.loads(self.read("/v1/completions", {"model": self.model, **body}))

    def chat(self, **body):
        return json.loads(self.read("/v1/chat/completions", {"model": self.model, **body}))

    def tokenise(self, text):
        return json.loads(self.read("/tokenize", {"model": self.model, "prompt": text,
                                                  "add_special_tokens": False}))["tokens"]

    def sparse_rows(self):
        return sum(float(line.split()[-1]) for line in self.read("/metrics").decode().splitlines()
                   if line.startswith("asynctlsd:decode_rows_sparse_total"))


class Results:
    """What has been answered, and in a file if there is one."""

    def __init__(self, path, settings):
        self.path, self.lines = path, []
        if path and path.exists():
            # An interrupted line is the last and has no end.
            whole = path.read_text().split("\n")[:-1]
            try:
                found, *self.lines = [json.loads(line) for line in whole] or [settings]
            except ValueError:
                sys.exit(f"evaluate: {path} is not a file of results")
            if found != settings:
                sys.exit(f"evaluate: {path} has results of other settings ({found}); "
                         "name another file")
        if path:
            path.write_text("".join(json.dumps(x) + "\n" for x in [settings, *self.lines]))
        self.known = {self.key(line) for line in self.lines}

    @staticmethod
    def key(line):
        return line["config"], line["tokens"], line["task"], line["sample"]

    def add(self, line):
        self.lines.append(line)
        self.known.add(self.key(line))
        if self.path:
            with self.path.open("a") as f:
                f.write(json.dumps(line) + "\n")


# ---- asking

def extension(config):
    """How a request says which attention it wants; other servers would refuse the field."""
    return {} if config == AS_SERVED else {"attention": FULL if config == FULL else "sparse"}


def asked_as_text(client, sample, config):
    """Answers as completions of prompts, each of which ends as an answer would begin."""
    prompt, answers = sample.context, []
    for ask in sample.asks:
        tail = " " + ask.tail
        prompt = prompt + (tail if isinstance(prompt, str) else client.tokenise(tail))
        answer = client.complete(prompt=prompt, max_tokens=ask.max_tokens, temperature=0,
                                 **extension(config))["choices"][0]["text"]
        answers.append(answer)
        if ask is not sample.asks[-1]:
            prompt += answer.split(".")[0] + "."
    return answers


def asked_as_chat(client, sample, config):
    messages, answers = [], []
    for n, ask in enumerate(sample.asks):
        before = "" if n else f"Read this text.\n\n{sample.context}\n\n"
        messages.append({"role": "user", "content": before + ask.question})
        # Whole sentences take more room than what is asked for.
        answer = client.chat(messages=messages, max_tokens=ask.max_tokens + 64, temperature=0,
                             **extension(config))["choices"][0]["message"]["content"] or ""
        answers.append(answer)
        messages.append({"role": "assistant", "content": answer})
    return answers


def ask_sample(client, args, maker, task, config):
    sample = TASKS[task](maker)
    answers = (asked_as_chat if args.chat else asked_as_text)(client, sample, config)
    right = sum(right_of(task, a.expected, answer) for a, answer in zip(sample.asks, answers))
    return {"right": right, "of": sum(len(a.expected) for a in sample.asks), "answers": answers}


def next_token(client, ids, config):
    """(log-probability of ids[-1] after all before it, whether it is the likeliest), of a decode
    step; or None where the server does not let itself be led.  The token before the last is forced
    by a bias; the last has a larger one, but ends the text and may not come first.
    Log-probabilities are of the model's own distribution, before biases."""
    *prompt, forced, last = ids
    if forced == last:
        return None
    answer = client.complete(prompt=prompt, max_tokens=2, min_tokens=1, temperature=0, logprobs=1,
                             stop_token_ids=[last], logit_bias={str(forced): 50, str(last): 100},
                             **extension(config))["choices"][0]
    got = answer["logprobs"]
    if answer.get("stop_reason") != last or len(got["token_logprobs"]) != 2:
        return None
    logprob = got["token_logprobs"][1]
    return logprob, logprob >= max(got["top_logprobs"][1].values())


def prose_sample(client, haystack, n_tokens, sample, config):
    """Samples are a few tokens apart at the end of one text, which is computed once."""
    ids = client.tokenise(" ".join(haystack.sentences))
    led = next_token(client, ids[:n_tokens - 7 * sample], config)
    return {"logprob": led[0] if led else None}


def recall_sample(client, maker, config):
    ids = client.tokenise(maker.context([]))
    at = maker.rng.randrange(len(ids) // 2)
    passage = ids[at:at + GIVEN + RECALLED]
    led = [next_token(client, ids + passage[:end + 1], config)
           for end in range(GIVEN, GIVEN + RECALLED)]
    led = [x for x in led if x]
    if not led:
        sys.exit("evaluate: this server does not take tokens by logit_bias and min_tokens; "
                 "leave recall out")
    return {"right": sum(likeliest for _, likeliest in led), "of": len(led)}


def run_group(client, args, haystack, results, config, n_tokens, task):
    """All samples of a task at one length, so far as they are not known."""
    def one(sample):
        maker = Maker(haystack, client.tokenise, n_tokens, sample / max(1, args.samples - 1),
                      f"{args.seed}/{task}/{n_tokens}/{sample}")
        if task == PROSE:
            got = prose_sample(client, haystack, n_tokens, sample, config)
        elif task == RECALL:
            got = recall_sample(client, maker, config)
        else:
            got = ask_sample(client, args, maker, task, config)
        return {"config": config, "tokens": n_tokens, "task": task, "sample": sample, **got}

    missing = [i for i in range(args.samples) if (config, n_tokens, task, i) not in results.known]
    if not missing:
        return
    before = client.sparse_rows() if config != AS_SERVED else 0
    with ThreadPoolExecutor(args.parallel) as pool:
        lines = list(pool.map(one, missing))
    # Up to the crossover there is no sparse attention, and the tables have to say so.
    sparse = client.sparse_rows() > before if config != AS_SERVED else None
    for line in lines:
        results.add({**line, "sparse": sparse})
    print(f"evaluate: {task}, {n_tokens} tokens, {config}", file=sys.stderr, flush=True)


# ---- tables

def wilson(right, n):
    """Bounds of a share that was right in n samples."""
    p, z2 = right / n, Z * Z
    middle, half = p + z2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n)))


def scores(lines):
    return {line["sample"]: line["right"] / line["of"] for line in lines}


def score_cell(own):
    mean = sum(own.values()) / len(own)
    low, high = wilson(mean * len(own), len(own))
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def against(own, full):
    """Samples that full attention answers better, and worse."""
    both = own.keys() & full.keys()
    return f"{sum(own[i] < full[i] for i in both)}, {sum(own[i] > full[i] for i in both)}"


def group(lines, task, n_tokens, config):
    return [x for x in lines
            if (x["task"], x["tokens"], x["config"]) == (task, n_tokens, config)]


def short_of_sparse(found):
    return " (no step was sparse)" if any(x["sparse"] is False for x in found) else ""


def task_table(lines, task, lengths, configs):
    with_full = FULL in configs
    others = [c for c in configs if c != FULL]
    head = ["tokens", "samples"] + [FULL] * with_full
    for c in others:
        head += [c] + ["full better, worse"] * with_full
    rows, cannot = [], []
    for n_tokens in lengths:
        full = scores(group(lines, task, n_tokens, FULL))
        row = [f"{n_tokens:,}", str(len(group(lines, task, n_tokens, configs[0])))]
        if with_full:
            row.append(score_cell(full))
            if sum(full.values()) < len(full) / 2:
                cannot.append(f"{n_tokens:,}")
        for c in others:
            found = group(lines, task, n_tokens, c)
            row.append(score_cell(scores(found)) + short_of_sparse(found))
            if with_full:
                row.append(against(scores(found), full))
        rows.append(row)
    note = (f"\nWith full attention this model gets less than half of it right (at "
            f"{', '.join(cannot)} tokens), so this says little about sparse attention.\n") \
        if cannot else ""
    return table(head, rows) + note


def prose_table(lines, lengths, configs):
    """Perplexity, and by how many nats a configuration is worse than full attention."""
    others = [c for c in configs if c != FULL]
    head = ["tokens", "measured", "perplexity, full"]
    for c in others:
        head += [f"perplexity, {c}", "nats more"]
    rows = []
    for n_tokens in lengths:
        by = {c: {x["sample"]: x["logprob"] for x in group(lines, PROSE, n_tokens, c)}
              for c in configs}
        led = [i for i in by[FULL] if all(by[c].get(i) is not None for c in configs)]
        if len(led) < 2:
            rows.append([f"{n_tokens:,}", str(len(led))] + ["not measured"] * (len(head) - 2))
            continue
        row = [f"{n_tokens:,}", str(len(led)), perplexity([by[FULL][i] for i in led])]
        for c in others:
            found = group(lines, PROSE, n_tokens, c)
            more = [by[FULL][i] - by[c][i] for i in led]
            row += [perplexity([by[c][i] for i in led]) + short_of_sparse(found), interval(more)]
        rows.append(row)
    return table(head, rows)


def perplexity(logprobs):
    return f"{math.exp(-sum(logprobs) / len(logprobs)):.2f}"


def interval(values):
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    return f"{mean:+.3f} ± {Z * spread:.3f}"


def table(head, rows):
    lines = ["| " + " | ".join(r) + " |" for r in [head, *rows]]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines) + "\n"


def report(results, tasks, lengths, configs):
    for task in tasks:
        print(f"\n### {task}\n")
        print(prose_table(results.lines, lengths, configs) if task == PROSE else
              task_table(results.lines, task, lengths, configs), end="")


# ---- the whole

def options_of(config):
    return PUBLISHED if config == "published" else ["--keep-tokens", config]


def haystack_of(args, client, lengths):
    """The prose: a file's, or the model's own, kept beside the results to go on with."""
    kept = args.text or (args.out and args.out.with_suffix(".txt"))
    if args.text or (kept and kept.exists()):
        try:
            text = kept.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            sys.exit(f"evaluate: {kept} cannot be read: {e}")
    else:
        text = write_text(client, max(lengths), args.seed)
        if kept:
            kept.write_text(text, encoding="utf-8")
    sample = text[:20000]
    haystack = Haystack(text, count_tokens(client, sample) * len(text) / len(sample))
    if haystack.tokens_of(text) < max(lengths):
        sys.exit(f"evaluate: the text has {haystack.tokens_of(text):.0f} tokens, "
                 f"fewer than {max(lengths)}")
    return haystack, hashlib.sha256(text.encode()).hexdigest()[:16]


def tasks_of(args):
    # A conversation has no token ids, and another server need not take them.
    known = [t for t in ALL_TASKS if not (args.chat or args.as_served) or t not in NEED_IDS]
    tasks = args.tasks.split(",") if args.tasks else known
    for t in tasks:
        if t not in known:
            sys.exit(f"evaluate: there is no task '{t}' here; there are {', '.join(known)}")
    return tasks


def arguments():
    ap = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--asynctlsd", help="the program (build/asynctlsd)")
    ap.add_argument("--model", help="its model (models/asynctlsd-books-9m)")
    ap.add_argument("--url", help="a running server, instead of starting some")
    ap.add_argument("--as-served", action="store_true",
                    help="with --url: do not ask for full or sparse attention")
    ap.add_argument("--tokens", help=f"lengths of contexts ({LENGTHS})")
    ap.add_argument("--tasks", help=f"of {', '.join(ALL_TASKS)} (all)")
    ap.add_argument("--configs", help="numbers of kept tokens, and published (1024,published)")
    ap.add_argument("--samples", type=int, help="for each task and length (25)")
    ap.add_argument("--quick", action="store_true",
                    help=" ".join(f"--{k} {v}" for k, v in QUICK.items()))
    ap.add_argument("--chat", action="store_true", help="ask in conversations")
    ap.add_argument("--text", type=Path, help="the prose; else the model writes it")
    ap.add_argument("--out", type=Path, help="answers as lines of JSON, to go on with")
    ap.add_argument("--parallel", type=int, default=4, help="samples at a time")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("options", nargs="*", metavar="-- OPTION", help="for the server, after --")
    args = ap.parse_args()
    if args.url and (args.options or args.quick or args.configs or args.model or args.asynctlsd):
        ap.error("with --url no server is started: --asynctlsd, --model, --configs, --quick and "
                 "options of the server say nothing")
    usual = {"asynctlsd": str(ROOT / "build" / "asynctlsd"),
             "model": str(ROOT / "models" / "asynctlsd-books-9m"),
             "tokens": LENGTHS, "samples": 25, "configs": "1024,published"}
    for name, value in (usual | QUICK if args.quick else usual).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.as_served and not args.url:
        ap.error("--as-served needs --url")
    if args.samples < 1 or args.parallel < 1:
        ap.error("--samples and --parallel are at least 1")
    return args


def numbers(text, least, what):
    try:
        values = [int(x) for x in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < least:
        sys.exit(f"evaluate: {what} are whole numbers of at least {least}, not '{text}'")
    return values


def main():
    args = arguments()
    # Ended from outside, it ends the server that it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    tasks, lengths = tasks_of(args), numbers(args.tokens, MIN_TOKENS, "--tokens")
    if args.url:
        configs = [AS_SERVED] if args.as_served else [FULL, "sparse"]
        servers = [(None, configs)]
    else:
        names = args.configs.split(",")
        numbers(",".join(n for n in names if n != "published") or "1", 1,
                "--configs but published")
        configs = [FULL, *names]
        # Full attention is the same under every configuration: the first answers for it.
        servers = [(name, [FULL, name] if name == names[0] else [name]) for name in names]
    options = (QUICK_OPTIONS if args.quick else []) + args.options
    results = haystack = None
    for name, asked in servers:
        server = Server(args, options_of(name) + options) if name else None
        try:
            client = Client(server.url if server else args.url)
            if haystack is None:
                haystack, digest = haystack_of(args, client, lengths)
                results = Results(args.out, {
                    "model": client.model, "text": digest, "seed": args.seed, "chat": args.chat,
                    "samples": args.samples, "options": options})
            for n_tokens in lengths:
                for task in tasks:
                    for config in asked:
                        run_group(client, args, haystack, results, config, n_tokens, task)
        finally:
            if server:
                server.stop()
    report(results, tasks, lengths, configs)


if __name__ == "__main__":
    main()
