#!/usr/bin/env python3
"""Tables of two choices that are no options, because kernels are made for them: how the query heads
of a KV head vote, and how many tokens a block has.

    choice_study.py votes
    choice_study.py blocks
    choice_study.py votes --model build/smollm2-135m-instruct --writer models/asynctlsd-books-9m \\
        --tokens 7680
    choice_study.py votes --needles 4 --every 2             steps that look for facts
    choice_study.py votes -- --keep-tokens 512              any option of the server

A model writes texts, and a server the queries, keys and values of steps behind the beginnings of these
(--selection-dump).  All of that stays in --dumps, where the other table finds it again, or the same
one.  Both levels are done again here, with the bits that the product keeps of a key (kernels/layout.h),
and judged by the true attention over the keys as cached:

    mass     share of the attention that what is kept or chosen gets: of the query heads of a KV head
             the mean, and the one that has least
    recall   of the as many tokens that get most (of 1,024 for the filter): how many are kept, chosen
    error    how far attention over the chosen tokens is from full attention, relative to that

In percent, means over layers, KV heads and steps of a text, then over the texts. The other rows say how
much more than the default's it is, in points, with the interval of 95 % of Student's t over the texts.

Votes, of the heads' scores of a block (each head's best of its tokens) or of a token:
    max           the largest: what the engine does
    sum           their sum
    softmax       each head's softmax over all that are scored, summed
    max softmax   the largest of these
    max deviation the largest after each head's mean is taken away, in its standard deviations
    turns         the heads choose in turns, each the best that is left

`engine` is what the server itself chose in these steps, `best` what gets most attention: the most that
any vote could get. Needs numpy. Latent attention is refused.
"""
import argparse
import math
import sys
from collections import defaultdict
from contextlib import redirect_stdout
from pathlib import Path

from selection_dump import Dump, attention, in_blocks, output_error     # before numpy, which it limits
import numpy as np

import child_process
from evaluate_needles import ROOT, Server, write_text
from filter_study import Filter, hadamard, kept
from selection_report import record, table

BLOCK, SIZES = 64, (16, 32, 64, 128)
# Of Student's t, 97.5 %, by degrees of freedom.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
     2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048,
     2.045, 2.042)


# ---- votes: [heads, n] -> [n]

def log_softmax(s):
    s = s - s.max(1, keepdims=True)
    return s - np.log(np.exp(s).sum(1, keepdims=True))


def deviations(s):
    return (s - s.mean(1, keepdims=True)) / (s.std(1, keepdims=True) + 1e-20)


def places(s):
    """0 for each head's best, 1 for its second best, and so on."""
    order = np.argsort(-s, 1, kind="stable")
    found = np.empty_like(order)
    np.put_along_axis(found, order, np.arange(s.shape[1])[None], 1)
    return found


# Logarithms, because most softmax weights are 0 in float.
VOTES = {"max": lambda s: s.max(0),
         "sum": lambda s: s.sum(0),
         "softmax": lambda s: np.logaddexp.reduce(log_softmax(s), 0),
         "max softmax": lambda s: log_softmax(s).max(0),
         "max deviation": lambda s: deviations(s).max(0),
         "turns": lambda s: -(places(s) + np.arange(len(s))[:, None] / len(s)).min(0)}


# ---- a step of one KV head

