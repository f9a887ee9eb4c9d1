"""A reader of compressed-tensors' `pack-quantized`, from its description; numpy alone.

weight_packed int32 [N, ceil(K/8)]: nibble i of word c holds the value of input 8c + i, plus 8.
weight_scale [N, K/g]; weight_shape int64 [2] = N, K; weight_zero_point int32 [ceil(N/8), K/g], packed down the outputs:
nibble i of row r is the zero of output 8r + i, plus 8. No zero point: it is 0.
"""

import json
import re
from pathlib import Path

import numpy as np

from tests.export.readers.safetensors_file import read_folder


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """Every weight as float32 by the file's names; the packed ones dequantized."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "pack-quantized"
    assert config["quantization_status"] == "compressed"
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"]
    weights = group["weights"]
    assert (weights["num_bits"], weights["type"], weights["strategy"]) == (4, "int", "group")
    held = read_folder(folder)
    out = {}
    for name, tensor in held.items():
        stem, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            assert not any(_ignores(pattern, stem) for pattern in config["ignore"])
            assert (f"{stem}.weight_zero_point" in held) != weights["symmetric"]
            out[f"{stem}.weight"] = _linear(held, stem, weights["group_size"])
        elif leaf not in ("weight_scale", "weight_shape", "weight_zero_point"):
            out[name] = tensor.astype(np.float32)
    return out


def _ignores(pattern: str, name: str) -> bool:
    return re.match(pattern[3:], name) is not None if pattern.startswith("re:") else name.endswith(pattern)


def _linear(held: dict[str, np.ndarray], stem: str, group: int) -> np.ndarray:
    outputs, inputs = held[f"{stem}.weight_shape"]
    signed = _nibbles(held[f"{stem}.weight_packed"])[:, :inputs] - 8
    scale = held[f"{stem}.weight_scale"].astype(np.float32)
    assert signed.shape[0] == outputs
    assert scale.shape == (outputs, inputs // group)
    zero = np.zeros(scale.shape, np.int64)
    if f"{stem}.weight_zero_point" in held:
        zero = _nibbles(held[f"{stem}.weight_zero_point"].T).T[:outputs] - 8
    return ((signed - np.repeat(zero, group, 1)) * np.repeat(scale, group, 1)).astype(np.float32)


def _nibbles(words: np.ndarray) -> np.ndarray:
    """int32 [R, C] to values 0..15 [R, 8C], the lowest nibble first."""
    shifts = 4 * np.arange(8)
    return ((words.astype(np.int64)[:, :, None] >> shifts) & 15).reshape(words.shape[0], -1)
