"""An independent reader of TinyChatEngine's directories of raw arrays; shares no code with the writer.

Arrays have no headers and are little-endian, [outputs, inputs]. A Linear in INT4 is four files; codes lie as
  QM_ARM   runs of 32 inputs: byte e holds the inputs e (low) and e + 16
  QM_x86   runs of 64 inputs: byte e holds the inputs e (low) and e + 32
  QM_CUDA  int32 words of eight neighbouring inputs, the first in the lowest nibble
and value = (code - 8) * scale. The first two have a float32 scale for 32 inputs, the last a float16 scale for 128, in
rows padded to whole words of eight groups.
"""

import struct
from pathlib import Path

import numpy as np

RUNS = {"qm_arm": 32, "qm_x86": 64}


def read_floats(path: Path, *shape: int, half: bool = False) -> np.ndarray:
    values = np.frombuffer(path.read_bytes(), "<f2" if half else "<f4")
    return values.astype(np.float32).reshape(shape)


def read_int4(folder: Path, method: str, outputs: int, inputs: int) -> np.ndarray:
    """The values of a Linear, float32 [outputs, inputs]."""
    if method == "qm_cuda":
        return _read_cuda(folder, outputs, inputs)
    run = RUNS[method]
    packed = np.frombuffer((folder / "weight_int4.bin").read_bytes(), np.uint8).reshape(
        outputs, inputs // run, run // 2
    )
    codes = np.concatenate([packed & 15, packed >> 4], axis=-1).reshape(outputs, inputs)
    scales = read_floats(folder / "scaling_factor_int4.bin", outputs, inputs // 32)
    assert not read_floats(folder / "offset_int4.bin", outputs, inputs // 32).any()
    assert struct.unpack("<f", (folder / "zero_point_int4.bin").read_bytes()) == (8.0,)
    return (codes.astype(np.float32) - 8) * np.repeat(scales, 32, axis=1)


def _read_cuda(folder: Path, outputs: int, inputs: int) -> np.ndarray:
    words = np.frombuffer((folder / "weight_int4.bin").read_bytes(), "<u4").reshape(outputs, inputs // 8)
    codes = np.stack([(words >> (4 * place)) & 15 for place in range(8)], axis=-1).reshape(outputs, inputs)
    groups = inputs // 128
    padded = -(-groups // 8) * 8
    scales = np.frombuffer((folder / "scaling_factor_int4.bin").read_bytes(), "<f2").reshape(outputs, padded)
    zeros = np.frombuffer((folder / "zero_point_int4.bin").read_bytes(), "<u4")
    assert zeros.size == outputs * padded // 8 and (zeros == 0x88888888).all()
    assert not scales[:, groups:].any()
    return (codes.astype(np.float32) - 8) * np.repeat(scales[:, :groups].astype(np.float32), 128, axis=1)


def q4_0_step(weight: np.ndarray) -> np.ndarray:
    """The symmetric rounding of the files: d = the value of greatest magnitude / -8, code = floor(w / d + 8.5)."""
    groups = weight.reshape(-1, 32).astype(np.float32)
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(1)[:, None], 1)
    scale = extreme / np.float32(-8)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    codes = np.clip(np.floor(groups * inverse + np.float32(8.5)), 0, 15)
    return ((codes - 8) * scale).reshape(weight.shape)


def read_vocabulary(path: Path, count: int) -> list[tuple[bytes, float]]:
    """Tokens and scores: nine unused numbers, then length, bytes and a float for each token."""
    data, at, out = path.read_bytes(), 36, []
    for _ in range(count):
        (size,) = struct.unpack_from("<I", data, at)
        word = data[at + 4 : at + 4 + size]
        (score,) = struct.unpack_from("<f", data, at + 4 + size)
        out.append((word, score))
        at += 8 + size
    assert at == len(data)
    return out
