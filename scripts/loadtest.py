#!/usr/bin/env python3
"""Loads a server that speaks the OpenAI HTTP API, and measures what its clients see.

    loadtest.py --concurrency 16 --duration 60
    loadtest.py --rate 4 --requests 500 --prompt-tokens 'lognormal(800,1)' --output-tokens 'uniform(50,400)'
    loadtest.py --scenario documents --concurrency 4 --requests 40 --goodput ttft:20000 --goodput tpot:60
    loadtest.py --url http://other:8000/v1 --key "$KEY" --rate 4 --duration 60 --json other.json

Arrivals are a closed loop (--concurrency clients, each asks again when it has its answer) or a Poisson
process (--rate), which does not wait for the server: times then count from the moment a request was due.

Lengths are a number, uniform(low,high), lognormal(median,sigma), file(path) with a number a line, or a
mixture of these: 0.9*lognormal(200,1)+0.1*64000. Prompts are made of words; how many tokens a word is
the server is asked first, and reports tell what it counted.

    TTFT   due (or sent) to the first text        ITL   between pieces of text as they arrive
    TPOT   (E2E - TTFT) / (tokens - 1)            E2E   due (or sent) to the last text
"""
import argparse
import asyncio
import json
import math
import os
import random
import re
import signal
import ssl
import sys
import time
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

WORDS = ("the old house stood at end of road and nobody had lived in it for many years when she came back "
         "from sea with her brother who said nothing about night they left or what was found below stairs "
         "winter before while town slept under snow as if river itself wanted to keep its own counsel").split()

# prompt tokens, output tokens, tokens that all prompts begin with
SCENARIOS = {
    "chat": ("lognormal(300,0.9)", "lognormal(150,0.7)", 100),
    "documents": ("lognormal(32000,0.5)", "lognormal(250,0.5)", 0),
    "mixed": ("0.9*lognormal(300,0.9)+0.1*lognormal(32000,0.5)", "lognormal(150,0.7)", 100),
    "one-document": ("40000", "lognormal(150,0.5)", 39000),
}
PERCENTILES = (50, 90, 95, 99)
MEASURES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "E2E"}
MAX_LINE_BYTES = 1 << 24


# ---- lengths

class Lengths:
    """A distribution of lengths in tokens; all are at least 1."""

    def __init__(self, text):
        self.terms = [self._term(term) for term in text.split("+")]
        self.weights = [weight for weight, _ in self.terms]
        if not sum(self.weights) > 0:
            raise argparse.ArgumentTypeError(f"the weights of '{text}' are all 0")

    @staticmethod
    def _term(text):
        m = re.fullmatch(r"(?:([0-9.]+)\*)?(?:(\d+)|(uniform|lognormal)\(([0-9.]+),([0-9.]+)\)|file\((.+)\))",
                         text.strip())
        if not m:
            raise argparse.ArgumentTypeError(
                f"'{text}' is not a number, uniform(low,high), lognormal(median,sigma) or file(path)")
        try:
            weight = float(m[1] or 1)
            if m[2]:
                number = int(m[2])
                return weight, lambda rng: number
            if m[6]:
                numbers = [int(line) for line in Path(m[6]).read_text().split()]
                if not numbers:
                    raise argparse.ArgumentTypeError(f"{m[6]} has no numbers")
                return weight, lambda rng: rng.choice(numbers)
            a, b = float(m[4]), float(m[5])
        except (ValueError, OSError) as e:
            raise argparse.ArgumentTypeError(f"'{text}': {e}")
        if m[3] == "uniform" and a > b or m[3] == "lognormal" and a <= 0:
            raise argparse.ArgumentTypeError(f"'{text}' has no such lengths")
        if m[3] == "uniform":
            return weight, lambda rng: rng.uniform(a, b)
        return weight, lambda rng: rng.lognormvariate(math.log(a), b)

    def draw(self, rng):
        (_, draw), = rng.choices(self.terms, self.weights)
        return max(1, round(draw(rng)))


def percentile(ordered, p):
    at = (len(ordered) - 1) * p / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


# ---- HTTP

class Refused(Exception):
    """An answer that is not a stream: its status and what it says."""

    def __init__(self, status, text):
        super().__init__(f"{status}: {text}")
        self.status = status


