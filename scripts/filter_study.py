#!/usr/bin/env python3
"""What block filters of other sizes would keep, out of the file that a server writes with
--selection-dump.

    selection_report.py --record 65536 steps.dump
    filter_study.py steps.dump

Each filter scores a block by the best of its tokens (of its bounds) for any query head of the KV
head, as the product's does, and keeps the first, the newest and the best others. From K as cached
the true attention is computed. Means over steps, layers and KV heads:

    bytes    that the filter reads a token and KV head
    mass     share of the attention that the kept blocks get: no choice of tokens among them has more
    least    the same of the layer and KV head that has least
    recall   of the 1,024 tokens that get most attention: how many are in kept blocks

Filters: sign-N       signs of the first of N parts of the rotated key's channels, and a scale
         two-bits-N   two bits of these
         means-N      signs of the mean of the keys of N neighbouring tokens
         bounds       the least and the largest of each channel in a block
         exact        true scores

(choice_study.py has one more, stored-N: N bits of each channel just as the product stores them.)

Needs numpy. Queries and keys of latent attention are refused.
"""
import argparse
import sys
from collections import defaultdict
from pathlib import Path

from selection_dump import Dump, attention, in_blocks     # before numpy, which it limits
import numpy as np

SCALE_BYTES, BEST = 2, 1024
FILTERS = ("exact", "sign-1", "two-bits-2", "sign-2", "two-bits-4", "sign-4", "means-2", "means-4",
           "means-8", "bounds")


def rotation(dim, seed=1):
    """Signs, then Hadamard: orthogonal, and every channel a part of every other."""
    return hadamard(np.random.default_rng(seed).choice([-1.0, 1.0], dim))


def hadamard(signs):
    h = np.ones((1, 1))
    while len(h) < len(signs):
        h = np.block([[h, h], [h, -h]])
    return (h * signs / np.sqrt(len(signs))).astype(np.float32)


def quantised(keys, bits):
    """[n, d] as the format has them: signs, or values 1 and 3 with signs, times a token's scale."""
    levels = np.sign(keys) + (keys == 0)
    if bits == 2:
        levels = levels * np.where(np.abs(keys) > np.abs(keys).mean(1, keepdims=True), 3, 1)
    scale = (keys * levels).sum(1, keepdims=True) / (levels * levels).sum(1, keepdims=True)
    return (levels * scale).astype(np.float32)


def stored(keys, bits):
    """[n, d] as the product has them (kernels/layout.h), but for the scale's rounding."""
    scale = 0.996 * np.sqrt((keys * keys).mean(1, keepdims=True))
    if bits == 1:
        return np.where(keys >= 0, scale, -scale).astype(np.float32)
    return (np.where(keys >= 0, scale, -scale) * np.where(np.abs(keys) >= scale, 1.5, 0.5)).astype(np.float32)


class Filter:
    """Of a KV head's keys [n, dim]; scores of blocks for queries [heads, dim]."""

    def __init__(self, name, keys, block, turn):
        self.name, self.block, self.n = name, block, len(keys)
        number = int(name.rpartition("-")[2]) if "-" in name else 1
        self.channels, self.turn, self.tokens = keys.shape[1], turn, 1
        if name == "exact":
            self.keys = keys
            self.turn = None
        elif name == "bounds":
            whole = len(keys) // block * block
            parts = keys[:whole].reshape(-1, block, keys.shape[1])
            self.low, self.high = parts.min(1), parts.max(1)
        elif name.startswith("means"):
            self.tokens = number
            whole = len(keys) // number * number
            means = keys[:whole].reshape(-1, number, keys.shape[1]).mean(1)
            self.keys = quantised(means @ turn.T, 1)
        elif name.startswith("stored"):
            self.keys = stored(keys @ turn.T, number)
        else:
            self.channels //= number
            self.keys = quantised((keys @ turn.T)[:, :self.channels],
                                  2 if name.startswith("two") else 1)

    def bytes(self):
        if self.name == "exact":
            return 2 * self.channels
        if self.name == "bounds":
            return 2 * 2 * self.channels / self.block
        return (self.channels * (2 if self.name.startswith("two") else 1) / 8 + SCALE_BYTES) / self.tokens

    def head_scores(self, queries, n_blocks):
        """[heads, n_blocks]: of the first n_blocks, which are whole."""
        if self.name == "bounds":
            low, high = self.low[:n_blocks], self.high[:n_blocks]
            return np.array([np.maximum(q * low, q * high).sum(1) for q in queries])
        q = queries if self.turn is None else (queries @ self.turn.T)[:, :self.channels]
        rows = self.block // self.tokens
        return (q @ self.keys[:n_blocks * rows].T).reshape(len(q), n_blocks, rows).max(2)

    def scores(self, queries, n_blocks):
        return self.head_scores(queries, n_blocks).max(0)


