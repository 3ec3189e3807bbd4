#!/usr/bin/env python3
"""Puts the same load on several servers, one after the other, and prints them side by side.

    compare.py --server asynctlsd=build/smollm2-135m-instruct --server llama.cpp=SmolLM2.gguf \\
        --concurrency 4 --requests 32
    compare.py --server asynctlsd=DIR --server vllm=DIR --server transformers=DIR \\
        --scenario documents --context 131072 --concurrency 8 --requests 40 --json it.json --plot it.png
    compare.py --server ours=http://127.0.0.1:8000/v1 --server theirs=http://127.0.0.1:8001/v1 --rate 4 --requests 200

A server is NAME=WHAT.  Where WHAT is an URL it runs already.  Else WHAT is a model, and NAME says what is
started with it, on a free port of loopback, and ended when its turn is over:

    asynctlsd      build/asynctlsd              a folder
    llama.cpp      llama-server                 a GGUF file
    vllm           vllm serve                   a folder
    transformers   transformers serve           a folder (needs the packages of transformers[serving])

--program and --options say which program that is and what else it gets; one of these names may stand for
several servers with something behind a dot, as in vllm.eager=DIR with --options 'vllm.eager=--enforce-eager'.

The load is loadtest.py's, whose --help explains it: the n-th request has the same text and the same length of
answer for all, made with the first server's tokens.  Before it each server gets one request to warm up.
Each is asked not to end an answer early, in the words of the kind that its name says, else with ignore_eos
(--fields changes them).  What it did all the same is counted: a column whose lengths are not the ones asked
for, or that has failures, is marked as not comparable.
Only servers of the same weights, or of the same shape, can be compared, and that is not looked at.  One that
runs already may remember the prompts of an earlier comparison; another --seed makes others.
"""
import argparse
import asyncio
import copy
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import child_process
import loadtest

ROOT = Path(__file__).resolve().parent.parent
SLOTS_AT_RATE = 16            # of llama.cpp, where --rate does not say how many requests are open
PROMPTS_DIFFER = 0.05         # of the first server's tokens: another tokenizer, or a text that was cut
IGNORE_EOS = {"ignore_eos": True}


@dataclass
class Kind:
    """How one is started, when it is ready, and what makes it answer at full length."""
    command: str
    options: str
    ready: str
    fields: dict


KINDS = {
    "asynctlsd": Kind(str(ROOT / "build" / "asynctlsd"),
                      "--model {model} --port {port} --max-model-len {context} --log-level warn",
                      "/ready", IGNORE_EOS),
    # Its context is divided among its slots.
    "llama.cpp": Kind("llama-server",
                      "--model {model} --port {port} --parallel {slots} --ctx-size {slots_context}",
                      "/health", IGNORE_EOS),
    "vllm": Kind("vllm serve", "{model} --host 127.0.0.1 --port {port} --max-model-len {context}",
                 "/health", IGNORE_EOS),
    # It refuses fields that it does not know; no token has this id, so none ends an answer.
    "transformers": Kind("transformers serve", "{model} --host 127.0.0.1 --port {port}", "/health",
                         {"generation_config": '{"eos_token_id": -1}'}),
}


@dataclass
class Target:
    """A server to ask: where it is, or how it is started."""
    name: str
    what: str
    program: str = ""
    options: str = ""
    fields: dict = None

    @property
    def kind(self):
        return next((k for n, k in KINDS.items() if (self.name + ".").startswith(n + ".")), None)

    @property
    def runs_already(self):
        return "://" in self.what

    def body_fields(self):
        if self.fields is not None:
            return self.fields
        return self.kind.fields if self.kind else IGNORE_EOS

    def command(self, port, o):
        slots = o.concurrency or SLOTS_AT_RATE
        values = {"model": shlex.quote(self.what), "port": port, "slots": slots,
                  "context": o.context, "slots_context": slots * o.context}
        return shlex.split(f"{self.program or self.kind.command} "
                           f"{self.kind.options.format(**values)} {self.options}")