class Server:
    def __init__(self, url, key):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            sys.exit(f"loadtest: --url is '{url}', not http://host:port/path")
        self.host, self.base = parts.hostname, parts.path.rstrip("/")
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.port = parts.port or (443 if self.tls else 80)
        self.head = f"Host: {parts.netloc.rpartition('@')[2]}\r\nConnection: close\r\nAccept-Encoding: identity\r\n"
        if key:
            self.head += f"Authorization: Bearer {key}\r\n"

    async def ask(self, method, path, body=None):
        """The answer's body in pieces, as they arrive; Refused unless the status is 200."""
        data = json.dumps(body).encode() if body is not None else b""
        reader, writer = await asyncio.open_connection(self.host, self.port, ssl=self.tls,
                                                       limit=MAX_LINE_BYTES)
        try:
            head = f"{method} {self.base}{path} HTTP/1.1\r\n{self.head}"
            if body is not None:
                head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
            writer.write(head.encode() + b"\r\n" + data)
            await writer.drain()
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            status = int(lines[0].split()[1])
            headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
            pieces = self._body(reader, headers)
            if status != 200:
                raise Refused(status, b"".join([p async for p in pieces])[:300].decode(errors="replace"))
            async for piece in pieces:
                yield piece
        finally:
            writer.close()

    @staticmethod
    async def _body(reader, headers):
        if headers.get("transfer-encoding", "").lower() == "chunked":
            while n := int((await reader.readline()).split(b";")[0], 16):
                yield await reader.readexactly(n)
                await reader.readexactly(2)
        elif "content-length" in headers:
            yield await reader.readexactly(int(headers["content-length"]))
        else:
            while piece := await reader.read(65536):
                yield piece

    async def json(self, method, path, body=None):
        return json.loads(b"".join([p async for p in self.ask(method, path, body)]))

    async def events(self, path, body):
        """The documents of an event stream; comments and other fields are skipped."""
        rest = b""
        async with aclosing(self.ask("POST", path, body)) as pieces:
            async for piece in pieces:
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    if line.startswith(b"data:") and (text := line[5:].strip()) != b"[DONE]":
                        yield json.loads(text)


# ---- one request

@dataclass
class Record:
    """What one request saw; times in seconds since the start."""
    due: float
    want_tokens: int
    cancel_after: int | None           # pieces of text; None: never
    outcome: str = "open"              # ok, cancelled, rejected (429, 503), failed
    why: str = ""
    times: list = field(default_factory=list)     # of each piece of text
    end: float = 0
    prompt_tokens: int = 0
    tokens: int = 0

    @property
    def ttft(self):
        return self.times[0] - self.due

    @property
    def e2e(self):
        return self.times[-1] - self.due

    @property
    def tpot(self):
        return (self.times[-1] - self.times[0]) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def itl(self):
        return [b - a for a, b in zip(self.times, self.times[1:])]


def has_text(document):
    for choice in document.get("choices", ()):
        delta = choice.get("delta") or {}
        if choice.get("text") or any(delta.get(k) for k in ("content", "reasoning_content", "tool_calls")):
            return True
    return False


def has_ended(document):
    return any(choice.get("finish_reason") for choice in document.get("choices", ()))


