#!/usr/bin/env python3
"""Start-up time and throughput of the server with a small model, over HTTP, and what a streamed
token costs beside the model: time of the loop's threads, which do HTTP, JSON and text.

    measure_serving.py [asynctlsd] [model folder] [streams]

16 streams where nothing is said.
"""
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PORT = 8123


def complete(**body):
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/v1/completions",
                                     json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    began = time.time()
    with urllib.request.urlopen(request) as answer:
        usage = json.load(answer)["usage"]
    return usage["completion_tokens"] / (time.time() - began)


def loop_seconds(pid):
    """(user, system) of the threads called loop."""
    user = system = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
        if name == "loop":
            fields = rest.split()
            user += int(fields[11])
            system += int(fields[12])
    return user / os.sysconf("SC_CLK_TCK"), system / os.sysconf("SC_CLK_TCK")


def read_stream(path, body):
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        while answer.read(1 << 16):
            pass


def streamed_token_us(pid, path, body, streams, tokens=1000):
    """User and system time a token, and the tokens a second of a stream."""
    body = dict(body, stream=True, ignore_eos=True, temperature=0.8, max_tokens=tokens)
    threads = [threading.Thread(target=read_stream, args=(path, body)) for _ in range(streams)]
    before, began = loop_seconds(pid), time.time()
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    after, seconds = loop_seconds(pid), time.time() - began
    user, system = ((after[i] - before[i]) / (streams * tokens) * 1e6 for i in range(2))
    return user, system, tokens / seconds


def main():
    if len(sys.argv) > 4 or any(a.startswith("-") for a in sys.argv[1:]):
        sys.exit(__doc__)
    program = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "build" / "asynctlsd")
    model = sys.argv[2] if len(sys.argv) > 2 else str(ROOT / "models" / "asynctlsd-books-9m")
    streams = int(sys.argv[3]) if len(sys.argv) > 3 else 16
    began = time.time()
    server = subprocess.Popen([program, "--model", model, "--port", str(PORT), "--log-level", "warn",
                               "--max-running", str(max(64, streams))],
                              stdout=subprocess.PIPE, text=True)
    try:
        if not server.stdout.readline().startswith("ready"):
            sys.exit("the server did not start")
        print(f"start-up to the ready line: {time.time() - began:.3f} s")
        one = [complete(prompt="The old house", max_tokens=1000, ignore_eos=True, temperature=0)
               for _ in range(3)]
        print(f"one stream: {max(one):.0f} tokens/s")
        many = [complete(prompt="The old house", max_tokens=500, ignore_eos=True, temperature=0.8, n=16)
                for _ in range(3)]
        print(f"16 choices together, sampled: {max(many):.0f} tokens/s")
        for path, body in (
                ("/v1/completions", {"prompt": "The old house"}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]})):
            user, system, rate = streamed_token_us(server.pid, path, body, streams)
            print(f"{path}: a streamed token takes the loop {user:.1f} us, and the kernel "
                  f"{system:.1f} us for it ({streams} streams, {rate:.0f} tokens/s each)")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
