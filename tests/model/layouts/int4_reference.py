"""Readers and writers of packed 4-bit weights, written from the description of the formats; no `vila` in here.

N outputs, K inputs, q [N, K] codes 0..15, z [N, K/g] zeros 0..15, s [N, K/g] scales; the weight is (q - z) * s.
"""

from __future__ import annotations

import numpy as np

GEMM = [0, 2, 4, 6, 1, 3, 5, 7]


def random_weight(seed: int, rows: int, columns: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, zeros and float16 scales."""
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 16, (rows, columns))
    zeros = generator.integers(0, 16, (rows, columns // group))
    return codes, zeros, generator.uniform(0.005, 0.02, zeros.shape).astype(np.float16)


def dequantized(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The weight [N, K] in float32."""
    group = codes.shape[1] // zeros.shape[1]
    wide = [np.repeat(part.astype(np.float32), group, axis=1) for part in (zeros, scales)]
    return (codes.astype(np.float32) - wide[0]) * wide[1]


def read_gemm(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, group: int) -> np.ndarray:
    """The weight [N, K] of AutoAWQ's gemm tensors: words of eight outputs, nibble i holds output 8c + GEMM[i]."""
    inputs, outputs = qweight.shape[0], scales.shape[1]
    weight = np.zeros((outputs, inputs), np.float32)
    for output in range(outputs):
        shift = 4 * GEMM.index(output % 8)
        codes = (qweight.astype(np.int64)[:, output // 8] >> shift) & 15
        zeros = (qzeros.astype(np.int64)[:, output // 8] >> shift) & 15
        weight[output] = (codes - np.repeat(zeros, group)) * np.repeat(scales[:, output].astype(np.float32), group)
    return weight


def _words(nibbles: np.ndarray) -> np.ndarray:
    """[..., 8n] nibbles to int32 words [..., n], the first in the lowest bits."""
    parts = nibbles.astype(np.uint32).reshape(*nibbles.shape[:-1], -1, 8)
    return (parts << (4 * np.arange(8, dtype=np.uint32))).sum(-1, dtype=np.uint32).view(np.int32)


def write_gemm(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
    """AutoAWQ's gemm tensors."""

    def ordered(values: np.ndarray) -> np.ndarray:
        return _words(values.T.reshape(values.shape[1], -1, 8)[..., GEMM].reshape(values.shape[1], -1))

    return {"qweight": ordered(codes), "qzeros": ordered(zeros), "scales": np.ascontiguousarray(scales.T)}


def _padded(columns: int, group: int) -> int:
    unit = {32: 4, 64: 2}.get(group, 1)
    words = -(-(columns // group) // 8)
    return -(-words // unit) * unit * 8


def write_gemv(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
    """AutoAWQ's gemv tensors, which were TinyChat's first."""
    group = codes.shape[1] // zeros.shape[1]
    wide = [(0, 0), (0, _padded(codes.shape[1], group) - zeros.shape[1])]
    return {"qweight": _words(codes), "qzeros": _words(np.pad(zeros, wide)), "scales": np.pad(scales, wide)}


def write_tinychat(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
    """TinyChat's v2 packing, position by position."""
    rows, columns = codes.shape
    group = columns // zeros.shape[1]
    out = np.zeros((rows // 4, columns), np.uint16)
    for tile_row in range(rows // 4):
        for run in range(columns // 64):
            flat = [
                codes[4 * tile_row + row, 64 * run + 32 * half + (p % 4) * 8 + p // 4]
                for row in range(4)
                for half in range(2)
                for p in range(32)
            ]
            for word in range(64):
                a, b, c, d = (int(value) for value in flat[4 * word : 4 * word + 4])
                out[tile_row, 64 * run + word] = a | b << 4 | c << 8 | d << 12
    wide = [(0, _padded(columns, group) - zeros.shape[1]), (0, 0)]
    scaled = -(scales * zeros.astype(np.float16))
    return {
        "qweight": out.view(np.int16),
        "scales": np.pad(np.ascontiguousarray(scales.T), wide),
        "scaled_zeros": np.pad(np.ascontiguousarray(scaled.T), wide),
    }
