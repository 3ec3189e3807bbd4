#!/usr/bin/env python3
"""The daemon with a large model on the GPU, measured over HTTP.

    bench_gpu_serve.py --model build/models/qwen3-8b
    bench_gpu_serve.py --model build/models/qwen3-8b --step-tokens 512 1024 2048

For each --step-tokens (default: the server's own) a server is started and
  1. a prompt of --prompt tokens is sent while other streams decode: the time to its first
     token, and the gaps between theirs meanwhile
  2. --streams streams decode at once: tokens/s, and per step the time in all and the
     time that the host works, from /metrics

Prompts are random token ids.  The models that make_model.py writes have more ids than their
tokenizer, and an id without text makes no event; so the token "e" is asked for by logit_bias.
"""
import argparse
import asyncio
import json
import random
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import child_process

ROOT = Path(__file__).resolve().parent.parent
SHORT_PROMPT = 1000
PATIENCE_S = 10             # of a server that is not ready


class Server:
    def __init__(self, program, model, options, log, timeout=600):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = open(log, "w")
        self.loading = []
        began = time.monotonic()
        self.process = subprocess.Popen(
            [program, "--model", str(model), "--port", str(self.port), *options],
            stdout=subprocess.DEVNULL, stderr=self.log)
        try:
            while not self.is_ready():
                if self.process.poll() is not None:
                    raise RuntimeError(f"the server did not start, see {log}")
                if time.monotonic() - began > timeout:
                    raise RuntimeError(f"the server was not ready after {timeout:.0f} s, see {log}")
                time.sleep(0.02)
        except BaseException:
            self.stop(PATIENCE_S)
            raise
        self.start_s = time.monotonic() - began

    def is_ready(self):
        try:
            urllib.request.urlopen(self.url + "/ready").close()
            return True
        except urllib.error.HTTPError as e:
            message = json.load(e)["error"]["message"]
            if message not in self.loading:
                self.loading.append(message)
        except OSError:
            pass
        return False

    def metrics(self):
        """By name, the samples of all labels added up."""
        text = urllib.request.urlopen(self.url + "/metrics").read().decode()
        sums = {}
        for name, value in re.findall(r"^asynctlsd:(\w+)\{[^}]*\} (\S+)$", text, re.M):
            sums[name] = sums.get(name, 0) + float(value)
        return sums

    def stop(self, timeout=30):
        child_process.stop(self.process, timeout)
        self.log.close()
        return self.process.returncode


class Stream:
    """A completion of some ids alone, whose events are timed as they arrive."""

    def __init__(self, server, prompt, max_tokens, ids, **fields):
        self.times = []
        self.body = json.dumps({"prompt": prompt, "max_tokens": max_tokens, "stream": True,
                                "ignore_eos": True, "logit_bias": {str(i): 100 for i in ids},
                                **fields}).encode()
        self.port = server.port
        self.began = None

    async def run(self):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
        self.began = time.monotonic()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json"
                     b"\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(self.body) + self.body)
        try:
            while line := await reader.readline():
                if line.startswith(b"data: {"):
                    if b'"error"' in line:
                        raise RuntimeError(line.decode())
                    self.times.append(time.monotonic())
                elif line.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5")):
                    raise RuntimeError((line + await reader.read()).decode())
        finally:
            writer.close()

    def gaps(self, start, end):
        """Between events of which the later lies in the interval."""
        return [b - a for a, b in zip(self.times, self.times[1:]) if start <= b <= end]


def percentile(values, share):
    values = sorted(values)
    return values[min(len(values) - 1, int(share * len(values)))]


async def until(condition, tasks, timeout):
    """Wait; a task that ended with an error ends the wait with it."""
    end = time.monotonic() + timeout
    while not condition():
        for task in tasks:
            if task.done() and task.exception():
                raise task.exception()
        if time.monotonic() > end:
            raise RuntimeError("no answer in time")
        await asyncio.sleep(0.01)


async def cancel(tasks):
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def prompt_of(n, seed):
    choose = random.Random(seed)
    return [choose.randrange(300, 6000) for _ in range(n)]


async def measure_prefill(server, n_tokens, n_others, ids):
    others = [Stream(server, prompt_of(SHORT_PROMPT, i), 20000, ids) for i in range(n_others)]
    tasks = [asyncio.create_task(s.run()) for s in others]
    try:
        await until(lambda: all(len(s.times) > 100 for s in others), tasks, 60)
        alone = [g for s in others for g in s.gaps(s.times[50], time.monotonic())]
        long = Stream(server, prompt_of(n_tokens, 100), 1, ids)
        await asyncio.wait_for(long.run(), 300)
        during = [g for s in others for g in s.gaps(long.began, long.times[0])]
        return {"tokens": n_tokens, "streams": n_others, "ttft_s": long.times[0] - long.began,
                "gaps": len(during), "gap_alone_ms": 1e3 * percentile(alone, 0.5),
                "gap_p50_ms": 1e3 * percentile(during, 0.5),
                "gap_p99_ms": 1e3 * percentile(during, 0.99), "gap_max_ms": 1e3 * max(during)}
    finally:
        await cancel(tasks)


