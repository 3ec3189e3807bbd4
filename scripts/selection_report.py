#!/usr/bin/env python3
"""Judges what sparse decode steps selected, out of a file that the server wrote.

    asynctlsd --model DIR --selection-dump steps.dump      then ask for something long
    selection_report.py steps.dump
    selection_report.py steps.dump --json report.json --plot report.png

    selection_report.py --record 16384 steps.dump          it asks by itself: steps behind a prompt
    selection_report.py --record 16384 steps.dump -- --selection lagged     any option of the server

The file has the engine's own selection, its queries, and K and V as cached
(engine/run/selection_dump.h); from these the true attention is computed here. For each
layer and KV head, means over the steps of all sequences:

    mass     share of the attention that the chosen tokens get; over the query heads of the
             KV head, and the least that one of them got in a step
    best     the same of the as many tokens that get most: no choice is better
    blocks   the same of all tokens of the kept blocks
    error    how far attention over the chosen tokens is from full attention, relative to that
    recall   of those best tokens: how many are in kept blocks, how many are chosen
    lagged   mass of what the step before chose, and the new token; of the blocks it chose
             among, and the newest
    again    share of the kept blocks, of the chosen tokens, that were it d steps before
    hot      share of chosen rows outside the newest block that a set of hot rows of so many
             times the chosen tokens would have, in the second half of a sequence's steps:
             a simulation of the rule in kernels/hot_rows.h

Where sequences were off the device in truth, rows as the engine itself counts them follow by
layer, simulated with its own sets. Needs numpy, and matplotlib for --plot.

With --record a server is started that writes the file. The prompt is prose of so many tokens, the
model's own (sampled with fixed seeds) unless there is --text, and sampled with a fixed seed is what
follows; or, with --needles, facts stand in the prose and are asked for, each in a sequence.
"""
import argparse
import json
import re
import sys
from collections import defaultdict, deque
from pathlib import Path

from selection_dump import Dump, attention, in_blocks, output_error     # before numpy, which it limits
import numpy as np

import child_process
from evaluate_needles import ROOT, Server, count_tokens, cut_to, write_text
from evaluation_tasks import TASKS, Haystack, Maker

FILTERS, INDEXES = ("bounds", "coarse", "means"), ("rotated", "channels")
SELECTIONS = ("exact", "lagged")
DISTANCES = (1, 2, 4, 8, 16, 32, 64, 128)
SIZES = (1, 2, 4, 8, 16, 32)


# ---- what is measured

class Ring:
    """Hot rows of one KV head: kernels/hot_rows.h, rule 2."""

    def __init__(self, rows, keep_tokens, positions):
        self.idle = rows // keep_tokens
        self.position, self.used = np.full(rows, -1), np.zeros(rows, np.int64)
        self.row_of = np.full(positions, -1)
        self.hand = 0

    def use(self, chosen, step):
        """How many of the chosen it has; then it has all."""
        rows = self.row_of[chosen]
        hits = rows >= 0
        self.used[rows[hits]] = step
        missing = chosen[~hits]
        if len(missing):
            order = (self.hand + np.arange(len(self.position))) % len(self.position)
            free = order[(self.position[order] < 0) | (step - self.used[order] >= self.idle)]
            into = free[:len(missing)]
            gone = self.position[into]
            self.row_of[gone[gone >= 0]] = -1
            self.position[into], self.used[into], self.row_of[missing] = missing, step, into
            self.hand = (into[-1] + 1) % len(self.position)
        return int(hits.sum())


class Means(defaultdict):
    """Sums and counts by name."""

    def __init__(self):
        super().__init__(lambda: [0.0, 0.0])

    def add(self, name, value, count=1.0):
        self[name][0] += float(value)
        self[name][1] += count

    def mean(self, name):
        total, count = self[name] if name in self else (0.0, 0.0)
        return total / count if count else None


