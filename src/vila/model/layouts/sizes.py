"""Sizes that a config asks for against the shapes in the weight files, before any module is built.

A module is built from its config alone: one that asks for 200,000 layers or a trillion embedding rows would take hours
or terabytes before its weights are found to be of another size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vila.core.errors import LayoutError
from vila.core.fields import Fields
from vila.model.config import VilaConfig
from vila.model.packed import PackedWeight
from vila.model.tower import has_cls
from vila.model.weights import Piece, Shape

_LLM, _TOWER = "language_model.", "vision_tower."
_LLM_BLOCK = re.compile(r"language_model\.(?:model\.)?layers\.(\d+)\.")
_TOWER_BLOCK = re.compile(r"vision_tower\.encoder\.layers?\.(\d+)\.")
# Of a part whose weights are missing; they are listed by name then, which takes its modules.
_UNSEEN_LAYERS, _UNSEEN_POSITIONS = 1000, 2**20


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight in a file: its name there, the file's name, and its shape as the model has it."""

    name: str
    file: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} in {self.file}"


def check_sizes(
    config: VilaConfig,
    pieces: Mapping[str, Piece],
    int4: Mapping[str, PackedWeight],
    *,
    text: Fields,
    vision: Fields,
) -> None:
    """Compare a config with the shapes of the weights, by our names of them.

    text, vision: objects that the configs of LLM and tower were read from, for errors.
    Raises LayoutError with field, value, and the size of the weights. A part without weights is not compared unless it
    is enormous: loading lists what is missing.
    """
    stored = {name: Stored(piece.name, piece.file.path.name, piece.shape) for name, piece in pieces.items()}
    for name, weight in int4.items():
        codes = weight.parts["qweight"]
        stored[f"{name}.weight"] = Stored(codes.name, codes.file.path.name, weight.shape)
    parts = ((text, _text_sizes(config.text_config, stored)), (vision, _tower_sizes(config.vision_config, stored)))
    for facts, sizes in parts:
        for key, asked, found, source in sizes:
            if asked != found:
                raise _misfit(facts, key, asked, f"{found:,}, as in {source}")


def _misfit(facts: Fields, key: str, asked: Any, expected: str) -> LayoutError:
    """Return the error for a size; one that the file does not name is the default of its config class."""
    absent = facts.get(key) is None and key in _IN_CONFIGS
    return LayoutError(
        "not in the file, and its default does not fit the weights" if absent else "does not fit the weights",
        file=facts.file,
        field=facts.field(key),
        value=asked,
        expected=expected,
        hint="the config and the weights are of different models: fetch the checkpoint again",
    )


_IN_CONFIGS = (
    "num_hidden_layers",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "mlp_ratio",
    "image_size",
    "patch_size",
)

Sizes = Iterator[tuple[str, int, int, object]]
"""Key of a config, the value asked for, the value found, and the weights that it was found in."""


def _text_sizes(llm: Any, stored: Mapping[str, Stored]) -> Sizes:
    blocks = {int(match[1]) for name in stored if (match := _LLM_BLOCK.match(name))}
    yield from _depth(llm.num_hidden_layers, blocks)
    block = f"{_LLM}model.layers.{min(blocks, default=0)}."
    if table := stored.get(f"{_LLM}model.embed_tokens.weight"):
        yield "vocab_size", llm.vocab_size, table.shape[0], table
        yield "hidden_size", llm.hidden_size, table.shape[-1], table
    if gate := stored.get(f"{block}mlp.gate_proj.weight"):
        yield "intermediate_size", llm.intermediate_size, gate.shape[0], gate
    heads = llm.num_attention_heads
    width = getattr(llm, "head_dim", None) or llm.hidden_size // heads
    for field, name, asked in (
        ("num_attention_heads", "q", heads),
        ("num_key_value_heads", "k", getattr(llm, "num_key_value_heads", heads)),
    ):
        weights = [stored.get(f"{_LLM}model.layers.{block}.self_attn.{name}_proj.weight") for block in sorted(blocks)]
        rows = {weight.shape[0] for weight in weights if weight}
        # Blocks that differ are damaged, and are listed by loading.
        if rows != {asked * width} and (len(rows) == 1 or asked * width > _UNSEEN_POSITIONS):
            found = next((weight for weight in weights if weight), None)
            yield field, asked, min(rows, default=0) // max(1, width), found or "the weight files"


def _depth(asked: int, blocks: set[int]) -> Sizes:
    last = max(blocks, default=-1) + 1
    # Missing blocks are listed by name later, unless there are too many to build.
    found = last if last < 2 * len(blocks) else len(blocks)
    if blocks or asked > _UNSEEN_LAYERS:
        yield "num_hidden_layers", asked, found, "the weight files"


def _tower_sizes(tower: Any, stored: Mapping[str, Stored]) -> Sizes:
    blocks = {int(match[1]) for name in stored if (match := _TOWER_BLOCK.match(name))}
    yield from _depth(tower.num_hidden_layers, blocks)
    names = ("embeddings.patch_embedding.weight", "embeddings.patch_embeddings.projection.weight")
    patches = next((stored[_TOWER + name] for name in names if _TOWER + name in stored), None)
    patch, side = _side(tower.patch_size), _side(tower.image_size)
    positions = (side // patch) ** 2
    if patches:
        yield "hidden_size", tower.hidden_size, patches.shape[0], patches
        yield "patch_size", patch, patches.shape[-1], patches
    names = ("embeddings.position_embedding.weight", "embeddings.position_embeddings")
    if table := next((stored[_TOWER + name] for name in names if _TOWER + name in stored), None):
        found = math.isqrt(max(0, table.shape[-2] - has_cls(tower)))
        if positions + has_cls(tower) != table.shape[-2]:
            yield "image_size", side, found * patch, table
    elif positions > _UNSEEN_POSITIONS:
        yield "image_size", side, 0, "the weight files"
    name = next((name for name in stored if _TOWER_BLOCK.match(name) and name.endswith("mlp.fc1.weight")), "")
    if name:
        first = stored[name]
        if hasattr(tower, "intermediate_size"):
            yield "intermediate_size", tower.intermediate_size, first.shape[0], first
        else:
            yield "mlp_ratio", tower.mlp_ratio, first.shape[0] // max(1, first.shape[-1]), first


def _side(size: Any) -> int:
    return int(size[0] if isinstance(size, list | tuple) else size)