async def measure_streams(server, n, seconds, ids):
    streams = [Stream(server, prompt_of(SHORT_PROMPT, 1000 + i), 20000, ids) for i in range(n)]
    tasks = [asyncio.create_task(s.run()) for s in streams]
    try:
        # Past 1,024 tokens, where the engine records the steps of longer contexts.
        await until(lambda: all(len(s.times) > 100 for s in streams), tasks, 120)
        loop = asyncio.get_running_loop()
        before, start = await loop.run_in_executor(None, server.metrics), time.monotonic()
        await until(lambda: time.monotonic() > start + seconds, tasks, 2 * seconds)
        after, end = await loop.run_in_executor(None, server.metrics), time.monotonic()
        delta = {k: after[k] - before[k] for k in after}
        gaps = [g for s in streams for g in s.gaps(start, end)]
        return {"streams": n, "tokens_per_s": delta["generation_tokens_total"] / (end - start),
                "steps": delta["steps_total"],
                "step_ms": 1e3 * (end - start) / delta["steps_total"],
                "host_ms": 1e3 * delta["step_host_seconds_total"] / delta["steps_total"],
                "gap_p50_ms": 1e3 * percentile(gaps, 0.5),
                "gap_p99_ms": 1e3 * percentile(gaps, 0.99)}
    finally:
        await cancel(tasks)


def vocabulary(model):
    return json.loads((Path(model) / "tokenizer.json").read_text())["model"]["vocab"]


def measure(program, model, step_tokens, log, n_prompt, n_others, n_streams, seconds):
    """A dictionary of figures for one server."""
    ids = [vocabulary(model)["e"]]
    options = ["--step-tokens", str(step_tokens)] if step_tokens else []
    server = Server(program, model, options, log)
    try:
        figures = {"step_tokens": step_tokens, "start_s": server.start_s,
                   "loading": server.loading[-1:],
                   "prefill": asyncio.run(measure_prefill(server, n_prompt, n_others, ids)),
                   "decode": asyncio.run(measure_streams(server, n_streams, seconds, ids))}
    finally:
        code = server.stop()
    if code != 0:
        raise RuntimeError(f"the server ended with status {code}, see {log}")
    return figures


def sentences(f):
    p, d = f["prefill"], f["decode"]
    yield f"step-tokens {f['step_tokens'] or 'default'}: ready after {f['start_s']:.1f} s" \
          + "".join(f' ("{m}" on the way)' for m in f["loading"])
    yield f"  {p['tokens']} tokens of prompt: {p['ttft_s']:.2f} s to the first token"
    yield f"  gaps of {p['streams']} other streams: {p['gap_alone_ms']:.1f} ms before, " \
          f"meanwhile median {p['gap_p50_ms']:.1f}, p99 {p['gap_p99_ms']:.1f}, " \
          f"largest {p['gap_max_ms']:.1f} ms ({p['gaps']} gaps)"
    yield f"  {d['streams']} streams: {d['tokens_per_s']:.0f} tokens/s, {d['step_ms']:.2f} ms a step, " \
          f"of which the host works {d['host_ms']:.3f}; gaps: median {d['gap_p50_ms']:.1f}, " \
          f"p99 {d['gap_p99_ms']:.1f} ms"


def main():
    ap = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--bin", type=Path, default=ROOT / "build", help="folder of the programs")
    ap.add_argument("--model", type=Path, required=True)
    ap.add_argument("--step-tokens", type=int, nargs="*", default=[0])
    ap.add_argument("--prompt", type=int, default=98304)
    ap.add_argument("--others", type=int, default=4)
    ap.add_argument("--streams", type=int, default=64)
    ap.add_argument("--seconds", type=float, default=5)
    ap.add_argument("--log", default="/dev/null", help="the servers' log")
    args = ap.parse_args()
    child_process.ends_with_script()
    for step_tokens in args.step_tokens:
        try:
            figures = measure(args.bin / "asynctlsd", args.model, step_tokens, args.log,
                              args.prompt, args.others, args.streams, args.seconds)
        except RuntimeError as error:
            sys.exit(str(error))
        print("\n".join(sentences(figures)), flush=True)


if __name__ == "__main__":
    main()