class Load:
    def __init__(self, options, server):
        self.o, self.server = options, server
        self.rng = random.Random(options.seed)
        self.records, self.tasks = [], set()
        self.stopped = False
        self.model = options.model
        self.words_per_token = 1.0
        self.start = 0.0
        self.pieces = 0

    def now(self):
        return time.monotonic() - self.start

    # What is asked

    def words(self, tokens, rng):
        return " ".join(rng.choices(WORDS, k=max(1, round(tokens * self.words_per_token))))

    def prompt(self, tokens):
        shared = min(self.o.shared_prefix, tokens)
        common = self.words(shared, random.Random(self.o.seed)) + " " if shared else ""
        return common + (self.words(tokens - shared, self.rng) if tokens > shared else "")

    def body(self, prompt, max_tokens):
        body = {"model": self.model, "max_tokens": max_tokens, "stream": True,
                "stream_options": {"include_usage": True}}
        if self.o.api == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        if self.o.ignore_eos:
            body["ignore_eos"] = True
        return dict(body, **self.o.extra)

    @property
    def path(self):
        return "/chat/completions" if self.o.api == "chat" else "/completions"

    # Asking

    async def prepare(self, words_per_token=None):
        """Who is served, and how long words are for it, or for another server where it is given."""
        if not self.model:
            self.model = (await self.server.json("GET", "/models"))["data"][0]["id"]
        usage = None
        async for document in self.server.events(self.path, self.body(self.words(400, random.Random(1)), 1)):
            usage = document.get("usage") or usage
        if not usage and not words_per_token:
            sys.exit(f"{self.server.host}:{self.server.port} does not tell usage in streams; lengths cannot be set")
        self.words_per_token = words_per_token or 400 / usage["prompt_tokens"]

    async def one(self, record, body):
        try:
            async with asyncio.timeout(self.o.timeout):
                await self.read(record, body)
        except TimeoutError:
            record.outcome, record.why = "failed", f"nothing after {self.o.timeout:g} s"
        except Refused as e:
            record.outcome, record.why = "rejected" if e.status in (429, 503) else "failed", str(e)
        except (OSError, EOFError, ValueError, IndexError, asyncio.LimitOverrunError) as e:
            record.outcome, record.why = "failed", repr(e)
        record.end = self.now()

    async def read(self, record, body):
        if record.cancel_after == 0:
            # Somewhere on its way through the queue and the prompt.
            reading = asyncio.ensure_future(self.read_stream(record, body))
            await asyncio.wait([reading], timeout=self.rng.expovariate(10))
            if not reading.done():
                reading.cancel()
                await asyncio.wait([reading])
                record.outcome = "cancelled"
                return
            return reading.result()
        return await self.read_stream(record, body)

    async def read_stream(self, record, body):
        async with aclosing(self.server.events(self.path, body)) as stream:
            async for document in stream:
                if "error" in document:
                    record.outcome, record.why = "failed", json.dumps(document["error"])[:300]
                    return
                if usage := document.get("usage"):
                    record.prompt_tokens, record.tokens = usage["prompt_tokens"], usage["completion_tokens"]
                # An answer may be empty: then its end is all there is to time.
                if not has_text(document) and (record.times or not has_ended(document)):
                    continue
                record.times.append(self.now())
                self.pieces += 1
                if record.cancel_after and len(record.times) >= record.cancel_after:
                    record.outcome = "cancelled"
                    return
        record.tokens = record.tokens or len(record.times)
        if not record.times:
            record.outcome, record.why = "failed", "a stream without an end"
        else:
            record.outcome = "ok"

    def next(self, due):
        prompt, want = self.o.prompt_tokens.draw(self.rng), self.o.output_tokens.draw(self.rng)
        cancel = self.rng.randrange(want) if self.rng.random() < self.o.cancel else None
        record = Record(due, want, cancel)
        self.records.append(record)
        return record, self.body(self.prompt(prompt), want)

    def is_over(self):
        return (self.stopped or (self.o.requests and len(self.records) >= self.o.requests)
                or (self.o.duration and self.now() >= self.o.duration))

    async def client(self):
        while not self.is_over():
            record, body = self.next(0)
            record.due = self.now()
            await self.one(record, body)
            if record.outcome in ("rejected", "failed"):
                await asyncio.sleep(0.2)       # not a storm of refusals

    async def poisson(self):
        due = 0.0
        while True:
            due += self.rng.expovariate(self.o.rate)
            while not self.stopped and (wait := due - self.now()) > 0:
                await asyncio.sleep(min(wait, 0.2))
            if self.is_over() or (self.o.duration and due > self.o.duration):
                break
            task = asyncio.ensure_future(self.one(*self.next(due)))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        await asyncio.gather(*self.tasks)

    async def progress(self):
        pieces, tty = 0, sys.stderr.isatty()
        while True:
            await asyncio.sleep(1)
            n = self.outcomes()
            print(f"{self.now():6.0f} s  {len(self.records)} sent, {n['open']} open, {n['ok']} done, "
                  f"{n['cancelled']} cancelled, {n['rejected']} rejected, {n['failed']} failed, "
                  f"{self.pieces - pieces} pieces/s" + "   ", end="\r" if tty else "\n",
                  file=sys.stderr, flush=True)
            pieces = self.pieces

    def outcomes(self):
        counts = dict.fromkeys(("open", "ok", "cancelled", "rejected", "failed"), 0)
        for r in self.records:
            counts[r.outcome] += 1
        return counts

    async def run(self, words_per_token=None):
        await self.prepare(words_per_token)
        self.start = time.monotonic()
        loop = asyncio.get_running_loop()
        main = asyncio.ensure_future(self.poisson() if self.o.rate else
                                     asyncio.gather(*(self.client() for _ in range(self.o.concurrency))))
        loop.add_signal_handler(signal.SIGINT, self.stop, main)
        shown = asyncio.ensure_future(self.progress()) if not self.o.quiet else None
        await asyncio.wait([main])
        if shown:
            shown.cancel()
            print(file=sys.stderr)
        if not main.cancelled():
            main.result()

    def stop(self, main):
        """The first interrupt lets open requests finish, the second does not."""
        if self.stopped:
            main.cancel()
        self.stopped = True


# ---- what comes of it

