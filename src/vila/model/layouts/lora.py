"""LoRA weights as PEFT writes them, merged while they load: W + (alpha / r) B A (arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vila.core.errors import LayoutError
from vila.core.reading import read_json
from vila.model.weights import Piece, pieces_of, weight_file

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


def adapter_facts(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a LoRA directory. Raises LayoutError when it is that of another kind of adapter."""
    path = folder / "adapter_config.json"
    facts = read_json(path)
    kind = facts.get("peft_type") if isinstance(facts, dict) else None
    if kind != "LORA" or not isinstance(facts.get("r"), int) or "lora_alpha" not in facts:
        raise LayoutError(f"{path}: peft_type is {kind!r}; only LORA, with its r and lora_alpha, is read here")
    return facts


def read_adapter(folder: Path, pieces: Mapping[str, Piece]) -> dict[str, Piece]:
    """The base's pieces, changed by the adapter of `folder`, and replaced by what it holds whole (`modules_to_save`).

    Raises LayoutError for adapters that are more than LoRA, and for adapter weights that fit nothing.
    """
    facts = adapter_facts(folder)
    scale = _scale(folder, facts)
    parts = set(facts.get("modules_to_save") or ())
    adapter = pieces_of([weight_file(_file(folder))])
    out = dict(pieces)
    problems = []
    for name in sorted(adapter):
        # PEFT names an adapter inside the weight when it holds several: lora_A.default.weight.
        plain = name.removeprefix(_PREFIX).replace(".default.", ".")
        target = plain.removesuffix(_A) + ".weight"
        partner = name.replace("lora_A", "lora_B")
        if plain.endswith(_B):
            if name.replace("lora_B", "lora_A") not in adapter:
                problems.append(f"{name} has no lora_A")
        elif not plain.endswith(_A):
            if parts.isdisjoint(plain.split(".")):
                problems.append(f"{name} is no LoRA weight")
            elif plain not in pieces or pieces[plain].shape != adapter[name].shape:
                problems.append(f"{name} {adapter[name].shape} replaces {plain}, which the base does not have so")
            else:
                out[plain] = adapter[name]
        elif partner not in adapter:
            problems.append(f"{name} has no lora_B")
        elif target not in pieces:
            problems.append(f"{name} changes {target}, which the base does not have")
        else:
            out[target] = _merged(pieces[target], adapter[name], adapter[partner], scale)
    if problems:
        raise LayoutError(f"{folder}: {'; '.join(problems)}; is the base the model that the adapter was trained on?")
    return out


def fold(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """`weight` [out, in] + scale x `up` [out, r] x `down` [r, in], summed in float32, in the type of `weight`."""
    return (weight.float() + scale * (up.float() @ down.float())).to(weight.dtype)


def _scale(folder: Path, facts: Mapping[str, Any]) -> float:
    refused = {
        "use_dora": "DoRA",
        "rank_pattern": "ranks by layer",
        "alpha_pattern": "alphas by layer",
        "fan_in_fan_out": "transposed weights",
    }
    for key, what in refused.items():
        if facts.get(key):
            raise LayoutError(f"{folder}: the adapter uses {what} ({key}), which is not read here; merge it with PEFT")
    if facts.get("bias", "none") != "none":
        raise LayoutError(f"{folder}: the adapter holds biases (bias={facts['bias']!r}); merge it with PEFT")
    rank = facts["r"]
    return float(facts["lora_alpha"]) / (math.sqrt(rank) if facts.get("use_rslora") else rank)


def _file(folder: Path) -> Path:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise LayoutError(f"{folder}: adapter_config.json without adapter_model.safetensors or adapter_model.bin")


def _merged(base: Piece, down: Piece, up: Piece, scale: float) -> Piece:
    rows, columns = up.shape[0], down.shape[1]
    if base.shape != (rows, columns) or up.shape[1] != down.shape[0]:
        raise LayoutError(
            f"{down.file.path}: {up.name} x {down.name} gives {(rows, columns)}, the base weight {base.name} is "
            f"{base.shape}"
        )

    def add(weight: Tensor) -> Tensor:
        with up.file.mapped() as get, torch.no_grad():
            return fold(weight if base.change is None else base.change(weight), get(down.name), get(up.name), scale)

    return replace(base, change=add)
