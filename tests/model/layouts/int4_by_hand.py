"""Third-party 4-bit checkpoints: tiny full-precision ones with blocks packed by the reference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny
from tests.model.layouts.int4_reference import dequantized, random_weight
from vila.model.loading import load_model, save_model

GROUP = 32
Writer = Callable[[np.ndarray, np.ndarray, np.ndarray], dict[str, np.ndarray]]


def model_folder(folder: Path, layout: str, family: str = "llama", tower: str = "clip") -> Path:
    """A full-precision model with sizes that every packing supports."""
    save_model(*tiny.vila(family, tower=tower, hidden_size=64, intermediate_size=128), folder, layout)
    return folder


def is_block_linear(name: str) -> bool:
    """Whether a weight is a Linear of the LLM's blocks, in any layout's naming."""
    return "layers." in name and "vision" not in name and name.endswith("_proj.weight")


def packed(
    tensors: dict[str, Tensor], write: Writer, group: int = GROUP
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random 4-bit weights for the Linears of the blocks, and the same in full precision."""
    small, large = {}, {}
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        if not is_block_linear(name):
            small[name] = tensor.half() if tensor.is_floating_point() else tensor
            large[name] = small[name].to(tensor.dtype)
            continue
        weight = random_weight(number, *tensor.shape, group)
        stem = name.removesuffix("weight")
        small |= {stem + ending: torch.from_numpy(part) for ending, part in write(*weight).items()}
        large[name] = torch.from_numpy(dequantized(*weight))
    return small, large


def third_party(root: Path, layout: str, write: Writer, family: str = "llama", group: int = GROUP) -> tuple[Path, Path]:
    """A model with a 4-bit LLM and no declaration in its config, and its twin in full precision."""
    ours = model_folder(root / "int4" / "model", layout, family)
    twin = root / "twin" / "model"
    shutil.copytree(ours, twin)
    file = next(part for part in (Path("llm/model.safetensors"), Path("model.safetensors")) if (ours / part).is_file())
    small, large = packed(load_file(ours / file), write, group)
    save_file(small, ours / file, metadata={"format": "pt"})
    save_file(large, twin / file, metadata={"format": "pt"})
    return ours, twin


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file, creating it if needed; None removes a key."""
    facts = json.loads(path.read_text()) if path.is_file() else {}
    facts |= changes
    path.write_text(json.dumps({key: value for key, value in facts.items() if value is not None}))


def awq(version: str = "gemm", **changes: Any) -> dict[str, Any]:
    """A `quantization_config`."""
    facts = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": version}
    return {**facts, **changes}


def logits(folder: Path, **options: Any) -> Tensor:
    """Logits of an image and a question in float32."""
    model, processor = load_model(folder, dtype="float32", **options)
    inputs = processor(text="<image>What?", images=[tiny.image(0)], return_tensors="pt")
    with torch.inference_mode():
        return model(**inputs).logits[..., :259]