def kept(scores, keep, n_blocks):
    """Numbers of the kept blocks of a context: the first, the newest, which have no scores, and the
    best others."""
    newest = np.arange(len(scores), n_blocks)
    others = keep - len(newest)
    if others >= len(scores):
        return np.arange(n_blocks)
    scores = scores.copy()
    scores[0] = np.inf
    return np.append(np.argpartition(-scores, others - 1)[:others], newest)


def study(dump, keeps, every):
    """{(filter, keep): {(layer, KV head): [mass, recall, steps]}}"""
    turn, found = rotation(dump.dim), defaultdict(lambda: defaultdict(lambda: np.zeros(3)))
    for layer in sorted(dump.records):
        for steps, keys, _ in dump.sequences(layer):
            for g in range(dump.kv_heads):
                filters = [Filter(name, keys[g], dump.block, turn) for name in FILTERS]
                for step in steps[::every]:
                    judge(dump, step, g, keys[g], filters, keeps, found, (layer, g))
    return found


def judge(dump, step, g, keys, filters, keeps, found, where):
    p = attention(step.queries[g], keys[:step.n], dump.header["scale"])
    best = np.argpartition(-p.mean(0), BEST - 1)[:BEST]
    n_blocks = (step.n + dump.block - 1) // dump.block
    for f in filters:
        scores = f.scores(step.queries[g], n_blocks - 1)
        for keep in keeps:
            inside = in_blocks(kept(scores, keep, n_blocks), step.n, dump.block)
            found[f.name, keep][where] += [p[:, inside].sum(1).mean(), inside[best].mean(), 1]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("dump", type=Path)
    ap.add_argument("--keep-blocks", default="64,128", help="(%(default)s)")
    ap.add_argument("--every", type=int, default=4, help="steps from one to the next (%(default)s)")
    args = ap.parse_args()
    try:
        dump = Dump(args.dump)
    except (OSError, ValueError) as e:
        sys.exit(f"filter_study: {args.dump}: {e}")
    if dump.header["latent_dim"] or dump.dim & (dump.dim - 1):
        sys.exit("filter_study: heads of a power of two channels with K and V are looked at, no others")
    keeps = [int(k) for k in args.keep_blocks.split(",")]
    found = study(dump, keeps, args.every)
    if not found:
        sys.exit(f"filter_study: {args.dump} has no steps")
    print("| filter | bytes |" + "".join(f" mass, {k} blocks | least | recall |" for k in keeps))
    print("|---|---|" + "---|---|---|" * len(keeps))
    one = np.zeros((dump.block, dump.dim), np.float32)
    for name in FILTERS:
        cells = [f"`{name}`", f"{Filter(name, one, dump.block, rotation(dump.dim)).bytes():.0f}"]
        for keep in keeps:
            heads = found[name, keep].values()
            mass, recall, n = sum(heads)
            cells += [f"{mass / n:.3f}", f"{min(h[0] / h[2] for h in heads):.3f}", f"{recall / n:.3f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