# ---- servers

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def is_ready(url):
    try:
        urllib.request.urlopen(url, timeout=5).close()
        return True
    except OSError:
        return False


@contextmanager
def running(target, o):
    """Its base URL, while it runs."""
    if target.runs_already:
        yield target.what
        return
    port = free_port()
    command = target.command(port, o)
    with tempfile.NamedTemporaryFile("w+", prefix="compare-", suffix=".log", errors="replace") as log:
        try:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        except OSError as e:
            sys.exit(f"compare: {target.name}: {command[0]} cannot be run: {e}")
        try:
            end = time.monotonic() + o.start_timeout
            while not is_ready(f"http://127.0.0.1:{port}{target.kind.ready}"):
                if process.poll() is not None or time.monotonic() > end:
                    said = Path(log.name).read_text(errors="replace").strip().splitlines()
                    sys.exit(f"compare: {target.name} did not start: {shlex.join(command)}\n"
                             + "\n".join(said[-20:]))
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            child_process.stop(process, with_group=True)


# ---- one server's turn

def measure(target, o, words_per_token):
    """(loadtest's report with what makes it not comparable, the load)."""
    with running(target, o) as url:
        own = copy.copy(o)
        own.url, own.extra = url, target.body_fields()
        own.model = own.duration = None
        own.cancel, own.ignore_eos = 0, False
        load = loadtest.Load(own, loadtest.Server(url, o.key))
        try:
            asyncio.run(load.run(words_per_token))
        except (OSError, EOFError, loadtest.Refused, ValueError, LookupError) as e:
            sys.exit(f"compare: {target.name} at {url}: {e}")
    if load.stopped:
        sys.exit("compare: interrupted")
    report = loadtest.report(load)
    report["name"] = target.name
    report["command"] = None if target.runs_already else shlex.join(target.command("PORT", o))
    report["wanted_tokens"] = sum(r.want_tokens for r in load.records)
    return report, load


def objections(report, load, first):
    """Why its column cannot be compared, in sentences."""
    done = [r for r in load.records if r.outcome == "ok"]
    missed = len(load.records) - len(done)
    if missed:
        yield f"{missed} of {len(load.records)} requests were not answered"
    if not done:
        return
    untold = sum(not r.prompt_tokens for r in done)
    if untold:
        yield f"it does not tell usage in {untold} of {len(done)} streams; tokens are pieces of text"
    wrong = sum(r.tokens != r.want_tokens for r in done)
    if wrong:
        yield (f"{wrong} of {len(done)} answers have another length than asked for "
               f"({report['output_tokens']} tokens, not {sum(r.want_tokens for r in done)})")
    if not missed and not untold and first["requests"]["ok"] == len(done):
        more = report["prompt_tokens"] / first["prompt_tokens"] - 1
        if abs(more) > PROMPTS_DIFFER:
            yield f"the prompts are {100 * more:+.0f} % tokens for it"


# ---- what comes of it

def ms(report, key, which):
    values = report[key + "_ms"]
    return f"{values[which]:.1f}" if values else "-"


def table(reports):
    rows = [("requests done", lambda r: f"{r['requests']['ok']}"),
            ("prompt tokens", lambda r: f"{r['prompt_tokens']:,}"),
            ("output tokens", lambda r: f"{r['output_tokens']:,}"),
            ("seconds", lambda r: f"{r['seconds']:.1f}"),
            ("requests/s", lambda r: f"{r['requests_per_s']:.2f}"),
            ("output tokens/s", lambda r: f"{r['output_tokens_per_s']:.1f}")]
    for key, name in loadtest.MEASURES.items():
        rows.append((f"{name} p50 / p99, ms",
                     lambda r, key=key: f"{ms(r, key, 'p50')} / {ms(r, key, 'p99')}"))
    if "goodput" in reports[0]:
        rows.append(("goodput", lambda r: f"{100 * r['goodput']['share']:.1f} %"))
    rows.append(("comparable", lambda r: "NO" if r["objections"] else "yes"))
    lines = ["| | " + " | ".join(r["name"] for r in reports) + " |", "|---" * (1 + len(reports)) + "|"]
    lines += [f"| {what} | " + " | ".join(cell(r) for r in reports) + " |" for what, cell in rows]
    lines += [f"\n{r['name']}: {why}." for r in reports for why in r["objections"]]
    return "\n".join(lines)