class Case:
    """The true attention, and how it judges what is kept or chosen."""

    def __init__(self, dump, step, g, keys, values, add):
        """add(row, column, value) collects."""
        h = dump.header
        self.n, self.scale, self.queries, self.add = step.n, float(h["scale"]), step.queries[g], add
        self.sinks, self.recent = int(h["sink_tokens"]), int(h["recent_tokens"])
        self.p = attention(self.queries, keys[:step.n], self.scale)
        self.values = values[:step.n]
        self.full = self.p.astype(np.float32) @ self.values
        self.order = np.argsort(-self.p.mean(0), kind="stable")
        self.budgets = (step.keep_tokens, step.keep_tokens // 2)

    def blocks(self, size):
        """(how many there are, how many of them have no recent token)"""
        return -(-self.n // size), max(self.n - self.recent, 0) // size

    def judge_mass(self, row, where, tokens):
        mass = self.p[:, tokens].sum(1)
        self.add(row, (where, "mass"), mass.mean())
        self.add(row, (where, "least"), mass.min())

    def judge_kept(self, row, where, blocks, size):
        inside = in_blocks(blocks, self.n, size)
        self.judge_mass(row, where, inside)
        self.add(row, (where, "recall"), inside[self.order[:self.budgets[0]]].mean())
        return inside

    def judge_chosen(self, row, where, chosen, budget):
        self.judge_mass(row, where, chosen)
        self.add(row, (where, "recall"), np.isin(self.order[:budget], chosen).mean())
        self.add(row, (where, "error"), output_error(self.p, self.values, chosen, self.full).mean())

    def judge_best_blocks(self, keep, size):
        n_blocks, n_old = self.blocks(size)
        mass = np.add.reduceat(self.p.mean(0), np.arange(0, self.n, size))
        self.judge_kept("best", "filter", kept(mass[:n_old], keep, n_blocks), size)

    def select(self, row, where, index, inside, vote):
        """The product's second level, among the tokens of the kept blocks."""
        candidates = np.flatnonzero(inside)
        votes = VOTES[vote](index[:, candidates]).astype(np.float64)
        votes[(candidates < self.sinks) | (candidates >= self.n - self.recent)] = np.inf
        order = candidates[np.argsort(-votes, kind="stable")]
        for budget in self.budgets:
            self.judge_chosen(row, f"{where}, {budget:,}", order[:budget], budget)


# The two levels' bit planes, rotated as in kernels/layout.h.
COARSE, INDEX = "stored-1", "stored-2"
PI = (0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0x082efa98, 0xec4e6c89)


def product_rotation(dim):
    return hadamard(np.array([-1.0 if PI[d >> 5 & 7] >> (d & 31) & 1 else 1.0 for d in range(dim)]))


class Head:
    """Of a KV head's keys what both levels read: signs, and two bits."""

    def __init__(self, keys, filters, turn):
        """filters: (name, tokens of a block)"""
        self.filters = {f: Filter(f[0], keys, f[1], turn) for f in filters}
        self.index = Filter(INDEX, keys, 1, turn)

    def block_scores(self, case, which):
        return self.filters[which].head_scores(case.queries, case.blocks(which[1])[1]) * case.scale

    def token_scores(self, case):
        return self.index.head_scores(case.queries, case.n) * case.scale


def compare_votes(case, head, step, g):
    scores, index = head.block_scores(case, (COARSE, BLOCK)), head.token_scores(case)
    n_blocks = case.blocks(BLOCK)[0]
    engines = case.judge_kept("engine", "filter", step.kept[g], BLOCK)
    case.judge_chosen("engine", f"both, {len(step.chosen[g]):,}", step.chosen[g], len(step.chosen[g]))
    for vote in VOTES:
        blocks = kept(VOTES[vote](scores), step.keep_blocks, n_blocks)
        inside = case.judge_kept(vote, "filter", blocks, BLOCK)
        case.select(vote, "selection", index, engines, vote)
        case.select(vote, "both", index, inside, vote)
    case.judge_best_blocks(step.keep_blocks, BLOCK)
    for budget in case.budgets:
        for where in ("selection", "both"):
            case.judge_chosen("best", f"{where}, {budget:,}", case.order[:budget], budget)


def compare_blocks(case, head, step, g):
    index = head.token_scores(case)
    for name, size in head.filters:
        scores = head.block_scores(case, (name, size)).max(0)
        for tokens in (step.keep_blocks * BLOCK, step.keep_blocks * BLOCK // 2):
            row = (name, tokens, size)
            inside = case.judge_kept(row, "filter", kept(scores, tokens // size, case.blocks(size)[0]), size)
            case.select(row, "both", index, inside, "max")


STUDIES = {"votes": (compare_votes, [(COARSE, BLOCK)]),
           "blocks": (compare_blocks, [(name, size) for name in (COARSE, "bounds") for size in SIZES])}


def study(dump, what, every):
    """{row: {column: mean over layers, KV heads and steps}}, in the order of the table; and how many
    steps"""
    compare, filters = STUDIES[what]
    sums, counts, n_steps = defaultdict(float), defaultdict(int), 0
    turn = product_rotation(dump.dim)

    def add(row, column, value):
        sums[row, column] += float(value)
        counts[row, column] += 1

    for layer in sorted(dump.records):
        for steps, keys, values in dump.sequences(layer):
            n_steps += len(steps[::every]) if layer == 0 else 0
            for g in range(dump.kv_heads):
                head = Head(keys[g], filters, turn)
                for step in steps[::every]:
                    compare(Case(dump, step, g, keys[g], values[g], add), head, step, g)
    found = defaultdict(dict)
    for (row, column), total in sums.items():
        found[row][column] = total / counts[row, column]
    return found, n_steps


def mean_of(*lengths):
    """Of the same text."""
    return {row: {c: sum(x[row][c] for x in lengths) / len(lengths) for c in columns
                  if all(c in x[row] for x in lengths)} for row, columns in lengths[0].items()}


# ---- what is shown

def difference(own, base):
    """In points, of the same texts: its mean and the interval of 95 %."""
    d = [100 * (a - b) for a, b in zip(own, base)]
    mean = sum(d) / len(d)
    if len(d) < 2:
        return f"{mean:+.2f}"
    spread = math.sqrt(sum((x - mean) ** 2 for x in d) / (len(d) - 1) / len(d))
    return f"{mean:+.2f} ± {T[min(len(d) - 2, len(T) - 1)] * spread:.2f}"


def cell(texts, row, column, base):
    """Of a row that is compared with the row `base`, or of that itself."""
    values = [t[row].get(column) for t in texts]
    if None in values:
        return ""
    if row == base:
        return f"{100 * sum(values) / len(values):.1f}"
    return difference(values, [t[base][column] for t in texts])


def titles(columns):
    return [f"{where}: {measure}" for where, measure in columns]


def votes_tables(texts):
    """The filter and both levels with the same vote; the second level behind the server's filter."""
    for levels in (("filter", "both"), ("selection",)):
        columns = [c for c in texts[0]["max"] if c[0].split(",")[0] in levels]
        rows = [[f"`{row}`" + (", the default" if row == "max" else "")]
                + [cell(texts, row, c, "max") for c in columns]
                for row in (*VOTES, "engine", "best") if any(c in texts[0][row] for c in columns)]
        yield table(["vote", *titles(columns)], rows)


def blocks_tables(texts):
    for name, tokens in dict.fromkeys(row[:2] for row in texts[0]):
        columns = [c for c in texts[0][name, tokens, BLOCK] if c[0] == "filter" or c[1] != "least"]
        rows = [[f"{size}" + (", the default" if size == BLOCK else ""), f"{tokens // size}"]
                + [cell(texts, (name, tokens, size), c, (name, tokens, BLOCK)) for c in columns]
                for size in SIZES]
        what = "coarse" if name == COARSE else name
        yield table([f"`{what}`, {tokens:,} tokens kept in blocks of", "blocks", *titles(columns)], rows)


# ---- the files

def written(args, seed, n_tokens):
    """A file with text that is long enough for all lengths, unless it is there."""
    path = args.dumps / f"text-{n_tokens}-{seed}.txt"
    if not path.exists():
        server = Server(argparse.Namespace(asynctlsd=args.asynctlsd, model=args.writer or args.model), [])
        try:
            path.write_text(write_text(server, n_tokens, seed), encoding="utf-8")
        finally:
            server.stop()
    return path


def recorded(args, text, tokens, seed):
    """The file of what a server does behind the beginning of a text, unless it is there."""
    kind = f"needles{args.needles}" if args.needles else "prose"
    path = args.dumps / f"{kind}-{tokens}-{seed}.dump"
    if not path.exists():
        part = path.with_suffix(".part")
        part.unlink(missing_ok=True)
        with redirect_stdout(sys.stderr):
            record(argparse.Namespace(dump=str(part), text=text, record=tokens, seed=seed, steps=args.steps,
                                      needles=args.needles, asynctlsd=args.asynctlsd, model=args.model),
                   args.options)
        part.rename(path)
    dump = Dump(path)
    if dump.header["latent_dim"] or dump.dim & (dump.dim - 1) or dump.block != BLOCK:
        raise ValueError(f"heads of a power of two channels and blocks of {BLOCK} tokens are looked at, no others")
    return dump


def main():
    words, options = sys.argv[1:], []
    if "--" in words:
        words, options = words[:words.index("--")], words[words.index("--") + 1:]
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("what", choices=STUDIES)
    ap.add_argument("--tokens", default="8192,16384,32768", help="of contexts (%(default)s)")
    ap.add_argument("--texts", type=int, default=4, help="of each length (%(default)s)")
    ap.add_argument("--steps", type=int, default=128, help="behind a text (%(default)s)")
    ap.add_argument("--every", type=int, default=16, help="steps from one to the next (%(default)s)")
    ap.add_argument("--needles", type=int, default=0, help="ask for so many facts in each text instead")
    ap.add_argument("--asynctlsd", default=str(ROOT / "build" / "asynctlsd"))
    ap.add_argument("--model", default=str(ROOT / "models" / "asynctlsd-books-9m"))
    ap.add_argument("--writer", metavar="MODEL", help="that writes the texts (the model itself)")
    ap.add_argument("--dumps", type=Path, help="folder of the files (build/choices/ and the model's name)")
    args = ap.parse_args(words)
    args.options = options
    child_process.ends_with_script()
    args.dumps = args.dumps or ROOT / "build" / "choices" / Path(args.model).name
    args.dumps.mkdir(parents=True, exist_ok=True)
    tables = votes_tables if args.what == "votes" else blocks_tables
    lengths, seeds = [int(t) for t in args.tokens.split(",")], range(1, args.texts + 1)
    texts = [written(args, seed, max(lengths)) for seed in seeds]
    by_length = []
    for tokens in lengths:
        by_length.append([])
        for text, seed in zip(texts, seeds):
            try:
                dump = recorded(args, text, tokens, seed)
            except (OSError, ValueError) as e:
                sys.exit(f"choice_study: {tokens} tokens, text {seed}: {e}")
            found, n_steps = study(dump, args.what, args.every)
            by_length[-1].append(found)
        print(f"{tokens:,} tokens, {len(seeds)} texts, {n_steps} steps of each\n\n"
              + "\n".join(tables(by_length[-1])), flush=True)
    if len(lengths) > 1:
        print("mean of all lengths\n\n" + "\n".join(tables([mean_of(*text) for text in zip(*by_length)])))


if __name__ == "__main__":
    main()
