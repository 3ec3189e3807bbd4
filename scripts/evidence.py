#!/usr/bin/env python3
"""Measures what docs/RESULTS.md shows, and writes it as Markdown.

    make evidence                                          everything, on a GPU, in 25 minutes at most
    make evidence ARGS='--stages accuracy-98304 --out DIR'     one stage
    evidence.py --out DIR --merge DIR1 --merge DIR2 --stages ''    the tables of several runs in one
    evidence.py --quick                                    seconds, tiny, to see that it works

Stages: accuracy-N   evaluate.py at N tokens: full attention, four budgets, the published configuration
        choices      the options of two-level attention, varied one at a time
        operator     bench_gpu.py: two-level attention beside full attention and PyTorch's
        step         bench_gpu.py: whole decode steps
        offload      bench_offload.py: with K and V in host memory

Each stage leaves DIR/STAGE.json and is not run again while that is there (--again does).  It has so
many seconds; one that does not end in time is kept as far as it came, and goes on when asked for again.
DIR/RESULTS.md is made of all stages that are there, whatever was run this time.  Stages that need a GPU
are left out where there is none.  So a machine that runs a command for ten minutes only and keeps nothing
gets a few stages a call, and what came back is put together with --merge; of a stage that several have,
the last one to end counts.
"""
import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import child_process
import evaluate

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = Path(__file__).resolve().parent
BUNDLED = ROOT / "models" / "asynctlsd-books-9m"
CALIBRATION_TEXT = ROOT / "tests" / "texts" / "harbour.txt"
CALIBRATED = "asynctlsd-channels.json"      # what --calibrate leaves in the model's folder

# Of the tasks those that the bundled model can do (docs/RESULTS.md).
TASKS = "needle,ending,border,multikey,multiquery,tracking,recall,prose"
# The most telling first: a stage that runs out of time keeps what it has.
BUDGETS = "1024,filter=means,published,2048,512,256"
# 13 x 16 pairs without a difference are enough to say that less than a point is lost.
SAMPLES = ["--samples", "13", "--questions", "16", "--parallel", "16"]
CHOICE_TOKENS, CHOICE_TASKS = "32768", "needle,multikey,prose"
# The defaults, and what differs from them in one thing.  The bundled model has 8 layers.
CHOICES = ("1024,filter=means,filter=means+keep-blocks=128,keep-blocks=32,keep-blocks=128,"
           "token-index=channels,filter=bounds,filter=bounds+keep-blocks=128,selection=lagged,"
           "sink-tokens=64,recent-tokens=256,layer-exceptions=0:dense,layer-exceptions=7:dense")
QUICK_SAMPLES = ["--samples", "1", "--questions", "2", "--parallel", "1"]
# A model whose steps choose again what they chose; with plain random weights they do not.
LOCAL_MODEL, LOCAL_OPTIONS = "qwen3-8b", ["--attn-gain", "0.1", "--theta", "1e10"]


@dataclass
class Stage:
    heading: str
    seconds: int
    run: object              # a function of the Run and the stage's name
    gpu: bool = False


class Run:
    def __init__(self, args):
        self.args, self.out = args, args.out
        self.bin, self.models, self.quick = args.bin, args.models, args.quick
        self.commands, self.result, self.end = [], None, 0.0

    def path(self, name):
        return self.out / name

    def command(self, *words):
        """What it printed; RuntimeError when it fails, TimeoutExpired at the end of the stage's time."""
        words = [str(w) for w in words]
        self.commands.append(shlex.join(shorter(w) for w in words))
        status, text, problem = child_process.run(words, self.end - time.monotonic())
        if status:
            raise RuntimeError((problem.strip() or text.strip() or "no word").splitlines()[-1])
        return text

    def script(self, name, *words):
        return self.command(sys.executable, SCRIPTS / name, *words)


def shorter(word):
    """A path as one would type it in the project's folder."""
    if word == sys.executable:
        return "python3"
    return os.path.relpath(word, ROOT) if word.startswith(str(ROOT) + "/") else word


# ---- stages

def evaluated(run, name, model, tokens, tasks, configs, samples):
    """Runs evaluate.py; what is answered counts even if it did not come to its end."""
    lines = run.path(f"{name}.jsonl")
    options = ["--", "--crossover", "512"] if run.quick else []

    def keep():
        whole = [json.loads(x) for x in lines.read_text().split("\n")[:-1]][1:]
        for x in whole:
            x.pop("answers", None)
        run.result = {"lines": whole, "tasks": tasks, "tokens": tokens, "configs": configs}
    try:
        run.script("evaluate.py", "--asynctlsd", run.bin / "asynctlsd", "--model", model,
                   "--tokens", tokens, "--tasks", tasks, "--configs", configs, *samples,
                   "--out", lines, *options)
    except subprocess.TimeoutExpired:
        if lines.exists():
            keep()
        raise
    keep()


