"""Sizes of a model as plain numbers, for FLOPs and memory; and the config of a recipe's model, without weights."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from vila.config.load import load_recipe, recipe_names
from vila.config.schema import ModelSource
from vila.core.errors import ConfigError, near_names
from vila.families import find_family
from vila.model.config import VilaConfig
from vila.model.layouts.config_file import read_config, text_config
from vila.model.layouts.tower_files import read_tower
from vila.model.loading import open_checkpoint
from vila.model.modeling import VilaForConditionalGeneration
from vila.model.vision_sizes import num_patches, num_projected_tokens
from vila.model.vision_tower import encoder_blocks

_WITHOUT_CLASS_TOKEN = ("siglip_vision_model",)


@dataclass(frozen=True, slots=True)
class Matrix:
    """Weight of a Linear layer; `name` inside its block."""

    name: str
    inputs: int
    outputs: int

    @property
    def weights(self) -> int:
        """Number of elements."""
        return self.inputs * self.outputs


@dataclass(frozen=True, slots=True)
class Stack:
    """A stack of equal transformer blocks.

    layers:   number of blocks; the first `used` of them are computed.
    matrices: Linear layers of one block; `small` is the number of its other parameters (norms, biases).
    two_step_activation: whether the activation of the MLP saves a second tensor, as CLIP's `quick_gelu` does.
    layer_scale:         whether the outputs of attention and MLP are scaled by a trainable vector.
    """

    layers: int
    used: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    matrices: tuple[Matrix, ...]
    small: int
    two_step_activation: bool = False
    layer_scale: bool = False

    @property
    def block(self) -> int:
        """Parameters of one block."""
        return self.small + sum(matrix.weights for matrix in self.matrices)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a model.

    pixels:        values of the pixel tensor of an image.
    views:         tower inputs per image: more than one with several scales (S2).
    tower_tokens:  tokens of one view in the tower, class token included.
    patches:       vectors per image at the input of the projector; `media_tokens` at its output.
    patch_weights: weights of the patch embedding, applied at `patch_positions` positions.
    tower_rest:    parameters of the tower before its blocks; `tower_unused`: those that are not computed.
    projector:     Linear layers of the projector; `projector_small`: its other parameters.
    merges:        whether the projector merges patches first.
    tied:          whether the LM head shares the weights of the token embeddings.
    """

    tower: Stack
    pixels: int
    views: int
    tower_tokens: int
    patch_positions: int
    patch_weights: int
    tower_rest: int
    tower_unused: int
    patches: int
    media_tokens: int
    projector: tuple[Matrix, ...]
    projector_small: int
    merges: bool
    llm: Stack
    vocabulary: int
    tied: bool
    final_norm: int

    @property
    def embedding(self) -> int:
        """Parameters of the token embeddings, and of an LM head that is not tied."""
        return self.vocabulary * self.llm.width


def shape_of(config: VilaConfig) -> ModelShape:
    """Return the sizes of the model of a config, which is built on the meta device."""
    with torch.device("meta"):
        model = VilaForConditionalGeneration(config)
    vision, text = config.vision_config, config.text_config
    depth = int(vision.num_hidden_layers)
    used = config.select_layer if config.select_layer >= 0 else depth + 1 + config.select_layer
    blocks = encoder_blocks(model.vision_tower, depth)
    tower = _stack(list(blocks), used, vision)
    block_name = find_family(text.model_type).decoder_block
    decoder = [module for module in model.language_model.modules() if type(module).__name__ == block_name]
    llm = _stack(decoder, len(decoder), text)
    conv = next(module for module in model.vision_tower.modules() if isinstance(module, nn.Conv2d))
    before = _before_blocks(model.vision_tower)
    total = _count(model.vision_tower)
    side = int(_first(vision.image_size))
    scales = config.s2_scales or [side]
    positions = num_patches(vision, side)
    kept_class = config.select_feature == "cls_patch" and vision.model_type not in _WITHOUT_CLASS_TOKEN
    patches = num_patches(vision, scales[0]) + kept_class
    linears = [module for module in model.projector.modules() if isinstance(module, nn.Linear)]
    head = model.get_output_embeddings().get_parameter("weight")
    tied = bool(getattr(text, "tie_word_embeddings", False))
    llm_total = _count(model.language_model) if not tied else _count_tied(model.language_model)
    return ModelShape(
        tower=tower,
        pixels=3 * scales[-1] ** 2,
        views=sum(math.ceil(scale / (config.s2_max_split or scale)) ** 2 for scale in scales),
        tower_tokens=positions + (vision.model_type not in _WITHOUT_CLASS_TOKEN),
        patch_positions=positions,
        patch_weights=conv.weight.numel(),
        tower_rest=before,
        tower_unused=total - before - used * tower.block,
        patches=patches,
        media_tokens=num_projected_tokens(config.projector_type, patches),
        projector=tuple(Matrix(str(n), m.in_features, m.out_features) for n, m in enumerate(linears)),
        projector_small=_count(model.projector) - sum(m.weight.numel() for m in linears),
        merges=config.projector_type == "mlp_downsample",
        llm=llm,
        vocabulary=int(head.shape[0]),
        tied=tied,
        final_norm=llm_total - llm.layers * llm.block - head.numel() * (1 if tied else 2),
    )