def summary(values):
    ordered = sorted(v * 1000 for v in values)
    if not ordered:
        return None
    return dict({"mean": sum(ordered) / len(ordered)},
                **{f"p{p}": percentile(ordered, p) for p in PERCENTILES}, max=ordered[-1], n=len(ordered))


def is_good(record, goals):
    seen = {"ttft": record.ttft, "tpot": record.tpot or 0, "e2e": record.e2e}
    return all(seen[name] * 1000 <= limit for name, limit in goals.items())


def report(load):
    o, done = load.o, [r for r in load.records if r.outcome == "ok"]
    seconds = max((r.end for r in load.records), default=0) or 1
    reasons = {}
    for r in load.records:
        if r.why:
            reasons[r.why] = reasons.get(r.why, 0) + 1
    out = {
        "server": o.url, "model": load.model, "api": o.api, "seed": o.seed,
        "arrivals": {"poisson_per_s": o.rate} if o.rate else {"closed_loop_clients": o.concurrency},
        "seconds": seconds, "requests": load.outcomes(), "reasons": reasons,
        "prompt_tokens": sum(r.prompt_tokens for r in done), "output_tokens": sum(r.tokens for r in done),
        "requests_per_s": len(done) / seconds,
        "output_tokens_per_s": sum(r.tokens for r in done) / seconds,
        "total_tokens_per_s": sum(r.tokens + r.prompt_tokens for r in done) / seconds,
        "ttft_ms": summary([r.ttft for r in done]),
        "tpot_ms": summary([r.tpot for r in done if r.tpot is not None]),
        "itl_ms": summary([gap for r in done for gap in r.itl]),
        "e2e_ms": summary([r.e2e for r in done]),
    }
    if o.goodput:
        good = [r for r in done if is_good(r, o.goodput)]
        counted = sum(out["requests"][k] for k in ("ok", "rejected", "failed", "open"))
        out["goodput"] = {"goals_ms": o.goodput, "requests_per_s": len(good) / seconds,
                          "share": len(good) / counted if counted else 0}
    return out


def table(r):
    n = r["requests"]
    lines = [f"{r['model']} at {r['server']}, {r['seconds']:.1f} s",
             f"  requests      {n['ok']} done, {n['cancelled']} cancelled, {n['rejected']} rejected, "
             f"{n['failed']} failed" + (f", {n['open']} cut off" if n["open"] else ""),
             f"  tokens        {r['prompt_tokens']} in, {r['output_tokens']} out",
             f"  throughput    {r['requests_per_s']:.2f} requests/s, {r['output_tokens_per_s']:.1f} output "
             f"tokens/s, {r['total_tokens_per_s']:.1f} tokens/s in all"]
    if "goodput" in r:
        goals = ", ".join(f"{MEASURES[k]} <= {v:g} ms" for k, v in r["goodput"]["goals_ms"].items())
        lines.append(f"  goodput       {r['goodput']['requests_per_s']:.2f} requests/s, "
                     f"{100 * r['goodput']['share']:.1f} % ({goals})")
    columns = ["mean", *(f"p{p}" for p in PERCENTILES), "max"]
    lines.append(f"\n  {'ms':<6}" + "".join(f"{c:>11}" for c in columns))
    for key, name in MEASURES.items():
        if s := r[key + "_ms"]:
            lines.append(f"  {name:<6}" + "".join(f"{s[c]:>11.1f}" for c in columns))
    for why, times in sorted(r["reasons"].items(), key=lambda item: -item[1])[:5]:
        lines.append(f"  {times} x {why}")
    return "\n".join(lines)


def plot(load, r, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    done = [x for x in load.records if x.outcome == "ok"]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    groups = {"TTFT": [x.ttft for x in done], "E2E": [x.e2e for x in done],
              "TPOT": [x.tpot for x in done if x.tpot is not None],
              "ITL": [gap for x in done for gap in x.itl]}
    for ax, names in ((axes[0][0], ("TTFT", "E2E")), (axes[0][1], ("TPOT", "ITL"))):
        for name in names:
            values = sorted(1000 * v for v in groups[name])
            if values:
                ax.plot(values, [100 * (i + 1) / len(values) for i in range(len(values))], label=name)
        ax.set(xlabel="ms", ylabel="% of them at most", xscale="log", ylim=(0, 100))
        ax.grid(alpha=0.3)
        ax.legend()
    bins = max(1, math.ceil(r["seconds"]))
    pieces = [0] * bins
    for x in load.records:
        for t in x.times:
            pieces[min(bins - 1, int(t))] += 1
    axes[1][0].step(range(bins), pieces, where="post")
    axes[1][0].set(xlabel="s", ylabel="pieces of text a second", ylim=(0, None))
    changes = sorted([(x.due, 1) for x in load.records] + [(x.end or r["seconds"], -1) for x in load.records])
    n_open, series = 0, []
    for when, change in changes:
        n_open += change
        series.append((when, n_open))
    axes[1][1].step(*zip(*series), where="post")
    axes[1][1].set(xlabel="s", ylabel="open requests", ylim=(0, None))
    figure.suptitle(f"{r['model']}: {r['output_tokens_per_s']:.0f} output tokens/s, "
                    f"{r['requests_per_s']:.2f} requests/s")
    figure.savefig(path, dpi=110)


# ---- the command line

def goal(text):
    m = re.fullmatch(r"(ttft|tpot|e2e):([0-9.]+)", text)
    if not m:
        raise argparse.ArgumentTypeError(f"'{text}' is not ttft:MS, tpot:MS or e2e:MS")
    return m[1], float(m[2])


def fields(text):
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"'{text}' is not a JSON object")
    return value


