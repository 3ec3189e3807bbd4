"""Reads GGUF files: metadata, and tensors as float32 arrays.

Of the types of tensors those that the one file needs which is read here: F32, F16, Q8_0 and
Q4_1.  Anything else is refused by its number.  Every quantised value is a product of two numbers
of few bits, or such a product plus another, so float32 holds it as it is.
"""
import struct

import numpy as np

MAGIC, VERSIONS = b"GGUF", (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
           12: "d"}
F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8
# What a block of values is made of; a block has one value where nothing is quantised.
LAYOUTS = {
    F32: (1, np.dtype("<f4")),
    F16: (1, np.dtype("<f2")),
    Q4_1: (32, np.dtype([("scale", "<f2"), ("least", "<f2"), ("codes", "u1", 16)])),
    Q8_0: (32, np.dtype([("scale", "<f2"), ("codes", "i1", 32)])),
}


class GgufError(Exception):
    """What is wrong with the file, as a sentence."""


class Cursor:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, n):
        if n > len(self.data) - self.at:
            raise GgufError(f"the file ends at byte {len(self.data)}, in the middle of its header")
        piece = self.data[self.at:self.at + n]
        self.at += n
        return piece

    def scalar(self, kind):
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]

    def string(self):
        return bytes(self.take(self.scalar("Q"))).decode()

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, n = self.scalar("I"), self.scalar("Q")
            return [self.value(kind) for _ in range(n)]
        if kind not in SCALARS:
            raise GgufError(f"metadata of type {kind} is not known")
        return self.scalar(SCALARS[kind])


def dequantise(kind, blocks):
    """float32 values of an array of blocks, in their order."""
    if kind in (F32, F16):
        return blocks.astype(np.float32)
    scale = blocks["scale"].astype(np.float32)[:, None]
    if kind == Q8_0:
        return (scale * blocks["codes"]).ravel()
    # The low halves of the 16 bytes are the first 16 values, the high halves the others.
    codes = np.concatenate([blocks["codes"] & 15, blocks["codes"] >> 4], axis=1)
    return (scale * codes + blocks["least"].astype(np.float32)[:, None]).ravel()


class GgufFile:
    """metadata: {key: value}; tensor(name): its values, rows first as PyTorch has them."""

    def __init__(self, data):
        cursor = Cursor(memoryview(data))
        if bytes(cursor.take(4)) != MAGIC:
            raise GgufError("the file does not begin with GGUF")
        version = cursor.scalar("I")
        if version not in VERSIONS:
            raise GgufError(f"GGUF version {version} is not known")
        n_tensors, n_keys = cursor.scalar("Q"), cursor.scalar("Q")
        self.metadata, self.places = {}, {}
        for _ in range(n_keys):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.scalar("I"))
        for _ in range(n_tensors):
            name = cursor.string()
            shape = [cursor.scalar("Q") for _ in range(cursor.scalar("I"))][::-1]
            kind, offset = cursor.scalar("I"), cursor.scalar("Q")
            self.places[name] = kind, shape, offset
        align = self.metadata.get("general.alignment", 32)
        self.data, self.start = cursor.data, -(-cursor.at // align) * align

    def tensor(self, name):
        if name not in self.places:
            raise GgufError(f"the file has no tensor {name}")
        kind, shape, offset = self.places[name]
        if kind not in LAYOUTS:
            raise GgufError(f"tensor {name} has the type {kind}, which is not read here")
        per_block, layout = LAYOUTS[kind]
        n, at = int(np.prod(shape)), self.start + offset
        if n % per_block or at + n // per_block * layout.itemsize > len(self.data):
            raise GgufError(f"tensor {name} does not fit the file")
        blocks = np.frombuffer(self.data, layout, n // per_block, at)
        return dequantise(kind, blocks).reshape(shape)
