#!/usr/bin/env python3
"""What sparse attention costs, task by task, measured through the server.

    evaluate.py --out build/evaluation.jsonl                       everything, for hours
    evaluate.py --quick                                            minutes, to see that it works
    evaluate.py --tokens 32768,98304 --tasks needle,json_facts --configs 256,1024,published
    evaluate.py --model DIR --chat --text book.txt                 a model that follows instructions
    evaluate.py --url http://127.0.0.1:8000 --text book.txt        a server that is running
    evaluate.py --url http://127.0.0.1:8000 --as-served --text book.txt    one that is not ours
    evaluate.py --configs 1024,filter=bounds,selection=lagged      options of the server, compared
    evaluate.py -- --cpu-threads 8                                 options of the server, for all

Each question is asked with full attention and, for each configuration, with sparse attention;
the prompt, and so the first token of an answer, is always computed with full attention.  A
configuration is what differs from the defaults: a number of kept tokens, options of the server
(filter=bounds+keep-blocks=128), or `published`: bounds of blocks, 128 blocks, 1,024 tokens.  Most
tasks are in evaluation_tasks.py.  Two look at single decode steps: `recall` (a passage begins
again: is its next token the likeliest?) and `prose`, which is no task but the log-probability of
the token that follows a long text.

A sample is a text of its own.  With --questions several things are hidden in it and each is asked
for by itself, where the task has several; that is cheap, because the text is computed once.

A score is the share of what is expected that the answer has, averaged over questions, with a Wilson
interval of 95 % for their number.  Where a question asks for several things that is wider than it
has to be; where questions share a text it is narrower if texts differ.  "Full minus" it is the mean
difference of the same questions, in points of a hundred, with an interval of 95 % that counts texts
and not questions as independent (Agresti and Min's for pairs, which is not empty where no pair
differs).  `within`: that interval lies below one point, so at most one point is lost; `beyond`: it
lies above; `open`: there are too few samples to tell.

Answers are greedy.  With --out every sample is kept as a line of JSON, and an evaluation that was
interrupted goes on where it was.  Needs nothing but Python and the daemon.
"""
import argparse
import hashlib
import json
import math
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

import child_process
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
DEPTHS = 8        # parts of a text in the table of needles
# Tokens between two samples of prose; and of a context, for each thing that is hidden in it.
PROSE_APART, TOKENS_A_QUESTION = 7, 256
FULL, AS_SERVED = "full", "as served"
SCORE_HEAD = ["tokens", "attention", "texts", "questions", "right", "full better, worse",
              "full minus it, points"]
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


def asked_as_text(client, context, asks, config):
    """Answers as completions of prompts, each of which ends as an answer would begin."""
    prompt, answers = context, []
    for ask in asks:
        tail = " " + ask.tail
        prompt = prompt + (tail if isinstance(prompt, str) else client.tokenise(tail))
        answer = client.complete(prompt=prompt, max_tokens=ask.max_tokens, temperature=0,
                                 **extension(config))["choices"][0]["text"]
        answers.append(answer)
        if ask is not asks[-1]:
            prompt += answer.split(".")[0] + "."
    return answers


def asked_as_chat(client, context, asks, config):
    messages, answers = [], []
    for n, ask in enumerate(asks):
        before = "" if n else f"Read this text.\n\n{context}\n\n"
        messages.append({"role": "user", "content": before + ask.question})
        # Whole sentences take more room than what is asked for.
        answer = client.chat(messages=messages, max_tokens=ask.max_tokens + 64, temperature=0,
                             **extension(config))["choices"][0]["message"]["content"] or ""
        answers.append(answer)
        messages.append({"role": "assistant", "content": answer})
    return answers


def ask_sample(client, args, maker, task, config):
    """Of each question the share that is right, and the answers."""
    sample, ask = TASKS[task](maker), asked_as_chat if args.chat else asked_as_text
    scores, answers = [], []
    for asks in sample.questions:
        found = ask(client, sample.context, asks, config)
        right = sum(right_of(task, a.expected, f) for a, f in zip(asks, found))
        scores.append(right / sum(len(a.expected) for a in asks))
        answers.append(found)
    at = {"depths": sample.depths} if sample.depths else {}
    return {"scores": scores, "answers": answers, **at}


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
    led = next_token(client, ids[:n_tokens - PROSE_APART * sample], config)
    return {"logprob": led[0] if led else None}