class Head:
    """A KV head of a layer in one sequence."""

    def __init__(self, means, positions, n_steps, keep_tokens, block):
        self.means, self.n_steps, self.block = means, n_steps, block
        self.before = deque(maxlen=max(DISTANCES))     # (context, kept, chosen), the last one first
        self.rings = {size: Ring(size * keep_tokens, keep_tokens, positions) for size in SIZES}
        self.seen = 0

    def step(self, step, p, values, kept, chosen):
        """p: [heads, n] of the KV head's query heads."""
        means, n = self.means, step.n
        inside = in_blocks(kept, n, self.block)
        best = np.argpartition(-p.mean(0), len(chosen) - 1)[:len(chosen)]
        taken = np.zeros(n, bool)
        taken[chosen] = True
        mass = p[:, chosen].sum(1)
        means.add("mass", mass.mean())
        means.least = min(means.least, float(mass.min()))
        means.add("best", p[:, best].sum(1).mean())
        means.add("blocks", p[:, inside].sum(1).mean())
        means.add("error", output_error(p, values, chosen).mean())
        means.add("recall_blocks", inside[best].mean())
        means.add("recall_tokens", taken[best].mean())
        self._overlap(n, kept, chosen, taken)
        self._lagged(n, p, mass, inside, best)
        self._hot(step, chosen[chosen < (n - 1) // self.block * self.block])
        self.before.appendleft((n, kept, chosen))

    def _overlap(self, n, kept, chosen, taken):
        kept_now = set(kept.tolist())
        for d in DISTANCES:
            if len(self.before) < d or self.before[d - 1][0] != n - d:
                continue
            _, blocks, tokens = self.before[d - 1]
            self.means.add(f"again_blocks_{d}", len(kept_now.intersection(blocks.tolist())), len(kept))
            self.means.add(f"again_tokens_{d}", taken[tokens].sum(), len(chosen))

    def _lagged(self, n, p, mass, inside, best):
        if not self.before or self.before[0][0] != n - 1:
            return
        _, blocks, tokens = self.before[0]
        self.means.add("lagged_exact_tokens", mass.mean())     # of the same steps, as the next
        self.means.add("lagged_exact_blocks", p[:, inside].sum(1).mean())
        inside = in_blocks(np.append(blocks, (n - 1) // self.block), n, self.block)
        self.means.add("lagged_tokens", (p[:, tokens].sum(1) + p[:, n - 1]).mean())
        self.means.add("lagged_blocks", p[:, inside].sum(1).mean())
        self.means.add("lagged_recall", inside[best].mean())

    def _hot(self, step, chosen):
        self.seen += 1
        for size, ring in self.rings.items():
            found = ring.use(chosen, step.number)
            if 2 * self.seen > self.n_steps:
                self.means.add(f"hot_{size}", found, len(chosen))


class Sets:
    """The engine's own sets of a sequence in a layer: what it counts."""

    def __init__(self):
        self.rings, self.counts = None, {"hits": 0, "misses": 0, "resident": 0}

    def step(self, step, positions, block):
        if not step.hot_rows:
            self.rings = None
            return
        if not self.rings:
            self.rings = [Ring(step.hot_rows, step.keep_tokens, positions) for _ in step.chosen]
        for ring, chosen in zip(self.rings, step.chosen):
            away = chosen[~step.on_device[chosen // block]]
            hits = ring.use(away, step.number)
            self.counts["hits"] += hits
            self.counts["misses"] += len(away) - hits
            self.counts["resident"] += len(chosen) - len(away)


def measure_sequence(dump, steps, keys, values, heads, engine):
    """All steps of a sequence in one layer; heads: their means, by KV head."""
    positions = keys.shape[1]
    states = [Head(means, positions, len(steps), steps[0].keep_tokens, dump.block) for means in heads]
    sets = Sets()
    for step in steps:
        sets.step(step, positions, dump.block)
        for g, state in enumerate(states):
            p = attention(step.queries[g], keys[g, :step.n], dump.header["scale"])
            state.step(step, p, values[g, :step.n], step.kept[g], step.chosen[g])
    for name, n in sets.counts.items():
        engine[name] += n


def summary(means):
    """Of one KV head, or of several together."""
    def by(prefix, keys):
        return {str(k): means.mean(f"{prefix}_{k}") for k in keys if f"{prefix}_{k}" in means}
    values = {name: means.mean(name) for name in (
        "mass", "best", "blocks", "error", "recall_blocks", "recall_tokens")}
    return {"steps": int(means["mass"][1]), **values, "mass_least": means.least,
            "lagged": {name: means.mean(f"lagged_{name}") for name in
                       ("exact_tokens", "exact_blocks", "tokens", "blocks", "recall")},
            "again_blocks": by("again_blocks", DISTANCES), "again_tokens": by("again_tokens", DISTANCES),
            "hot": by("hot", SIZES)}


def new_means():
    means = Means()
    means.least = 1.0
    return means


def merged(all_means):
    total = new_means()
    for means in all_means:
        total.least = min(total.least, means.least)
        for name, (value, count) in means.items():
            total.add(name, value, count)
    return total


def report(dump):
    h, layers, everything, longest = dump.header, [], [], 0
    for layer in sorted(dump.records):
        heads = [new_means() for _ in range(dump.kv_heads)]
        engine = {"hits": 0, "misses": 0, "resident": 0}
        for steps, keys, values in dump.sequences(layer):
            measure_sequence(dump, steps, keys, values, heads, engine)
            longest = max(longest, keys.shape[1])
        if not heads[0]["mass"][1]:
            continue                        # rows alone
        everything += heads
        layers.append({"layer": layer, "heads": [summary(means) for means in heads],
                       "engine_hot_rows": engine})
    if not layers:
        raise ValueError("it has no sparse step: contexts must be longer than the crossover")
    return {"filter": FILTERS[h["filter"]], "token_index": INDEXES[h["index"]],
            "selection": SELECTIONS[h["selection"]], "latent": bool(h["latent_dim"]),
            "longest_context": longest, "sequences": len({s for r in dump.records.values() for s in r}),
            "all": summary(merged(everything)), "layers": layers}


# ---- a server that writes the file

def record_needles(server, args, haystack):
    """A sequence for each question; their steps are those that write the answers."""
    maker = Maker(haystack, None, args.record, 0.5, f"{args.seed}/needles", args.needles)
    sample, right = TASKS["needle"](maker), 0
    for (ask,) in sample.questions:
        answer = server.complete(prompt=f"{sample.context} {ask.tail}", max_tokens=ask.max_tokens,
                                 temperature=0)
        found = re.match(r"\s*(\d+)", answer["choices"][0]["text"])
        right += bool(found) and found[1] == ask.expected[0]
    print(f"{answer['usage']['prompt_tokens']} tokens of prompt, {right} of {args.needles} needles found")


def record(args, options):
    if Path(args.dump).exists():
        raise ValueError("it is there already")
    server = Server(args, ["--selection-dump", args.dump, *options])
    try:
        text = args.text.read_text(encoding="utf-8") if args.text else \
            write_text(server, args.record, args.seed)
        sample = text[:20000]
        tokens = count_tokens(server, sample) * len(text) / len(sample)
        if tokens < args.record:
            raise ValueError(f"the text has {tokens:.0f} tokens, fewer than {args.record}")
        if args.needles:
            record_needles(server, args, Haystack(text, tokens))
        else:
            answer = server.complete(prompt=cut_to(text, args.record, tokens),
                                     max_tokens=args.steps + 1, temperature=0.9, top_k=100,
                                     seed=args.seed, ignore_eos=True)
            print(f"{answer['usage']['prompt_tokens']} tokens of prompt, {args.steps} steps")
    finally:
        server.stop()
    if not Path(args.dump).exists():
        raise ValueError("there was no sparse step: contexts must be longer than the crossover")


# ---- what is shown

def number(x, digits=3):
    return "" if x is None else f"{x:.{digits}f}"


def cells(x):
    return [number(x["mass"], 4), number(x["mass_least"], 4), number(x["best"], 4),
            number(x["blocks"], 4), number(x["error"], 4), number(x["recall_blocks"]),
            number(x["recall_tokens"]), number(x["lagged"]["tokens"], 4),
            number(x["lagged"]["blocks"], 4), number(x["again_blocks"].get("1")),
            number(x["again_tokens"].get("1"))]


def table(head, rows):
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines) + "\n"


def text_of(r):
    every = r["all"]
    rows = [[str(x["layer"]), str(g), *cells(head)] for x in r["layers"] for g, head in enumerate(x["heads"])]
    out = [f"{r['sequences']} sequences, {r['layers'][0]['heads'][0]['steps']} sparse steps, contexts of "
           f"up to {r['longest_context']} tokens; filter {r['filter']}, token-index {r['token_index']}, "
           f"selection {r['selection']}{', latent attention' if r['latent'] else ''}\n",
           table("layer|head|mass|least|best|blocks|error|recall, blocks|recall, tokens|lagged, tokens|"
                 "lagged, blocks|again, blocks|again, tokens".split("|"), rows + [["all", "all", *cells(every)]])]
    for name, x, what in (("again", every["again_tokens"], "tokens chosen again after so many steps"),
                          ("again", every["again_blocks"], "blocks kept again after so many steps"),
                          ("hot", every["hot"], "hot rows, times the chosen: found, simulated")):
        if x:
            out.append(table([what, *x], [[name, *(number(v) for v in x.values())]]))
    if any(any(x["engine_hot_rows"].values()) for x in r["layers"]):
        out.append(table(["layer", "found", "fetched", "on the device"],
                         [[str(x["layer"]), *(str(x["engine_hot_rows"][k]) for k in
                                              ("hits", "misses", "resident"))] for x in r["layers"]]))
    return "\n".join(out)


def plot(r, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    layers = [x["layer"] for x in r["layers"]]
    figure, axes = plt.subplots(2, 3, figsize=(14, 7.5), layout="constrained")

    def by_layer(ax, pick, label, marker):
        points = [(x["layer"], pick(head)) for x in r["layers"] for head in x["heads"]]
        points = [(x, y) for x, y in points if y is not None]
        if points:
            ax.plot(*zip(*points), marker, label=label, alpha=0.7)

    def finish(ax, **how):
        ax.set(**how)
        ax.grid(alpha=0.3)
        ax.legend()

    for name, label, marker in (("blocks", "kept blocks", "s"), ("best", "best tokens", "_"),
                                ("mass", "chosen tokens", "o")):
        by_layer(axes[0][0], lambda head: head[name], label, marker)
    finish(axes[0][0], xlabel="layer", ylabel="attention mass, a point a KV head", xticks=layers)
    for name, label, marker in (("recall_blocks", "in kept blocks", "s"), ("recall_tokens", "chosen", "o")):
        by_layer(axes[0][1], lambda head: head[name], label, marker)
    finish(axes[0][1], xlabel="layer", ylabel="recall of the best tokens", xticks=layers)
    lost = np.array([[1 - head["mass"] for head in x["heads"]] for x in r["layers"]]).T
    image = axes[0][2].imshow(lost, aspect="auto", cmap="magma_r", vmin=0)
    axes[0][2].set(xlabel="layer", ylabel="KV head", xticks=range(len(layers)), xticklabels=layers,
                   yticks=range(len(lost)), title="attention mass that is left out")
    figure.colorbar(image, ax=axes[0][2])
    for name, label in (("again_blocks", "blocks"), ("again_tokens", "tokens")):
        x = r["all"][name]
        axes[1][0].plot([int(d) for d in x], list(x.values()), "o-", label=label)
    powers = matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}")
    finish(axes[1][0], xlabel="steps apart", ylabel="selected again", ylim=(0, 1))
    hot = r["all"]["hot"]
    axes[1][1].plot([int(s) for s in hot], list(hot.values()), "o-", label="ring of hot rows, simulated")
    finish(axes[1][1], xlabel="rows, times the chosen tokens", ylabel="found", ylim=(0, 1))
    for ax in axes[1][:2]:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(powers)
    for name, label, marker in (("exact_blocks", "this step's blocks", "s"),
                                ("blocks", "blocks of the step before", "+"),
                                ("exact_tokens", "this step's tokens", "o"),
                                ("tokens", "tokens of the step before", "x")):
        by_layer(axes[1][2], lambda head: head["lagged"][name], label, marker)
    finish(axes[1][2], xlabel="layer", ylabel="attention mass", xticks=layers)
    figure.suptitle(f"{r['filter']}, {r['token_index']}, {r['selection']}: contexts of up to "
                    f"{r['longest_context']} tokens")
    figure.savefig(path, dpi=80)


def main():
    words, options = sys.argv[1:], []
    if "--" in words:
        words, options = words[:words.index("--")], words[words.index("--") + 1:]
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("dump", help="the file of --selection-dump")
    p.add_argument("--record", type=int, metavar="TOKENS", help="have a server write it first")
    p.add_argument("--steps", type=int, default=256, help="with --record: sparse steps (%(default)s)")
    p.add_argument("--needles", type=int, default=0,
                   help="with --record: hide so many facts and ask for each")
    p.add_argument("--text", type=Path, help="with --record: the prose; else the model writes it")
    p.add_argument("--seed", type=int, default=1, help="with --record")
    p.add_argument("--asynctlsd", default=str(ROOT / "build" / "asynctlsd"), help="with --record")
    p.add_argument("--model", default=str(ROOT / "models" / "asynctlsd-books-9m"), help="with --record")
    p.add_argument("--json", help="write all figures to this file")
    p.add_argument("--plot", help="write a PNG to this file (needs matplotlib)")
    o = p.parse_args(words)
    child_process.ends_with_script()
    if o.plot:
        try:
            import matplotlib  # noqa: F401: missing it is better known before than after
        except ImportError:
            p.error("--plot needs matplotlib")
    if (options or o.needles) and not o.record:
        p.error("options of the server and --needles go with --record")
    try:
        if o.record:
            record(o, options)
        r = report(Dump(o.dump))
    except (OSError, ValueError) as e:
        sys.exit(f"selection_report: {o.dump}: {e}")
    print(text_of(r), end="")
    if o.json:
        Path(o.json).write_text(json.dumps(r, indent=1) + "\n")
    if o.plot:
        plot(r, o.plot)


if __name__ == "__main__":
    main()
