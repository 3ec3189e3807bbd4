#!/usr/bin/env python3
"""Full attention at its largest batch beside sparse attention with a host tier, over HTTP.

    bench_offload.py --model build/models/qwen3-8b
    bench_offload.py --model build/models/qwen3-8b --lengths 49152 98304 --host-kv-bytes 96gb

For each length of prompts two servers are run, both with --kv-cache-bytes of device memory:
  1. without a host tier: full attention, and then sparse, at the largest batch that fits
  2. with a host tier of --host-kv-bytes: sparse, at 1, 2, 4, ... streams up to what the tier
     holds.  Streams are added to those that run, so that every prompt is computed once.

A figure is of the time in which all streams decode, --window tokens each.  Tokens a second are
the server's count; TPOT is the time between two tokens of a stream, over all streams.  What
crosses the bus for a token is the rows that its step missed, from /metrics; whole blocks that are
stored or loaded meanwhile are counted beside it.  "offloaded" are streams that decode out of the
tier at the end: with --offload auto as many as the device has no room for.

Prompts are random ids, and what is generated is drawn from --ids words that the tokenizer knows
(an id without text makes no event).  How many rows are found on the device depends on the model,
and one with random weights says nothing about others.

--seconds bounds all of it: what would not be done by then is left out, and named.
"""
import argparse
import asyncio
import json
import re
import sys
import time
import urllib.request
from pathlib import Path

import child_process
from bench_gpu_serve import ROOT, Server, Stream, cancel, percentile, prompt_of, until, vocabulary

BLOCK_TOKENS, STEP_TOKENS = 64, 1024
SETTLE = 16                  # tokens of every stream before a window: steps are recorded meanwhile
GUESSED_PREFILL_S = 12       # of 98,304 tokens, until one has been measured
PIN_PATIENCE_S = 20          # without a new block; pinning a GiB takes about a second
SPARE_TOKENS = 256           # of a stream, until the client has sent the next prompts
STOP_S = 20                  # guessed: to unpin the tier


class Bench:
    """The time that is left, what was measured and what was not."""

    def __init__(self, args):
        self.args, self.end = args, time.monotonic() + args.seconds
        words = sorted(i for text, i in vocabulary(args.model).items()
                       if re.fullmatch("[a-z]+", text))
        self.ids = words[:args.ids]
        config = json.loads((args.model / "config.json").read_text())
        dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        self.row_bytes = 4 * dim                  # K and V of a token and KV head, bf16
        self.prefill_s = {}                       # by length: of one prompt
        self.rows, self.left_out, self.notes = [], [], []

    def left(self):
        return self.end - time.monotonic() - STOP_S

    def prefill_estimate(self, length):
        return self.prefill_s.get(length, GUESSED_PREFILL_S * length / 98304)


def batches_up_to(most):
    """1, 2, 4, ... and the largest."""
    sizes = []
    while not sizes or sizes[-1] * 2 < most:
        sizes.append(sizes[-1] * 2 if sizes else 1)
    return sizes + [most] if most > sizes[-1] else sizes


