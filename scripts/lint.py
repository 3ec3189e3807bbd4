#!/usr/bin/env python3
"""What the compiler does not check: the floors, lengths, banned calls, words.

Prints one `file:line: finding` each and exits 1 if there is any."""
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A file may include what lies on its own floor or below.  Longest prefix wins.
FLOORS = {
    "engine/base/": 0,
    "kernels/": 1,
    "engine/kv/": 2,
    "engine/select/": 2,
    "engine/model/": 3,
    "engine/grammar/": 3,
    "engine/run/": 4,
    "engine/": 5,
    "server/": 6,
}
# All that the server may know of the engine.
SERVER_SEES = {
    "engine/engine.h", "engine/run/request.h", "engine/select/select.h",
    "engine/model/tokenizer.h", "engine/model/model_config.h", "engine/model/json_fields.h",
    "engine/grammar/grammar.h",
}
# Kernels see the back end's own headers and of base what is bilingual or of the machine.
KERNELS_SEE_BASE = {"status.h", "invariant.h", "mem.h", "clock.h", "host_limits.h"}

BANNED = re.compile(
    r"\b(strcpy|strcat|sprintf|vsprintf|gets|strtok|atoi|atol|atof|rand|srand|alloca|system|popen|"
    r"malloc|calloc|realloc|strdup|strndup|getenv|setenv|localtime|gmtime|asctime)\s*\(")
ALLOWED = {
    "engine/base/mem.c": {"malloc", "calloc", "realloc"},
}
WORDS = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")

MAX_LINES = {".c": 900, ".cu": 900, ".h": 320, ".cuh": 320}
MAX_FUNCTION = 100
MAX_COLUMNS = 100


def floor_of(path):
    matching = [p for p in FLOORS if path.startswith(p)]
    return FLOORS[max(matching, key=len)] if matching else None


def check_include(path, target):
    """Why `path` may not include `target`, or None."""
    if path.startswith("tests/"):
        return "a test may not include a .c" if target.endswith(".c") else None
    own, other = floor_of(path), floor_of(target)
    if other is None:
        return f"{target} is not on any floor"
    if other > own:
        return f"includes upwards: {target}"
    if path.startswith("server/") and target.startswith("engine/") \
            and not target.startswith("engine/base/") and target not in SERVER_SEES:
        return f"the server may not see {target}"
    if path.startswith("server/") and target.startswith("kernels/"):
        return f"the server may not see {target}"
    if path.startswith("kernels/") and target.startswith("engine/base/") \
            and Path(target).name not in KERNELS_SEE_BASE:
        return f"kernels may not see {target}"
    if not path.startswith("kernels/") and re.match(r"kernels/(cpu|cuda)/", target):
        return f"only kernels/ may see {target}"
    return None


def without_comments(text):
    """The text with comments and string contents blanked, line for line."""
    token = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.S)

    def blank(m):
        s = m.group(0)
        if s[0] in "\"'":
            return s[0] * 2
        return "\n" * s.count("\n") or " "

    return token.sub(blank, text)


def function_lengths(code_lines):
    """(start line, length) of each body that opens and closes in column 0."""
    start = None
    for n, line in enumerate(code_lines, 1):
        if line == "{":
            start = n
        elif line == "}" and start:
            yield start, n - start
            start = None


def check_source(path):
    text = (ROOT / path).read_text()
    lines = text.split("\n")
    found = []
    limit = MAX_LINES[Path(path).suffix]
    if len(lines) > limit:
        found.append((len(lines), f"{len(lines)} lines, the limit is {limit}"))
    if path.endswith((".h", ".cuh")) and "#ifndef" not in text:
        found.append((1, "a header needs an include guard"))
    for n, line in enumerate(lines, 1):
        if len(line) > MAX_COLUMNS:
            found.append((n, f"{len(line)} columns, the limit is {MAX_COLUMNS}"))
        if line != line.rstrip():
            found.append((n, "white space at the end of the line"))
        if m := re.match(r'#include "([^"]+)"', line):
            if m[1] != "cases.h" and (why := check_include(path, m[1])):
                found.append((n, why))
        if m := WORDS.search(line):
            found.append((n, f"{m[1]}: finish it or file it"))
    code = without_comments(text).split("\n")
    for n, line in enumerate(code, 1):
        for m in BANNED.finditer(line):
            if m[1] not in ALLOWED.get(path, ()) and not path.startswith("tests/"):
                found.append((n, f"{m[1]}() is not used here"))
    for start, length in function_lengths(code):
        if length > MAX_FUNCTION:
            found.append((start, f"a function of {length} lines, the limit is {MAX_FUNCTION}"))
    return [f"{path}:{n}: {what}" for n, what in found]


def tracked():
    out = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True,
                         capture_output=True, check=True).stdout
    return [p for p in out.splitlines() if (ROOT / p).is_file()]


def main():
    files = tracked()
    sources = [p for p in files if Path(p).suffix in MAX_LINES]
    found = [f for p in sources for f in check_source(p)]
    for p in files:
        if re.search(r"(^|/)(util|misc|common|helpers)s?\.(c|h|cu|py)$", p):
            found.append(f"{p}:1: name the file after the noun it owns")
    print("\n".join(found) if found else f"lint: {len(sources)} sources clean")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