def run_accuracy(run, name):
    tokens = name.split("-")[1]
    if run.quick:
        evaluated(run, name, BUNDLED, tokens, "needle,prose", "256,published", QUICK_SAMPLES)
    else:
        evaluated(run, name, BUNDLED, tokens, TASKS, BUDGETS, SAMPLES)


def run_choices(run, name):
    # Calibration writes into the folder of the model.
    model = run.path("models") / BUNDLED.name
    if not (model / CALIBRATED).exists():
        shutil.copytree(BUNDLED, model, dirs_exist_ok=True)
        run.command(run.bin / "asynctlsd", "--model", model, "--calibrate", CALIBRATION_TEXT)
    if run.quick:
        evaluated(run, name, model, "2048", "needle", "256,token-index=channels+keep-tokens=256",
                  QUICK_SAMPLES)
    else:
        evaluated(run, name, model, CHOICE_TOKENS, CHOICE_TASKS, CHOICES, SAMPLES)


def local_model(run):
    folder = run.models / LOCAL_MODEL
    done = folder / "made"       # bench_gpu.py looks for it, too
    if not done.exists():
        run.script("make_model.py", LOCAL_MODEL, folder, *LOCAL_OPTIONS)
        done.touch()
    return folder


def run_bench(run, name):
    if name == "step":
        local_model(run)
    table = run.path(name) / "table.txt"
    table.unlink(missing_ok=True)
    try:
        run.script("bench_gpu.py", "--sections", name, "--bin", run.bin, "--models", run.models,
                   "--out", run.path(name))
    finally:
        # One figure that failed does not make the others worthless.
        if table.exists():
            run.result = {"text": table.read_text()}


def run_offload(run, name):
    if run.quick:
        how = ["--model", BUNDLED, "--lengths", 2048, "--kv-cache-bytes", "64mb", "--host-kv-bytes",
               "64mb", "--most", 1, "--window", 10, "--offload", "always"]
    else:
        how = ["--model", local_model(run), "--lengths", 98304, 49152, "--host-kv-bytes", "80gb",
               "--most", 8, "--ids", 1]
    left = int(run.end - time.monotonic()) - 5
    text = run.script("bench_offload.py", "--bin", run.bin, *how, "--seconds", left,
                      "--log", run.path("offload.log"), "--out", run.path("offload-figures.json"))
    # Its first lines are figures as they come; the table begins after an empty one.
    run.result = {"text": text.rpartition("\n\n")[2]}


def stages(quick):
    if quick:
        return {"accuracy-2048": Stage("Accuracy", 60, run_accuracy),
                "choices": Stage("Choices", 60, run_choices),
                "offload": Stage("Offloading", 60, run_offload)}
    # 25 minutes together.
    bounds = {4096: 50, 16384: 80, 32768: 130, 65536: 260, 98304: 430}
    return {**{f"accuracy-{n}": Stage("Accuracy", s, run_accuracy) for n, s in bounds.items()},
            "choices": Stage("Choices", 130, run_choices),
            "operator": Stage("Two-level attention beside full attention", 100, run_bench, gpu=True),
            "step": Stage("Whole steps", 120, run_bench, gpu=True),
            "offload": Stage("Keys and values in host memory", 200, run_offload, gpu=True)}


# ---- the machine

def machine():
    """(what computes, whether that is a GPU)"""
    try:
        found = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version",
                                "--format=csv,noheader"], capture_output=True, text=True)
        if found.returncode == 0 and found.stdout.strip():
            name, driver = found.stdout.splitlines()[0].split(", ")
            return f"{name}, driver {driver}", True
    except OSError:
        pass
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else 'an unnamed processor'}", False


def commit_of():
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True,
                          text=True) if shutil.which("git") else None
    if not done or done.returncode:
        sys.exit("evidence: this is no git checkout: say which commit it is with --commit")
    return done.stdout.strip()