def recall_sample(client, maker, config):
    ids = client.tokenise(maker.context([]))
    for _ in range(100):
        at = maker.rng.randrange(len(ids) // 2)
        passage = ids[at:at + GIVEN + RECALLED]
        # Where a token comes again at once it cannot be asked for, see next_token().
        if sum(a == b for a, b in zip(passage, passage[1:])) < RECALLED // 2:
            break
    led = [next_token(client, ids + passage[:end + 1], config)
           for end in range(GIVEN, GIVEN + RECALLED)]
    led = [x for x in led if x]
    if not led:
        sys.exit("evaluate: this server does not take tokens by logit_bias and min_tokens; "
                 "leave recall out")
    return {"scores": [sum(likeliest for _, likeliest in led) / len(led)]}


def ask_one(client, args, haystack, config, n_tokens, task, sample):
    maker = Maker(haystack, client.tokenise, n_tokens, sample / max(1, args.samples - 1),
                  f"{args.seed}/{task}/{n_tokens}/{sample}", args.questions)
    if task == PROSE:
        return prose_sample(client, haystack, n_tokens, sample, config)
    if task == RECALL:
        return recall_sample(client, maker, config)
    return ask_sample(client, args, maker, task, config)


def run_task(client, args, haystack, results, configs, n_tokens, task):
    """All samples of a task at one length, so far as they are not known: some texts at a time, and
    those with every configuration, so that they are still in the prefix cache."""
    # Prose is one text: who comes first computes it for all.
    samples = range(args.samples) if task != PROSE else \
        range(min(args.samples * args.questions, n_tokens // 2 // PROSE_APART))
    starts = [0, *range(1, len(samples), args.parallel)] if task == PROSE else \
        range(0, len(samples), args.parallel)
    asked = set()
    with child_process.threads(args.parallel) as pool:
        for start, end in zip(starts, [*starts[1:], len(samples)]):
            for config in configs:
                missing = [i for i in samples[start:end]
                           if (config, n_tokens, task, i) not in results.known]
                if not missing:
                    continue
                before = client.sparse_rows() if config != AS_SERVED else 0
                found = list(pool.map(lambda i: ask_one(client, args, haystack, config, n_tokens,
                                                        task, i), missing))
                # Up to the crossover there is no sparse attention, and the tables have to say so.
                sparse = client.sparse_rows() > before if config != AS_SERVED else None
                for i, got in zip(missing, found):
                    results.add({"config": config, "tokens": n_tokens, "task": task, "sample": i,
                                 **got, "sparse": sparse})
                asked.add(config)
    for config in asked:
        print(f"evaluate: {task}, {n_tokens} tokens, {config}", file=sys.stderr, flush=True)


# ---- tables

def wilson(right, n):
    """Bounds of a share that was right in n samples."""
    p, z2 = right / n, Z * Z
    middle, half = p + z2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n)))


def scores(lines):
    """By text and question."""
    return {(line["tokens"], line["task"], line["sample"], i): score
            for line in lines for i, score in enumerate(line["scores"])}


def score_cell(own):
    mean = sum(own.values()) / len(own)
    low, high = wilson(mean * len(own), len(own))
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def difference(own, full):
    """(mean, low, high) of full minus own, over the questions that both have.  For the interval
    half a pair that full attention wins, half a one that it loses and an even one are added."""
    by_text = {}
    for key in own.keys() & full.keys():
        by_text.setdefault(key[:-1], []).append(full[key] - own[key])
    n = sum(len(d) for d in by_text.values())
    sums = [sum(d) for d in by_text.values()]
    mean = sum(sums) / (n + 2)
    spread = sum(s * s for s in sums) + 1 - sum(sums) ** 2 / (len(sums) + 2)
    half = Z * math.sqrt(spread) / (n + 2)
    return sum(sums) / n, max(-1, mean - half), min(1, mean + half)


def difference_cells(own, full):
    """How many questions full attention answers better and worse, and what that amounts to."""
    both = own.keys() & full.keys()
    if not both:
        return ["", ""]
    mean, low, high = (100 * x for x in difference(own, full))
    verdict = "within" if high <= 1 else "beyond" if low > 1 else "open"
    return [f"{sum(full[i] > own[i] for i in both)}, {sum(full[i] < own[i] for i in both)}",
            f"{mean:+.1f} ({low:+.1f} to {high:+.1f}), {verdict}"]


def group(lines, task, n_tokens, config):
    return [x for x in lines
            if (x["task"], x["tokens"], x["config"]) == (task, n_tokens, config)]


def short_of_sparse(found):
    return " (no step was sparse)" if any(x["sparse"] is False and x["config"] != FULL
                                          for x in found) else ""


def score_rows(n_tokens, by_config):
    """A row for each configuration, beside full attention where that was asked; by_config has the
    lines of each."""
    full, rows = scores(by_config.get(FULL, [])), []
    for config, found in by_config.items():
        own = scores(found)
        if own:
            texts = len({key[:-1] for key in own})
            rows.append([f"{n_tokens:,}", config + short_of_sparse(found), f"{texts}",
                         f"{len(own)}", score_cell(own)]
                        + (difference_cells(own, full) if config != FULL else ["", ""]))
    return rows


def task_table(lines, task, lengths, configs):
    rows, cannot = [], []
    for n_tokens in lengths:
        by_config = {c: group(lines, task, n_tokens, c) for c in configs}
        rows += score_rows(n_tokens, by_config)
        if (full := scores(by_config.get(FULL, []))) and not can_do(full):
            cannot.append(f"{n_tokens:,}")
    note = (f"\nWith full attention this model gets less than half of it right (at "
            f"{', '.join(cannot)} tokens), so this says little about sparse attention.\n") \
        if cannot else ""
    return table(SCORE_HEAD, rows) + note


def can_do(full):
    return sum(full.values()) >= len(full) / 2


