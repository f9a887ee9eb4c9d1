"""A reader of .safetensors made from the format's description alone: numpy, no safetensors, none of our writers.

A file is a little-endian u64, that many bytes of JSON, then the tensors' bytes; offsets count from the end of the JSON,
leave no holes and do not overlap.
"""

import json
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np

KINDS = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1", "U8": "<u1", "BF16": "<u2"}


def read_file(path: Path) -> dict[str, np.ndarray]:
    """Every tensor; bfloat16 comes as float32."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    body = data[8 + length :]
    spans = sorted(tuple(facts["data_offsets"]) for facts in header.values())
    assert spans[0][0] == 0
    assert spans[-1][1] == len(body)
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    return {name: _tensor(body, **facts) for name, facts in header.items()}


def _tensor(body: bytes, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    start, end = data_offsets
    kind = np.dtype(KINDS[dtype])
    assert start % kind.itemsize == 0
    assert end - start == kind.itemsize * int(np.prod(shape, dtype=np.int64))
    values = np.frombuffer(body[start:end], kind).reshape(shape)
    return (values.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else values


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of model.safetensors, or of the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return read_file(folder / "model.safetensors")
    facts = json.loads(index.read_text())
    files = {name: read_file(folder / name) for name in sorted(set(facts["weight_map"].values()))}
    assert {t: n for n, held in files.items() for t in held} == facts["weight_map"]
    assert sum(path.stat().st_size for path in (folder / name for name in files)) > facts["metadata"]["total_size"]
    return {name: value for held in files.values() for name, value in held.items()}