def tokens_wanted(length, most, window):
    """Of a stream that is there from the first window to the last: it gets a token in each step of
    the others' prompts too, and in those between them: half as many is a guess."""
    steps = most * (-(-length // STEP_TOKENS) + 2)
    return steps * 3 // 2 + len(batches_up_to(most)) * (window + 2 * SETTLE) + SPARE_TOKENS


# ---- windows

def check_running(tasks):
    """A stream that ends, ends too early."""
    for task in tasks:
        if task.done():
            raise task.exception() or RuntimeError("a stream ended before it was measured")


async def more_tokens(streams, tasks, n, timeout):
    """Until every stream has n more, or the time is over."""
    marks, end = [len(s.times) + n for s in streams], time.monotonic() + timeout

    def done():
        check_running(tasks)
        return time.monotonic() > end or all(len(s.times) >= m for s, m in zip(streams, marks))
    await until(done, tasks, timeout + 60)


def figures(bench, mode, length, streams, start, end, before, after):
    delta = {k: after[k] - before.get(k, 0) for k in after}
    gaps = [g for s in streams for g in s.gaps(start, end)]
    tokens = delta["generation_tokens_total"]
    hits, misses = delta.get("hot_row_hits_total", 0), delta.get("hot_row_misses_total", 0)
    if not gaps or not tokens:
        raise RuntimeError(f"{mode}, batch {len(streams)}: no tokens in the window")
    return {"mode": mode, "tokens": length, "batch": len(streams),
            "tokens_per_s": tokens / (end - start),
            "step_ms": 1e3 * (end - start) / delta["steps_total"],
            "tpot_p50_ms": 1e3 * percentile(gaps, 0.5), "tpot_p99_ms": 1e3 * percentile(gaps, 0.99),
            "window_s": end - start, "window_tokens": tokens, "window_gaps": len(gaps),
            "offloaded": after.get("num_requests_offloaded", 0),
            "found": hits / (hits + misses) if hits + misses else None,
            "fetched_bytes_per_token": misses * bench.row_bytes / tokens,
            "stored_bytes": delta.get("kv_offload_store_bytes_total", 0),
            "loaded_bytes": delta.get("kv_offload_load_bytes_total", 0),
            "offloads": delta.get("offloads_total", 0),
            "returns": delta.get("offload_returns_total", 0),
            "preemptions": delta["num_preemptions_total"],
            "first_token_s": max(s.times[0] - s.began for s in streams)}


async def measure_window(bench, server, mode, length, streams, tasks):
    loop = asyncio.get_running_loop()
    await more_tokens(streams, tasks, SETTLE, max(bench.left(), 1))
    before, start = await loop.run_in_executor(None, server.metrics), time.monotonic()
    await more_tokens(streams, tasks, bench.args.window, max(bench.left(), 1))
    end, after = time.monotonic(), await loop.run_in_executor(None, server.metrics)
    row = figures(bench, mode, length, streams, start, end, before, after)
    bench.rows.append(row)
    print(line(row), flush=True)


def window_estimate(bench, batch):
    """From the slowest step so far: steps become longer with the batch, at most as it does."""
    slowest = max((r["step_ms"] * max(1, batch / r["batch"]) for r in bench.rows), default=50)
    return (bench.args.window + SETTLE) * slowest * 1e-3


async def measure_batches(bench, server, mode, length, batches, max_tokens, attention, cached):
    """cached: the prompts have been computed on this server and may be in its prefix cache."""
    streams, tasks = [], []
    try:
        for i, batch in enumerate(batches):
            new = batch - len(streams)
            prefill = 0 if cached else new * bench.prefill_estimate(length)
            if prefill + window_estimate(bench, batch) > bench.left():
                bench.left_out += [f"{mode}, {length:,} tokens, batch {b}" for b in batches[i:]]
                break
            began = time.monotonic()
            added = [Stream(server, prompt_of(length, 1000 + len(streams) + j), max_tokens,
                            bench.ids, attention=attention) for j in range(new)]
            streams += added
            tasks += [asyncio.create_task(s.run()) for s in added]

            def all_decode():
                check_running(tasks)
                return all(s.times for s in streams)
            await until(all_decode, tasks, max(bench.left(), 1))
            if not cached:
                bench.prefill_s[length] = (time.monotonic() - began) / new
            await measure_window(bench, server, mode, length, streams, tasks)
    finally:
        await cancel(tasks)


# ---- servers

def with_server(bench, options, use):
    server = Server(bench.args.bin / "asynctlsd", bench.args.model,
                    ["--kv-cache-bytes", bench.args.kv_cache_bytes, "--step-tokens",
                     str(STEP_TOKENS), *options], bench.args.log, max(bench.left(), 1))
    try:
        use(server)
    finally:
        code = server.stop(max(bench.left(), STOP_S))
    if code != 0:
        bench.notes.append(f"a server ended with status {code}, see {bench.args.log}")


def blocks_of(tokens):
    return -(-tokens // BLOCK_TOKENS)


def measure_device(bench, length):
    def use(server):
        # One block more: that is how the scheduler admits.
        most = int(server.metrics()["kv_cache_blocks"]) // (blocks_of(length + max_tokens) + 1)
        if most == 0:
            bench.notes.append(f"full attention: {bench.args.kv_cache_bytes} do not hold "
                               f"{length + max_tokens:,} tokens")
            return
        for mode in ("full", "sparse"):
            cached = any(r["mode"] == "full" and r["tokens"] == length for r in bench.rows)
            asyncio.run(measure_batches(bench, server, mode, length, [most], max_tokens, mode,
                                        cached))

    # One window, but how many streams come before it the server says only then.
    max_tokens = tokens_wanted(length, 8, bench.args.window)
    with_server(bench, ["--max-model-len", str(length + max_tokens)], use)


def take_step(server):
    """The engine looks at what has been pinned when it takes a step."""
    body = json.dumps({"prompt": [300], "max_tokens": 1}).encode()
    urllib.request.urlopen(urllib.request.Request(
        server.url + "/v1/completions", body, {"Content-Type": "application/json"})).read()


def wait_for_tier(bench, server):
    """Blocks of the tier, once all are pinned: that goes on in the background of a new server."""
    planned = re.search(r"host tier \d+ MB: (\d+) blocks", Path(bench.args.log).read_text())
    planned = int(planned[1]) if planned else 0
    began = grown = time.monotonic()
    blocks = 0
    while blocks < planned and time.monotonic() < min(grown + PIN_PATIENCE_S,
                                                      bench.end - STOP_S):
        take_step(server)
        now = int(server.metrics().get("host_kv_blocks", 0))
        if now > blocks:
            blocks, grown = now, time.monotonic()
        time.sleep(0.2)
    if blocks < planned:
        bench.notes.append(f"only {blocks} of {planned} blocks of the tier were pinned after "
                           f"{time.monotonic() - began:.0f} s")
    print(f"host tier: {blocks * BLOCK_TOKENS:,} tokens, pinned {time.monotonic() - began:.1f} s "
          f"after the server was ready", flush=True)
    return blocks


def measure_tier(bench, length):
    def use(server):
        blocks = wait_for_tier(bench, server)
        most = min(blocks // blocks_of(length + max_tokens), bench.args.most)
        if most == 0:
            bench.notes.append(f"host tier: {blocks * BLOCK_TOKENS:,} tokens are no context of "
                               f"{length + max_tokens:,}")
            return
        asyncio.run(measure_batches(bench, server, "host tier", length, batches_up_to(most),
                                    max_tokens, "sparse", False))

    max_tokens = tokens_wanted(length, bench.args.most, bench.args.window)
    with_server(bench, ["--max-model-len", str(length + max_tokens), "--host-kv-bytes",
                        bench.args.host_kv_bytes, "--offload", bench.args.offload,
                        "--max-running", str(bench.args.most)], use)


# ---- results

HEAD = f"{'tokens':>8} {'batch':>5}  {'mode':<9} {'tokens/s':>8} {'ms a step':>9} " \
       f"{'TPOT p50':>8} {'p99':>7} {'offloaded':>9} {'found':>6} {'MB/token':>8}"


def line(r):
    found = f"{100 * r['found']:.1f}%" if r["found"] is not None else "-"
    notes = [f"{r['preemptions']:.0f} preempted"] if r["preemptions"] else []
    if r["window_tokens"] > 1.2 * (r["window_gaps"] + r["batch"]):
        notes.append("more than a token an event: TPOT is too long")
    if r["offloads"] or r["returns"]:
        notes.append(f"{r['offloads']:.0f} left the device and {r['returns']:.0f} came back")
    if r["stored_bytes"] or r["loaded_bytes"]:
        notes.append(f"{r['stored_bytes'] * 1e-6:.0f} MB of blocks stored, "
                     f"{r['loaded_bytes'] * 1e-6:.0f} loaded")
    return f"{r['tokens']:8} {r['batch']:5}  {r['mode']:<9} {r['tokens_per_s']:8.1f} " \
           f"{r['step_ms']:9.2f} {r['tpot_p50_ms']:8.2f} {r['tpot_p99_ms']:7.2f} " \
           f"{r['offloaded']:9.0f} {found:>6} {r['fetched_bytes_per_token'] * 1e-6:8.2f}" \
           + "".join(f"  {n}" for n in notes[:1]) + "".join(f"; {n}" for n in notes[1:])


def conclusion(rows, length):
    full = next((r for r in rows if r["mode"] == "full" and r["tokens"] == length), None)
    tier = max((r for r in rows if r["mode"] == "host tier" and r["tokens"] == length),
               key=lambda r: r["tokens_per_s"], default=None)
    if not full or not tier:
        return None
    return {"tokens": length, "full_batch": full["batch"], "tier_batch": tier["batch"],
            "times": tier["tokens_per_s"] / full["tokens_per_s"]}


def report(bench):
    conclusions = [c for n in bench.args.lengths if (c := conclusion(bench.rows, n))]
    print("\n" + HEAD)
    for r in bench.rows:
        print(line(r))
    for c in conclusions:
        print(f"{c['tokens']:,} tokens: with the host tier, batch {c['tier_batch']}, "
              f"{c['times']:.2f} times the tokens a second of full attention at batch "
              f"{c['full_batch']}")
    for n in bench.notes:
        print(n)
    for what in bench.left_out:
        print(f"left out for lack of time: {what}")
    if bench.args.out:
        arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(bench.args).items()}
        bench.args.out.write_text(json.dumps(
            {"arguments": arguments, "rows": bench.rows, "conclusions": conclusions,
             "notes": bench.notes, "left_out": bench.left_out}, indent=1) + "\n")


def main():
    ap = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--bin", type=Path, default=ROOT / "build", help="folder of the programs")
    ap.add_argument("--model", type=Path, required=True)
    ap.add_argument("--lengths", type=int, nargs="+", default=[98304], help="tokens of a prompt")
    ap.add_argument("--kv-cache-bytes", default="28gb")
    ap.add_argument("--host-kv-bytes", default="80gb")
    ap.add_argument("--offload", choices=("auto", "always"), default="auto")
    ap.add_argument("--most", type=int, default=16, help="streams with the host tier")
    ap.add_argument("--window", type=int, default=200, help="tokens of each stream in a figure")
    ap.add_argument("--ids", type=int, default=256)
    ap.add_argument("--seconds", type=float, default=540)
    ap.add_argument("--out", type=Path, help="file for the figures as JSON")
    ap.add_argument("--log", default="/tmp/bench_offload.log", help="the servers' log")
    bench = Bench(ap.parse_args())
    child_process.ends_with_script()
    failed = False
    print(HEAD, flush=True)
    for length in bench.args.lengths:
        for measure, what in ((measure_device, "the device alone"), (measure_tier, "a host tier")):
            if bench.left() < 2 * bench.prefill_estimate(length):
                bench.left_out.append(f"{length:,} tokens with {what}")
                continue
            try:
                measure(bench, length)
            except (RuntimeError, OSError) as error:
                failed = True
                bench.notes.append(f"{length:,} tokens with {what}: {error}")
    report(bench)
    return failed


if __name__ == "__main__":
    sys.exit(main())
