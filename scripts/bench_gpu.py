#!/usr/bin/env python3
"""Everything that is measured on the GPU, beside its ceilings, baseline and targets.

    make bench-gpu
    make bench-gpu ARGS='--sections operator,prefill --out /tmp/figures'

Sections: operator  two-level attention, beside our own full attention and PyTorch's
          decode    full attention of a decode step, beside PyTorch's
          prefill   full attention of a chunk of a prompt, beside PyTorch's
          step      whole decode steps of Qwen3-8B's and Qwen3-0.6B's shape
          offload   the same of Qwen3-8B's with K and V in host memory (40 GB of it)
          serve     the daemon over HTTP: a long prompt beside streams, 64 streams

Model folders are made when they are absent (random weights; 18 GB in all).  PyTorch's
figures are left out where torch cannot be imported, the plot where matplotlib cannot.
--out receives what each program printed, the figures as JSON and the plot.
"""
import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import bench_gpu_serve
import child_process

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = Path(__file__).resolve().parent
SECTIONS = ("operator", "decode", "prefill", "step", "offload", "serve")
MODELS = ("qwen3-8b", "qwen3-0.6b")
STEPS = {"qwen3-8b": ("1:1024", "1:98304", "8:98304"), "qwen3-0.6b": ("1:1024", "8:1024")}
OFFLOADS = ("1:98304", "4:98304", "8:98304", "16:49152")
OFFLOAD_COLUMNS = ("batch", "tokens", "overlap", "resident_ms", "offloaded_ms", "ratio", "full_ms",
                   "misses", "mb", "gb_per_s", "floor_ms")

