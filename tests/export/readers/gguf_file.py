"""An independent reader of GGUF version 3: metadata, tensors and their blocks; it shares no code with the writer.

The file is little-endian: magic, version, counts, metadata, tensor facts, then data at multiples of 32 bytes.
Dimensions are written from the innermost outwards. Blocks of 32 values:
  Q8_0  half d, 32 signed bytes            value = d * q
  Q4_0  half d, 16 bytes                   value = d * (q - 8)
  Q4_1  half d, half m, 16 bytes           value = d * q + m
Byte j of the sixteen holds the value j in its low and the value j + 16 in its high nibble.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
F32, F16, Q4_0, Q4_1, Q8_0 = 0, 1, 2, 3, 8
ALIGNMENT = 32


@dataclass
class GgufFile:
    metadata: dict[str, object]
    types: dict[str, int]
    """Of tensors, by ggml's numbers."""
    tensors: dict[str, np.ndarray]
    """Values in float32, outermost dimension first."""


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, form: str) -> object:
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return value

    def text(self) -> str:
        size = self.take("Q")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def value(self, kind: int) -> object:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            inner, count = self.take("I"), self.take("Q")
            return [self.value(inner) for _ in range(count)]
        return self.take(SCALARS[kind])


def read_gguf(path: Path) -> GgufFile:
    cursor = _Cursor(path.read_bytes())
    assert cursor.data[:4] == b"GGUF"
    cursor.at = 4
    assert cursor.take("I") == 3
    num_tensors, num_facts = cursor.take("Q"), cursor.take("Q")
    metadata: dict[str, object] = {}
    for _ in range(num_facts):
        key = cursor.text()
        assert key not in metadata, key
        metadata[key] = cursor.value(cursor.take("I"))
    facts = []
    for _ in range(num_tensors):
        name = cursor.text()
        inner_first = [cursor.take("Q") for _ in range(cursor.take("I"))]
        facts.append((name, inner_first[::-1], cursor.take("I"), cursor.take("Q")))
    start = math.ceil(cursor.at / ALIGNMENT) * ALIGNMENT
    out = GgufFile(metadata, {}, {})
    end = start
    for name, shape, kind, offset in facts:
        assert name not in out.tensors, name
        assert offset % ALIGNMENT == 0
        out.types[name] = kind
        values, size = _values(cursor.data, start + offset, math.prod(shape), kind)
        out.tensors[name] = values.reshape(shape)
        end = max(end, start + offset + math.ceil(size / ALIGNMENT) * ALIGNMENT)
    assert len(cursor.data) == end, "bytes after the last tensor, or a file cut short"
    return out


def _values(data: bytes, at: int, count: int, kind: int) -> tuple[np.ndarray, int]:
    if kind in (F32, F16):
        form = "<f4" if kind == F32 else "<f2"
        return np.frombuffer(data, form, count, at).astype(np.float32), count * int(form[2])
    assert count % 32 == 0
    size = {Q8_0: 34, Q4_0: 18, Q4_1: 20}[kind]
    blocks = np.frombuffer(data, np.uint8, count // 32 * size, at).reshape(-1, size)
    scale = _half(blocks, 0)
    if kind == Q8_0:
        return (scale * blocks[:, 2:].view(np.int8).astype(np.float32)).reshape(-1), blocks.size
    packed = blocks[:, 2:] if kind == Q4_0 else blocks[:, 4:]
    codes = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)
    values = scale * (codes - 8) if kind == Q4_0 else scale * codes + _half(blocks, 2)
    return values.reshape(-1), blocks.size


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    return blocks[:, at : at + 2].copy().view("<f2").astype(np.float32)


def rotary_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as transformers has them: llama.cpp's row 2i of a head came from i, 2i + 1 from i + half."""
    width = rows.shape[0] // heads
    out = np.empty_like(rows)
    for head in range(heads):
        for i in range(width // 2):
            out[head * width + i] = rows[head * width + 2 * i]
            out[head * width + width // 2 + i] = rows[head * width + 2 * i + 1]
    return out