def count_parameters(shape: ModelShape) -> dict[str, int]:
    """Return the number of parameters by component; 0 for a tied head.

    `blocks` are the decoder blocks and the final norm of the LLM.
    """
    return {
        "tower": shape.tower_rest + shape.tower.used * shape.tower.block + shape.tower_unused,
        "projector": sum(matrix.weights for matrix in shape.projector) + shape.projector_small,
        "embeddings": shape.embedding,
        "blocks": shape.llm.layers * shape.llm.block + shape.final_norm,
        "head": 0 if shape.tied else shape.embedding,
    }


def _stack(blocks: Sequence[nn.Module], used: int, config: object) -> Stack:
    first = blocks[0]
    linears = {name: module for name, module in first.named_modules() if isinstance(module, nn.Linear)}
    heads = int(config.num_attention_heads)  # type: ignore[attr-defined]
    width = int(config.hidden_size)  # type: ignore[attr-defined]
    mlp = [module for name, module in linears.items() if "attn" not in name and "attention" not in name]
    return Stack(
        layers=len(blocks),
        used=used,
        width=width,
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_width=int(getattr(config, "head_dim", None) or width // heads),
        mlp_width=mlp[0].out_features,
        matrices=tuple(Matrix(name, m.in_features, m.out_features) for name, m in linears.items()),
        small=_count(first) - sum(m.weight.numel() for m in linears.values()),
        two_step_activation=getattr(config, "hidden_act", "") == "quick_gelu",
        layer_scale=any("layer_scale" in name or "lambda_" in name for name, _ in first.named_parameters()),
    )


def _before_blocks(tower: nn.Module) -> int:
    """Return the number of parameters before the first block: embeddings, and CLIP's norm after them."""
    names = ("embeddings.", "pre_layrnorm.")
    return sum(p.numel() for name, p in tower.named_parameters() if name.startswith(names))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _count_tied(llm: nn.Module) -> int:
    # On the meta device a tied head may be a separate tensor.
    return sum(p.numel() for name, p in llm.named_parameters() if not name.startswith("lm_head."))


def _first(size: int | Sequence[int]) -> int:
    return size if isinstance(size, int) else size[0]


# Configs of a recipe's model: from disk, or from the table of known models


def config_of(source: ModelSource) -> VilaConfig:
    """Return the config of the model that a stage trains.

    If `path` does not exist but is the output of a packaged recipe, the model source of that recipe is used.
    Raises ConfigError if no config is found.
    """
    if source.path:
        folder = Path(source.path).expanduser()
        if folder.exists():
            config = open_checkpoint(folder).config
            assert isinstance(config, VilaConfig)
            return config
        return config_of(_source_of_output(source.path))
    vision = _part("vision", source.vision)
    return VilaConfig(
        vision_config=vision,
        text_config=_part("llm", source.llm),
        projector_type=source.projector,
        select_layer=source.select_layer,
        select_feature=source.select_feature,
        template=source.template,
    )


def known_models(kind: str) -> list[str]:
    """Return the hub ids with packaged configs. kind: `llm` or `vision`."""
    return sorted(_table()[kind])


def _source_of_output(path: str) -> ModelSource:
    if source := _packaged_outputs().get(Path(path)):
        return source
    raise ConfigError(
        "no such directory, and no packaged recipe writes it",
        field="model.path",
        value=path,
        hint="to plan before it exists, give its parts: model.path= model.llm=... model.vision=...",
    )


@cache
def _packaged_outputs() -> dict[Path, ModelSource]:
    """Return the model source of each packaged recipe by its output directory."""
    return {recipe.output.dir / "model": recipe.model for recipe in map(load_recipe, recipe_names())}


def _part(kind: str, name: str) -> PretrainedConfig:
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        if kind == "vision":
            return read_tower(folder).config
        llm = read_config(folder)
        return text_config(llm, llm.text("model_type"))
    facts = _table()[kind].get(name)
    if facts is None:
        near = near_names(name, known_models(kind), 1)
        raise ConfigError(
            "no directory with a config.json, and not a model with a packaged config",
            field=f"model.{kind}",
            value=name,
            hint=f"did you mean {near[0]!r}?" if near else f"known models: {', '.join(known_models(kind))}",
        )
    plain = dict(facts)
    return AutoConfig.for_model(plain.pop("model_type"), **plain)


@cache
def _table() -> dict[str, dict[str, dict[str, Any]]]:
    text = (resources.files("vila.plan") / "known_models.json").read_text(encoding="utf-8")
    table: dict[str, dict[str, dict[str, Any]]] = json.loads(text)
    return table