# Qwen3-8B, one layer.
KV_HEADS, HEADS, DIM, LAYERS = 8, 32, 128, 36
KEEP_BLOCKS, KEEP_TOKENS = 64, 1024
CROSSOVER = 8192                                 # tokens; up to there contexts are served dense
KV_BYTES = KV_HEADS * DIM * 4                    # a token
FILTER_BYTES = KV_HEADS * (DIM // 8 + 2)         # a token: sign plane and scale
KEPT_BYTES = KV_HEADS * (KEEP_BLOCKS * 64 * DIM // 8 + KEEP_TOKENS * DIM * 4)
PARAMETERS = 36 * 192_937_984                    # multiplied with every token of a prompt
TENSOR_TFLOPS = 989                              # NVIDIA's figure for H100 and H200 (SXM), dense bf16

# Least multiples of the baseline by (tokens, batch), most milliseconds, and so on: for an H200.
OPERATOR = {(49152, 1): 5, (49152, 4): 6, (49152, 8): 8, (98304, 1): 8, (98304, 4): 10,
            (98304, 8): 12, (131072, 1): 9, (131072, 4): 12, (131072, 8): 14}
DECODE_LEAST, DECODE_FROM = 0.9, 16384
PREFILL_LEAST, PREFILL_FROM = 0.6, 8192
STEP_MOST = {("qwen3-8b", 1, 1024): 4.4, ("qwen3-8b", 8, 98304): 8.5, ("qwen3-0.6b", 1, 1024): 0.9}
PATIENCE_S = 10                                  # of a program that is ended; evidence.py has 30
TTFT_MOST_S, GAP_MOST_MS, HOST_MOST_MS = 16, 150, 0.3


class Run:
    """Where things are, what was printed, and the lines of the table."""

    def __init__(self, args):
        self.bin, self.out, self.models = args.bin, args.out, args.models
        self.rows, self.figures = [], {}
        self.device, self.gb_per_s = "?", None
        self.out.mkdir(parents=True, exist_ok=True)

    def program(self, name, *command, timeout=180):
        """What it printed; also kept in a file.  None, and a row, when it fails."""
        began = time.monotonic()
        print(f"  {name} ...", end="", flush=True)
        try:
            status, text, problem = child_process.run(command, timeout, PATIENCE_S)
            problem = problem.strip() if status else None
        except subprocess.TimeoutExpired as e:
            text, problem = e.stdout, f"not done after {timeout} s"
        print(f" {time.monotonic() - began:.0f} s", flush=True)
        (self.out / f"{name}.txt").write_text(text)
        if problem is not None:
            self.row(name, "failed", note=(problem.splitlines() or ["no word"])[-1])
        if m := re.search(r"read at (\d+) GB/s", text):
            self.gb_per_s = float(m[1])
        if m := re.match(r"cuda:\d+: (.*)", text):
            self.device = m[1]
        return text

    def row(self, what, figure, ceiling="", baseline="", target="", met=None, note=""):
        self.rows.append((what, figure, ceiling, baseline, target,
                          {None: "", True: "yes", False: "NO"}[met], note))


def numbers(text, heading):
    """The rows of figures below the heading line that contains the words."""
    rows, inside = [], False
    for line in text.splitlines():
        words = line.split()
        if words and re.fullmatch(r"[\d.]+", words[0]):
            if inside:
                rows.append([float(w) if re.fullmatch(r"[\d.]+", w) else w for w in words])
        elif heading in line:
            inside = True
        elif inside and rows:
            break
    return rows


def us(value):
    return f"{value:.1f} us" if value is not None else ""


# ---- sections

def measure_decode(run, torch):
    """{(tokens, batch): us} of our own full attention and of PyTorch's."""
    if "full" not in run.figures:
        text = run.program("full-attention", run.bin / "bench-gpu", "decode")
        run.figures["full"] = {(int(r[0]), int(r[1])): r[2] for r in numbers(text, "one row")}
        text = run.program("torch-decode", sys.executable, SCRIPTS / "bench_torch.py", "decode") \
            if torch else ""
        run.figures["torch"] = {(int(r[0]), int(r[1])): r[2] for r in numbers(text, "one row")}
    return run.figures["full"], run.figures["torch"]


def section_operator(run, torch):
    text = run.program("two-level", run.bin / "bench-gpu-two-level")
    own = run.figures["two_level"] = {(int(r[0]), int(r[1])): r[2]
                                      for r in numbers(text, "two-level attention")}
    full, base = measure_decode(run, torch)
    for (tokens, batch), least in OPERATOR.items():
        if (tokens, batch) not in own:
            continue
        mine, theirs = own[tokens, batch], base.get((tokens, batch))
        floor = batch * (tokens * FILTER_BYTES + KEPT_BYTES) / run.gb_per_s * 1e-3
        times = theirs / mine if theirs else None
        run.row(f"two-level, {tokens:,} tokens, batch {batch}",
                us(mine) + (f", {times:.1f}x" if times else ""), us(floor), us(theirs),
                f"{least}x", times >= least if times else None,
                f"own full attention {us(full.get((tokens, batch)))}")
    for batch in sorted({b for _, b in own}):
        lengths = sorted(t for t, b in own if b == batch and (t, b) in full)
        slower = [t for t in lengths if own[t, batch] > full[t, batch]]
        pairs = ", ".join(f"{t // 1024}k {own[t, batch]:.0f}/{full[t, batch]:.0f}"
                          for t in lengths if t <= 16384)
        run.row(f"two-level / own full, batch {batch}",
                f"slower up to {max(slower):,}" if slower else "slower nowhere", note=f"us: {pairs}")


def section_decode(run, torch):
    full, base = measure_decode(run, torch)
    for tokens, batch in sorted(full, key=lambda k: (k[1], k[0])):
        mine, theirs = full[tokens, batch], base.get((tokens, batch))
        if tokens < DECODE_FROM:
            continue
        share = theirs / mine if theirs else None
        run.row(f"full attention, {tokens:,} tokens, batch {batch}",
                us(mine) + (f", {share:.0%}" if share else ""),
                us(batch * tokens * KV_BYTES / run.gb_per_s * 1e-3), us(theirs),
                f"{DECODE_LEAST:.0%}", share >= DECODE_LEAST if share else None)


def section_prefill(run, torch):
    text = run.program("prefill", run.bin / "bench-gpu", "prefill")
    own = run.figures["prefill"] = {(int(r[0]), int(r[1])): r[3] for r in numbers(text, "a chunk of rows")}
    text = run.program("torch-prefill", sys.executable, SCRIPTS / "bench_torch.py", "prefill") \
        if torch else ""
    base = run.figures["torch_prefill"] = {(int(r[0]), int(r[1])): r[3]
                                           for r in numbers(text, "a chunk of rows")}
    for (tokens, rows), mine in own.items():
        theirs = base.get((tokens, rows))
        share = mine / theirs if theirs else None
        judged = share is not None and tokens >= PREFILL_FROM
        run.row(f"prefill attention, {rows:,} rows of {tokens:,}",
                f"{mine:.0f} TFLOP/s" + (f", {share:.0%}" if share else ""),
                f"{TENSOR_TFLOPS} TFLOP/s", f"{theirs:.0f} TFLOP/s" if theirs else "",
                f"{PREFILL_LEAST:.0%}" if tokens >= PREFILL_FROM else "",
                share >= PREFILL_LEAST if judged else None)


def section_step(run, torch):
    for model in MODELS:
        text = run.program(f"step-{model}", run.bin / "bench-gpu-step", run.models / model,
                           *STEPS[model])
        for r in numbers(text, "sparse"):
            if len(r) < 8:
                run.row(f"{model} step, batch {r[0]:.0f}, {r[1]:,.0f} tokens", " ".join(
                    str(w) for w in r[2:]))
                continue
            batch, tokens, sparse, floor, host, full, full_floor, full_host, *note = r
            run.figures.setdefault("step", []).append([model, *r[:8]])
            most = STEP_MOST.get((model, batch, tokens))
            short = tokens <= CROSSOVER
            mine, bytes_ms, host = (full, full_floor, full_host) if short else (sparse, floor, host)
            run.row(f"{model} step, batch {batch:.0f}, {tokens:,.0f} tokens", f"{mine:.2f} ms",
                    f"{bytes_ms:.2f} ms", "", f"{most} ms" if most else "",
                    mine <= most if most else None,
                    f"host {host:.3f} ms" + ("" if short else f"; own full attention {full:.2f} ms")
                    + (f" ({' '.join(map(str, note))})" if note else ""))


def section_offload(run, torch):
    text = run.program("offload", run.bin / "bench-gpu-offload", "--host-gb", 40,
                       run.models / "qwen3-8b", *OFFLOADS, timeout=420)
    for r in numbers(text, "ms a step"):
        if len(r) < len(OFFLOAD_COLUMNS):
            run.row(f"offloaded, batch {r[0]:.0f}, {r[1]:,.0f} tokens", " ".join(map(str, r[2:])))
            continue
        f = dict(zip(OFFLOAD_COLUMNS, r), note=" ".join(map(str, r[len(OFFLOAD_COLUMNS):])))
        run.figures.setdefault("offload", []).append(f)
        rate = f", {f['gb_per_s']:.1f} GB/s" if f["gb_per_s"] != "-" else ""
        run.row(f"offloaded, batch {f['batch']:.0f}, {f['tokens']:,.0f} tokens, "
                f"{f['overlap']:.0f} % found", f"{f['offloaded_ms']:.2f} ms, {f['ratio']:.2f}x",
                f"{f['resident_ms'] + f['floor_ms']:.2f} ms", "", "", None,
                f"resident {f['resident_ms']:.2f} ms, full {f['full_ms']:.2f} ms; "
                f"{f['mb']:.1f} MB fetched{rate}" + (f" ({f['note']})" if f["note"] else ""))


def section_serve(run, torch):
    print("  serve ...", end="", flush=True)
    began = time.monotonic()
    try:
        f = bench_gpu_serve.measure(run.bin / "asynctlsd", run.models / "qwen3-8b", 0,
                                    run.out / "serve.log", 98304, 4, 64, 5)
    except (RuntimeError, OSError, TimeoutError) as error:
        run.row("serving", "failed", note=str(error).splitlines()[0])
        return
    finally:
        print(f" {time.monotonic() - began:.0f} s", flush=True)
    (run.out / "serve.txt").write_text("\n".join(bench_gpu_serve.sentences(f)) + "\n")
    run.figures["serve"] = f
    p, d = f["prefill"], f["decode"]
    pairs = p["tokens"] ** 2 / 2
    floor = (2 * PARAMETERS * p["tokens"] + 4 * pairs * HEADS * DIM * LAYERS) / TENSOR_TFLOPS / 1e12
    run.row("qwen3-8b, start to ready", f"{f['start_s']:.1f} s")
    run.row(f"{p['tokens']:,} tokens of prompt to the first", f"{p['ttft_s']:.2f} s",
            f"{floor:.1f} s", "", f"{TTFT_MOST_S} s", p["ttft_s"] <= TTFT_MOST_S)
    run.row(f"gaps of {p['streams']} streams meanwhile, p99", f"{p['gap_p99_ms']:.0f} ms", "", "",
            f"{GAP_MOST_MS} ms", p["gap_p99_ms"] < GAP_MOST_MS,
            f"median {p['gap_p50_ms']:.0f}, largest {p['gap_max_ms']:.0f} ms")
    run.row(f"{d['streams']} streams, host time a step", f"{d['host_ms']:.3f} ms", "", "",
            f"{HOST_MOST_MS} ms", d["host_ms"] < HOST_MOST_MS,
            f"{d['tokens_per_s']:.0f} tokens/s, {d['step_ms']:.2f} ms a step")


# ---- results

def print_table(run):
    head = ("", "measured", "ceiling", "PyTorch", "target", "met", "")
    widths = [max(len(r[i]) for r in [head, *run.rows]) for i in range(6)]
    lines = [f"{run.device}" + (f", memory read at {run.gb_per_s:,.0f} GB/s" if run.gb_per_s else "")
             + "; targets are for an H200 (4,620 GB/s)"]
    for r in [head, *run.rows]:
        lines.append("  ".join([r[0].ljust(widths[0])] + [r[i].rjust(widths[i]) for i in range(1, 6)]
                               + [r[6]]).rstrip())
    text = "\n".join(lines) + "\n"
    (run.out / "table.txt").write_text(text)
    print("\n" + text)


def plot(run):
    """Time of a layer's attention over the length of the context."""
    if not run.figures.get("two_level"):
        return
    if not importlib.util.find_spec("matplotlib"):
        print("skip: the plot (no matplotlib)")
        return
    import matplotlib
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "bench-gpu", "svg.fonttype": "none"})
    import matplotlib.pyplot as plt
    kinds = (("two_level", "two-level", "C0"), ("full", "full, ours", "C1"),
             ("torch", "full, PyTorch", "C2"))
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True)
    for axis, batch in zip(axes, (1, 4, 8)):
        for key, label, colour in kinds:
            points = sorted((t, v) for (t, b), v in run.figures.get(key, {}).items()
                            if b == batch and t >= 1024)
            if points:
                axis.plot(*zip(*points), marker="o", markersize=3, color=colour, label=label)
        axis.set(title=f"batch {batch}", xlabel="tokens of context", xscale="log", yscale="log")
        ticks = (1024, 4096, 16384, 49152, 131072)
        axis.set_xticks(ticks, [f"{t // 1024}k" for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("µs, one layer")
    axes[0].legend(frameon=False)
    figure.suptitle(f"Attention of a decode step, 32 heads on 8 of 128, {run.device}", fontsize=10)
    figure.tight_layout()
    figure.savefig(run.out / "attention.svg", metadata={"Date": None})


def write_figures(run):
    def plain(value):
        if isinstance(value, dict):
            return {",".join(map(str, k)) if isinstance(k, tuple) else k: plain(v)
                    for k, v in value.items()}
        return value

    keys = ("what", "measured", "ceiling", "baseline", "target", "met", "note")
    (run.out / "figures.json").write_text(json.dumps(
        {"device": run.device, "memory_gb_per_s": run.gb_per_s, "figures": plain(run.figures),
         "table": [dict(zip(keys, r)) for r in run.rows]}, indent=1) + "\n")


def make_models(run, names):
    for name in names:
        done = run.models / name / "made"         # is written last
        if not done.exists():
            run.program(f"make-{name}", sys.executable, SCRIPTS / "make_model.py", name,
                        run.models / name, timeout=300)
            done.touch()


def main():
    ap = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--sections", default=",".join(SECTIONS))
    ap.add_argument("--bin", type=Path, default=ROOT / "build", help="folder of the programs")
    ap.add_argument("--models", type=Path, default=ROOT / "build" / "models")
    ap.add_argument("--out", type=Path, default=ROOT / "build" / "bench-gpu")
    args = ap.parse_args()
    sections = args.sections.split(",")
    if unknown := set(sections) - set(SECTIONS):
        ap.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    child_process.ends_with_script()
    run = Run(args)
    began = time.monotonic()
    run.program("memory", run.bin / "bench-gpu", "memory")
    if not run.gb_per_s:
        sys.exit(f"skip: {run.rows[-1][6] if run.rows else 'no GPU'}")
    run.row("memory, read", f"{run.gb_per_s:,.0f} GB/s")
    torch = importlib.util.find_spec("torch") is not None
    if not torch and {"operator", "decode", "prefill"} & set(sections):
        print("skip: PyTorch's figures (torch cannot be imported)")
    if {"step", "offload", "serve"} & set(sections):
        make_models(run, MODELS if "step" in sections else MODELS[:1])
    for section in SECTIONS:
        if section in sections:
            globals()["section_" + section](run, torch)
    plot(run)
    write_figures(run)
    print_table(run)
    print(f"{time.monotonic() - began:.0f} s in all; files in {os.path.relpath(run.out)}")
    return 1 if any(r[1] == "failed" for r in run.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