def plot(loads, path):
    """Shares of requests over what they waited; one line a server."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for ax, name in zip(axes, ("ttft", "tpot", "e2e")):
        for label, load in loads:
            values = sorted(1000 * v for r in load.records if r.outcome == "ok"
                            and (v := getattr(r, name)) is not None)
            if values:
                ax.plot(values, [100 * (i + 1) / len(values) for i in range(len(values))], label=label)
        ax.set(xlabel=f"{loadtest.MEASURES[name]}, ms", xscale="log", ylim=(0, 100))
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("% of requests at most")
    axes[0].legend()
    figure.savefig(path, dpi=110)


# ---- the command line

def assignment(text):
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=SOMETHING")
    return name, value


def parse_options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--server", type=assignment, action="append", default=[], required=True,
                   metavar="NAME=WHAT", help="a model to start it with, or its URL; repeated")
    p.add_argument("--program", type=assignment, action="append", default=[], metavar="NAME=COMMAND",
                   help="what starts it")
    p.add_argument("--options", type=assignment, action="append", default=[], metavar="NAME=OPTIONS",
                   help="more of the command that starts it")
    p.add_argument("--fields", type=assignment, action="append", default=[], metavar="NAME=JSON",
                   help="fields of the body, instead of those that make answers as long as asked for")
    p.add_argument("--context", type=loadtest.above_zero(int), default=8192,
                   help="tokens of the longest prompt with its answer, for servers that are started "
                        "[%(default)s]")
    p.add_argument("--start-timeout", type=loadtest.above_zero(float), default=600,
                   help="until a server is ready, in s [%(default)s]")
    p.add_argument("--key", default=os.environ.get("OPENAI_API_KEY"), help="API key [$OPENAI_API_KEY]")
    loadtest.add_load_options(p)
    o = p.parse_args()
    if not o.requests:
        p.error("--requests is needed: all servers get the same ones")
    loadtest.complete_load_options(p, o)
    targets = {name: Target(name, what) for name, what in o.server}
    if len(targets) < len(o.server):
        p.error("two servers have the same name")
    for option in ("program", "options", "fields"):
        for name, value in getattr(o, option):
            if name not in targets:
                p.error(f"--{option} {name}: there is no such server")
            if option != "fields" and targets[name].runs_already:
                p.error(f"--{option} {name}: that one runs already")
            try:
                setattr(targets[name], option, loadtest.fields(value) if option == "fields" else value)
            except argparse.ArgumentTypeError as e:
                p.error(str(e))
    for t in targets.values():
        if not t.runs_already and not t.kind:
            p.error(f"'{t.what}' is no URL, and '{t.name}' none of those that can be started: "
                    f"{', '.join(KINDS)}")
    return o, list(targets.values())


def main():
    o, targets = parse_options()
    child_process.ends_with_script()
    reports, loads, words_per_token = [], [], None
    for target in targets:
        if not o.quiet:
            print(f"compare: {target.name}", file=sys.stderr, flush=True)
        report, load = measure(target, o, words_per_token)
        words_per_token = load.words_per_token
        report["objections"] = list(objections(report, load, reports[0] if reports else report))
        reports.append(report)
        loads.append((target.name, load))
    print(table(reports))
    if o.json:
        Path(o.json).write_text(json.dumps(reports, indent=1) + "\n")
    if o.plot:
        plot(loads, o.plot)
    return 1 if any(r["objections"] for r in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
