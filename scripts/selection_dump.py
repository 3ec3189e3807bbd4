"""The file that a server writes with --selection-dump (engine/run/selection_dump.h), and the true
attention computed from it.  For selection_report.py, filter_study.py and choice_study.py.

Needs numpy.
"""
import os
from collections import defaultdict
from pathlib import Path

# The products are narrow: several threads for one would mostly wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import numpy as np  # noqa: E402

HEADER = np.dtype([("magic", "S8")] + [(name, "u4") for name in (
    "version act layers heads kv_heads head_dim latent_dim row_dim block_tokens nth_layer "
    "filter index selection sink_tokens recent_tokens").split()] + [("scale", "f4")])
RECORD = np.dtype([("kind", "u4"), ("layer", "u4"), ("sequence", "u8"), ("first", "u4"), ("n", "u4"),
                   ("keep_blocks", "u4"), ("keep_tokens", "u4"), ("hot_rows", "u4"), ("step", "u4"),
                   ("bytes", "u8")])
VERSION, ROWS, STEP = 1, 1, 2


class Dump:
    """records: {layer: {sequence: [(record, offset of its payload)]}}, in order."""

    def __init__(self, path):
        if Path(path).stat().st_size < HEADER.itemsize:
            raise ValueError("it is no selection dump")
        self.bytes = np.memmap(path, np.uint8, "r")
        self.header = h = self.bytes[:HEADER.itemsize].view(HEADER)[0]
        if h["magic"] != b"seldump" or h["version"] != VERSION:
            raise ValueError(f"it is no selection dump of version {VERSION}")
        self.layers, self.heads, self.kv_heads = int(h["layers"]), int(h["heads"]), int(h["kv_heads"])
        self.block, self.dim, self.row = (int(h[k]) for k in ("block_tokens", "head_dim", "row_dim"))
        self.values = slice(0, int(h["latent_dim"])) if h["latent_dim"] else slice(self.dim, self.row)
        self.records = defaultdict(lambda: defaultdict(list))
        at = HEADER.itemsize
        while at + RECORD.itemsize <= len(self.bytes):
            record = self.bytes[at:at + RECORD.itemsize].view(RECORD)[0]
            at += RECORD.itemsize
            if at + int(record["bytes"]) > len(self.bytes):
                break                       # the server was killed in the midst of it
            self.records[int(record["layer"])][int(record["sequence"])].append((record, at))
            at += int(record["bytes"])

    def array(self, at, dtype, *shape):
        n = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.bytes[at:at + n].view(dtype).reshape(shape)

    def floats(self, at, bf16, *shape):
        if not bf16:
            return self.array(at, np.float32, *shape)
        return (self.array(at, np.uint16, *shape).astype(np.uint32) << 16).view(np.float32)

    def rows(self, record, at):
        return self.floats(at, True, self.kv_heads, int(record["n"]), self.row)

    def sequences(self, layer):
        """Of each that has steps, in order: (its steps, keys [G, n, D], values [G, n, V])."""
        for records in self.records[layer].values():
            steps = [Step(self, *r) for r in records if r[0]["kind"] == STEP]
            if steps:
                yield steps, *self._context(records, max(s.n for s in steps))

    def _context(self, records, n):
        # Apart, because products of what lies scattered take many times as long.
        keys = np.zeros((self.kv_heads, n, self.dim), np.float32)
        values = np.zeros((self.kv_heads, n, self.values.stop - self.values.start), np.float32)
        for record, at in records:
            first = int(record["first"])
            # A step that was cut off may have left rows of tokens that no step is about.
            if record["kind"] == ROWS and first < n:
                rows = self.rows(record, at)[:, :n - first]
                keys[:, first:first + rows.shape[1]] = rows[:, :, :self.dim]
                values[:, first:first + rows.shape[1]] = rows[:, :, self.values]
        return keys, values


class Step:
    """One layer's: queries [G, H/G, D]; of each KV head the kept blocks and chosen positions."""

    def __init__(self, dump, record, at):
        g, bf16 = dump.kv_heads, int(dump.header["act"]) == 1
        self.n, self.number = int(record["n"]), int(record["step"])
        self.keep_blocks, self.keep_tokens = int(record["keep_blocks"]), int(record["keep_tokens"])
        self.hot_rows = int(record["hot_rows"])
        self.queries = dump.floats(at, bf16, g, dump.heads // g, dump.dim)
        at += (dump.heads * dump.dim * (2 if bf16 else 4) + 7) // 8 * 8
        n_kept, n_chosen = dump.array(at, np.int32, 2, g)
        at += 8 * g
        kept = dump.array(at, np.int32, g, self.keep_blocks)
        at += kept.nbytes
        chosen = dump.array(at, np.int32, g, self.keep_tokens)
        at += chosen.nbytes
        self.kept = [kept[i, :n_kept[i]] for i in range(g)]
        self.chosen = [chosen[i, :n_chosen[i]] for i in range(g)]
        blocks = (self.n + dump.block - 1) // dump.block
        self.on_device = None
        if self.hot_rows:
            words = dump.array(at, np.uint32, (blocks + 31) // 32)
            self.on_device = np.unpackbits(words.view(np.uint8), bitorder="little")[:blocks].astype(bool)


def attention(queries, keys, scale):
    """[heads, n]: softmax of all products, in double."""
    scores = (queries @ keys.T).astype(np.float64) * float(scale)
    p = np.exp(scores - scores.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def output_error(p, values, chosen, full=None):
    """Of each query head: |attention over chosen - attention| / |attention|.  full: p @ values."""
    p = p.astype(np.float32)
    full = p @ values if full is None else full
    part = p[:, chosen]
    sparse = part / part.sum(1, keepdims=True) @ values[chosen]
    return np.linalg.norm(sparse - full, axis=1) / np.linalg.norm(full, axis=1)


def in_blocks(blocks, n, size):
    """[n] whether a position is in one of them."""
    inside = np.zeros((n + size - 1) // size, bool)
    inside[blocks] = True
    return np.repeat(inside, size)[:n]