def perform(run, name, stage, commit, where):
    """One stage, from its commands to its file."""
    run.commands, run.result = [], None
    began = time.monotonic()
    run.end = began + stage.seconds
    print(f"evidence: {name} ...", end="", flush=True)
    problem = None
    try:
        stage.run(run, name)
    except subprocess.TimeoutExpired:
        problem = f"not done after {stage.seconds} s"
    except (RuntimeError, OSError, ValueError) as e:
        problem = str(e)
    seconds = time.monotonic() - began
    print(f" {seconds:.0f} s" + (f": {problem}" if problem else ""), flush=True)
    run.path(f"{name}.json").write_text(json.dumps(
        {"stage": name, "heading": stage.heading, "commands": run.commands, "commit": commit,
         "machine": where, "seconds": seconds, "ended": time.time(), "problem": problem,
         "result": run.result}) + "\n")
    return problem is None


# ---- the tables

def read_stages(folders):
    """By name; of several the last to end."""
    found = {}
    for folder in folders:
        for path in sorted(folder.glob("*.json")):
            stage = json.loads(path.read_text())
            if isinstance(stage, dict) and "ended" in stage:
                old = found.get(stage["stage"])
                if not old or stage["ended"] > old["ended"]:
                    found[stage["stage"]] = stage
    return found


def origin(members):
    """The commands of some stages, and where they ran."""
    commands = list(dict.fromkeys(c for m in members for c in m["commands"]))
    where = list(dict.fromkeys(f"{m['machine']}, commit {m['commit']}" for m in members))
    text = "".join(f"    {c}\n" for c in commands) + f"\n{'; '.join(where)}. " \
        f"{sum(m['seconds'] for m in members):.0f} s.\n"
    for m in members:
        if m["problem"]:
            text += f"\n**{m['stage']}: {m['problem']}.**\n"
    return text


def tables_of(members):
    results = [m["result"] for m in members if m["result"]]
    if not results:
        return ""
    if "text" in results[0]:
        return f"\n```\n{results[0]['text'].rstrip()}\n```\n"
    # Lengths are stages of their own and stand in one table.
    lines = [x for r in results for x in r["lines"]]
    lengths = sorted({int(n) for r in results for n in r["tokens"].split(",")})
    tasks, configs = results[0]["tasks"].split(","), results[0]["configs"].split(",")
    return "\n" + evaluate.report(lines, tasks, lengths, [evaluate.FULL, *configs])


def markdown(found, order):
    """In the order of the stages; those under one heading together."""
    parts = ["# Evidence\n"]
    headings = list(dict.fromkeys(found[n]["heading"] for n in order if n in found))
    for heading in headings:
        members = [found[n] for n in order if n in found and found[n]["heading"] == heading]
        parts.append(f"## {heading}\n\n{origin(members)}{tables_of(members)}")
    return "\n".join(parts)


# ---- the command line

def arguments():
    ap = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, default=ROOT / "build" / "evidence", metavar="DIR")
    ap.add_argument("--stages", help="some of them, separated by commas (all)")
    ap.add_argument("--again", action="store_true", help="also those that are there")
    ap.add_argument("--merge", type=Path, action="append", default=[], metavar="DIR",
                    help="stages of this folder, too, in the tables; repeated")
    ap.add_argument("--quick", action="store_true", help="other stages: tiny ones, also for a CPU")
    ap.add_argument("--bin", type=Path, default=ROOT / "build", help="folder of the programs")
    ap.add_argument("--models", type=Path, default=ROOT / "build" / "models")
    ap.add_argument("--commit", help="what is measured (git says it)")
    args = ap.parse_args()
    known = stages(args.quick)
    args.names = list(known) if args.stages is None else [n for n in args.stages.split(",") if n]
    if wrong := [n for n in args.names if n not in known]:
        ap.error(f"there is no stage {', '.join(wrong)}; there are {', '.join(known)}")
    if missing := [d for d in args.merge if not d.is_dir()]:
        ap.error(f"--merge {missing[0]} is no folder")
    return args, known


def main():
    args, known = arguments()
    child_process.ends_with_script()
    args.out.mkdir(parents=True, exist_ok=True)
    run, failed = Run(args), False
    where, has_gpu = machine()
    commit = (args.commit or commit_of()) if args.names else None
    there = read_stages([args.out, *args.merge])
    for name in args.names:
        if not args.again and name in there and not there[name]["problem"]:
            print(f"evidence: {name} is there")
        elif known[name].gpu and not has_gpu:
            print(f"evidence: {name} is left out: it needs a GPU")
        else:
            if args.again:
                run.path(f"{name}.jsonl").unlink(missing_ok=True)
            failed |= not perform(run, name, known[name], commit, where)
    found = read_stages([args.out, *args.merge])
    text = markdown(found, list(known))
    run.path("RESULTS.md").write_text(text)
    print(f"\n{text}\nevidence: written to {os.path.relpath(run.path('RESULTS.md'))}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
