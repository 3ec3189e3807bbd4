#!/usr/bin/env python3
"""A prompt that the KV pool cannot hold, beside the same where it can, over HTTP.

    bench_streamed.py --model build/models/qwen3-8b
    bench_streamed.py --model build/models/qwen3-8b --prompt 98304 --pool 6gb --ample 20gb

Two servers are run one after the other, with the same random prompt: one whose pool holds all of
it, and one with less and a host tier, through which the prompt streams.  Printed are the times to
the first token and between the others, and whether the texts and logprobs are the same.  --seconds
is the most a request may take.
"""
import argparse
import json
import sys
import time
import urllib.request
from pathlib import Path

import child_process
from bench_gpu_serve import ROOT, Server, percentile, prompt_of


def complete(server, prompt, n, timeout, **fields):
    """Times of the events, and the text and logprobs that they carry."""
    body = {"prompt": prompt, "max_tokens": n, "stream": True, "temperature": 0,
            "ignore_eos": True, "logprobs": 1, **fields}
    request = urllib.request.Request(server.url + "/v1/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    began, times, text, logprobs = time.monotonic(), [], "", []
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            times.append(time.monotonic() - began)
            text += event["choices"][0]["text"]
            logprobs += event["choices"][0]["logprobs"]["token_logprobs"]
    return times, (text, logprobs)


def measure(args, options, prompt):
    server = Server(args.bin / "asynctlsd", args.model,
                    ["--max-model-len", str(args.prompt + args.tokens), "--step-tokens",
                     str(args.step_tokens), *options], args.log)
    try:
        complete(server, prompt[:300], 2, args.seconds)      # whatever is made at first use
        while options[-2] == "--host-kv-bytes" and not server.metrics().get("host_kv_blocks"):
            time.sleep(0.2)
        times, said = complete(server, prompt, args.tokens, args.seconds)
        metrics = server.metrics()
    finally:
        server.stop()
    gaps = [b - a for a, b in zip(times, times[1:])]
    return times[0], percentile(gaps, 0.5) if gaps else 0, said, metrics


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    ap.add_argument("--bin", type=Path, default=ROOT / "build", help="folder of the programs")
    ap.add_argument("--model", type=Path, required=True)
    ap.add_argument("--prompt", type=int, default=98304)
    ap.add_argument("--tokens", type=int, default=64)
    ap.add_argument("--step-tokens", type=int, default=1024)
    ap.add_argument("--pool", default="6gb")
    ap.add_argument("--host", default="20gb", help="host tier")
    ap.add_argument("--ample", default="20gb", help="pool that holds the prompt")
    ap.add_argument("--seconds", type=float, default=300)
    ap.add_argument("--log", default="/tmp/bench_streamed.log", help="the servers' log")
    args = ap.parse_args()
    child_process.ends_with_script()
    prompt = prompt_of(args.prompt, 1)
    rows = []
    for name, options in (("ample", ["--kv-cache-bytes", args.ample]),
                          ("streamed", ["--kv-cache-bytes", args.pool, "--host-kv-bytes", args.host])):
        first, gap, said, metrics = measure(args, options, prompt)
        rows.append((first, said))
        print(f"{name:>9}: {args.prompt} tokens, first token after {first:.2f} s, then one every "
              f"{gap * 1000:.2f} ms; {metrics.get('kv_offload_store_bytes_total', 0) / 1e9:.1f} GB "
              f"stored", flush=True)
    same = rows[0][1] == rows[1][1]
    print(f"{rows[1][0] / rows[0][0]:.2f} times as long; texts and logprobs "
          f"{'are the same' if same else 'DIFFER'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