def above_zero(kind):
    def parse(text):
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not more than 0")
        return value
    parse.__name__ = kind.__name__
    return parse


def share(text):
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def add_load_options(p):
    """What is asked, when, and where it is reported: not who is asked."""
    p.add_argument("--api", choices=("completions", "chat"), default="completions", help="[%(default)s]")
    arrivals = p.add_mutually_exclusive_group(required=True)
    arrivals.add_argument("--concurrency", type=above_zero(int), help="closed loop of so many clients")
    arrivals.add_argument("--rate", type=above_zero(float), help="Poisson arrivals a second")
    p.add_argument("--requests", type=above_zero(int), help="end after so many")
    p.add_argument("--scenario", choices=SCENARIOS, default="chat",
                   help="lengths where the next three do not say [%(default)s]")
    p.add_argument("--prompt-tokens", type=Lengths)
    p.add_argument("--output-tokens", type=Lengths)
    p.add_argument("--shared-prefix", type=int, help="tokens that all prompts begin with")
    p.add_argument("--goodput", type=goal, action="append", default=[],
                   help="goal, as ttft:500, tpot:50 or e2e:10000 in ms; may be repeated")
    p.add_argument("--timeout", type=above_zero(float), default=900, help="of a request in s [%(default)s]")
    p.add_argument("--seed", type=int, default=1, help="[%(default)s]")
    p.add_argument("--json", help="write the report to this file")
    p.add_argument("--plot", help="write a PNG to this file (needs matplotlib)")
    p.add_argument("--quiet", action="store_true", help="no progress")


def complete_load_options(p, o):
    prompt, output, prefix = SCENARIOS[o.scenario]
    o.prompt_tokens = o.prompt_tokens or Lengths(prompt)
    o.output_tokens = o.output_tokens or Lengths(output)
    if o.shared_prefix is None:
        o.shared_prefix = prefix
    if o.shared_prefix < 0:
        p.error("--shared-prefix is less than 0")
    o.goodput = dict(o.goodput)
    if o.plot:
        try:
            import matplotlib  # noqa: F401: missing it is better known before the load than after
        except ImportError:
            p.error("--plot needs matplotlib")


def parse_options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--url", default="http://127.0.0.1:8000/v1", help="base URL [%(default)s]")
    p.add_argument("--key", default=os.environ.get("OPENAI_API_KEY"), help="API key [$OPENAI_API_KEY]")
    p.add_argument("--model", help="[the first that the server lists]")
    p.add_argument("--duration", type=above_zero(float), help="ask for so many seconds")
    p.add_argument("--cancel", type=share, default=0, help="share of requests cut off at a random place")
    p.add_argument("--ignore-eos", action="store_true", help="send ignore_eos, which OpenAI's own servers refuse")
    p.add_argument("--extra", type=fields, default={}, help="more fields of the body, as JSON")
    add_load_options(p)
    o = p.parse_args()
    if not o.requests and not o.duration:
        p.error("one of --requests and --duration is needed")
    complete_load_options(p, o)
    return o


def main():
    o = parse_options()
    load = Load(o, Server(o.url, o.key))
    try:
        asyncio.run(load.run())
    except (OSError, EOFError, Refused, ValueError, LookupError) as e:
        sys.exit(f"loadtest: {o.url}: {e}")
    r = report(load)
    print(table(r))
    if o.json:
        Path(o.json).write_text(json.dumps(r, indent=1) + "\n")
    if o.plot:
        plot(load, r, o.plot)
    return 0 if r["requests"]["ok"] and not r["requests"]["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