def together_table(lines, tasks, lengths, configs):
    """All tasks that the model can do with full attention, in one."""
    rows = []
    for n_tokens in lengths:
        able = [t for t in tasks if t != PROSE
                and (full := scores(group(lines, t, n_tokens, FULL))) and can_do(full)]
        rows += score_rows(n_tokens, {c: [x for t in able for x in group(lines, t, n_tokens, c)]
                                      for c in configs})
    return table(SCORE_HEAD, rows)


def depth_table(lines, lengths, configs):
    """Needles by where they stand; parts of the text in which there is none are left empty."""
    rows = []
    for n_tokens in lengths:
        for config in configs:
            parts = [[] for _ in range(DEPTHS)]
            for line in group(lines, "needle", n_tokens, config):
                for depth, score in zip(line["depths"], line["scores"]):
                    parts[min(DEPTHS - 1, int(depth * DEPTHS))].append(score)
            if any(parts):
                rows.append([f"{n_tokens:,}", config]
                            + [f"{sum(p) / len(p):.2f}" if p else "" for p in parts])
    ends = [f"{100 * i / DEPTHS:g}" for i in range(DEPTHS + 1)]
    return table(["tokens", "attention", *(f"{a} to {b} %" for a, b in zip(ends, ends[1:]))], rows)


def prose_table(lines, lengths, configs):
    """Perplexity, and by how many nats a configuration is worse than full attention."""
    rows = []
    for n_tokens in lengths:
        by = {c: {x["sample"]: x["logprob"] for x in found}
              for c in configs if (found := group(lines, PROSE, n_tokens, c))}
        # A token that one server could not be led to is measured with none.
        led = [i for i in next(iter(by.values()), ())
               if all(b.get(i) is not None for b in by.values())]
        for config in by:
            name = config + short_of_sparse(group(lines, PROSE, n_tokens, config))
            if len(led) < 2:
                rows.append([f"{n_tokens:,}", name, f"{len(led)}", "not measured", ""])
                continue
            more = [by[FULL][i] - by[config][i] for i in led] if FULL in by else []
            rows.append([f"{n_tokens:,}", name, f"{len(led)}",
                         perplexity([by[config][i] for i in led]),
                         interval(more) if more and config != FULL else ""])
    return table(["tokens", "attention", "measured", "perplexity", "nats more than full"], rows)


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


def report(lines, tasks, lengths, configs):
    """All tables, as Markdown."""
    parts = []
    for task in tasks:
        parts += [f"### {task}\n", prose_table(lines, lengths, configs) if task == PROSE else
                  task_table(lines, task, lengths, configs)]
        if task == "needle":
            parts.append("By where in the text the needle stands:\n\n"
                         + depth_table(lines, lengths, configs))
    if FULL in configs and len({*tasks} - {PROSE}) > 1:
        parts += ["### all tasks of which full attention gets half or more right\n",
                  together_table(lines, tasks, lengths, configs)]
    return "\n".join(parts)


# ---- the whole

def options_of(config):
    if config == "published":
        return PUBLISHED
    pairs = [("keep-tokens", config)] if config.isdigit() else \
        [option.split("=", 1) for option in config.split("+")]
    return [word for name, value in pairs for word in (f"--{name}", value)]


def configs_of(text):
    """A wrong option the server refuses; what is no option at all it would not see."""
    names, option = text.split(","), r"[a-z-]+=[^+]+"
    for name in names:
        if not re.fullmatch(rf"published|[1-9]\d*|{option}(\+{option})*", name):
            sys.exit(f"evaluate: '{name}' of --configs is not a number of kept tokens, option=value "
                     "or published")
    if len(set(names)) < len(names):
        sys.exit("evaluate: --configs has one of them twice")
    return names


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
    ap.add_argument("--configs", help="numbers of kept tokens, option=value, published "
                                      "(1024,published)")
    ap.add_argument("--samples", type=int, help="texts for each task and length (25)")
    ap.add_argument("--questions", type=int, default=1,
                    help="about each text, where the task has as many (%(default)s)")
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
    if args.samples < 1 or args.parallel < 1 or args.questions < 1:
        ap.error("--samples, --questions and --parallel are at least 1")
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
    child_process.ends_with_script()
    tasks, lengths = tasks_of(args), numbers(args.tokens, MIN_TOKENS, "--tokens")
    if args.questions > min(lengths) // TOKENS_A_QUESTION:
        sys.exit(f"evaluate: {min(lengths)} tokens have room for "
                 f"{min(lengths) // TOKENS_A_QUESTION} questions, not {args.questions}")
    if args.url:
        configs = [AS_SERVED] if args.as_served else [FULL, "sparse"]
        servers = [(None, configs)]
    else:
        names = configs_of(args.configs)
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
                    "samples": args.samples, "questions": args.questions, "options": options})
            for n_tokens in lengths:
                for task in tasks:
                    run_task(client, args, haystack, results, asked, n_tokens, task)
        finally:
            if server:
                server.stop()
    print("\n" + report(results.lines, tasks, lengths, configs), end="")


if __name__ == "__main__":
    main()
