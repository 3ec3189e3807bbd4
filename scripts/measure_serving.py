#!/usr/bin/env python3
"""Start-up time and throughput of the server with a small model, over HTTP.

    measure_serving.py [asynctlsd] [model folder]
"""
import json
import subprocess
import sys
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


def main():
    if len(sys.argv) > 3 or any(a.startswith("-") for a in sys.argv[1:]):
        sys.exit(__doc__)
    program = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "build" / "asynctlsd")
    model = sys.argv[2] if len(sys.argv) > 2 else str(ROOT / "models" / "asynctlsd-books-9m")
    began = time.time()
    server = subprocess.Popen([program, "--model", model, "--port", str(PORT), "--log-level", "warn"],
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
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
