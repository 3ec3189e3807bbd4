#!/usr/bin/env python3
"""What a host tier costs those who do not need it, over HTTP.

    bench_tier.py --model build/models/qwen3-8b
    bench_tier.py --model build/models/qwen3-8b --prompt 49152 --streams 4 --pool 40gb

Two servers are run by turns, --rounds times each, with the same pool, which holds everything: one
without a tier, and one with a tier that every block is copied to as it fills.  In each, a prompt is
computed alone, then --streams prompts together, which then decode.  Printed are the least time to
the first token of the lone prompt, and the median time between two tokens while all decode.
"""
import argparse
import re
import sys
import time
from pathlib import Path

import child_process
from bench_gpu_serve import ROOT, Server, percentile, prompt_of, vocabulary
from bench_streamed import complete


def all_decode(streams):
    """Gaps of every stream in the time in which all of them decode: (began, times) each."""
    start = max(began + times[0] for began, times in streams)
    end = min(began + times[-1] for began, times in streams)
    at = [[began + t for t in times] for began, times in streams]
    return [b - a for times in at for a, b in zip(times, times[1:]) if start <= a and b <= end]


def measure(args, options, seed):
    word = vocabulary(args.model)["e"]   # an id without text makes no event
    length = args.prompt + args.tokens * (args.streams + 1)
    server = Server(args.bin / "asynctlsd", args.model,
                    ["--kv-cache-bytes", args.pool, "--max-model-len", str(length), *options],
                    args.log)
    try:
        complete(server, prompt_of(300, 1), 2, args.seconds)     # whatever is made at first use
        planned = re.search(r"host tier \d+ MB: (\d+) blocks", Path(args.log).read_text())
        while planned and server.metrics().get("host_kv_blocks", 0) < int(planned[1]):
            time.sleep(0.2)                                      # pinning disturbs
            complete(server, [300], 1, args.seconds)             # the engine looks when it steps
        first, _ = complete(server, prompt_of(args.prompt, seed), 2, args.seconds)

        def one(i):
            began = time.monotonic()
            # Who comes first waits for the others' prompts meanwhile decoding.
            n = args.tokens + 3 * (args.streams - i) * args.prompt // 1024 // 2
            return began, complete(server, prompt_of(args.prompt, seed + 1 + i), n,
                                   args.seconds, logit_bias={str(word): 100})[0]
        with child_process.threads(args.streams) as pool:
            streams = list(pool.map(one, range(args.streams)))
        stored = server.metrics().get("kv_offload_store_bytes_total", 0)
    finally:
        server.stop()
    return first[0], percentile(all_decode(streams), 0.5), stored


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    ap.add_argument("--bin", type=Path, default=ROOT / "build", help="folder of the programs")
    ap.add_argument("--model", type=Path, required=True)
    ap.add_argument("--prompt", type=int, default=98304)
    ap.add_argument("--streams", type=int, default=2)
    ap.add_argument("--tokens", type=int, default=256, help="while all decode, about")
    ap.add_argument("--pool", default="48gb")
    ap.add_argument("--host", default="60gb", help="host tier")
    ap.add_argument("--rounds", type=int, default=2)
    ap.add_argument("--seconds", type=float, default=300, help="the most a request may take")
    ap.add_argument("--log", default="/tmp/bench_tier.log", help="the servers' log")
    args = ap.parse_args()
    child_process.ends_with_script()
    best = {}
    for round_ in range(args.rounds):
        for name, options in (("no tier", []), ("tier", ["--host-kv-bytes", args.host])):
            first, gap, stored = measure(args, options, 100 * round_ + 1)
            old = best.get(name, (first, gap))
            best[name] = (min(first, old[0]), min(gap, old[1]))
            print(f"{name:>8}: {args.prompt} tokens, first token after {first:.3f} s; "
                  f"{args.streams} streams, a token every {1000 * gap:.3f} ms; "
                  f"{stored / 1e9:.1f} GB stored", flush=True)
    (first, gap), (tier_first, tier_gap) = best["no tier"], best["tier"]
    print(f"with the tier a prompt takes {100 * (tier_first / first - 1):+.2f} %, "
          f"a step {100 * (tier_gap / gap - 1):+.2f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
