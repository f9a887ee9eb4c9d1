"""Adapters that learn in place of the LLM's weights (LoRA, arXiv 2106.09685), by PEFT; also over 4 or 8 bits.

A model keeps its class and its calls: PEFT only wraps Linears. QLoRA is arXiv 2305.14314.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vila.config.schema import Lora
from vila.core.errors import ConfigError
from vila.core.optional import require
from vila.model.layouts.lora_adapter import merge_lora, write_adapter
from vila.model.modeling import VilaForConditionalGeneration
from vila.model.processor import VilaProcessor

_LLM = "language_model"
_DOWN, _UP, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."


def add_adapters(model: VilaForConditionalGeneration, lora: Lora, seed: int) -> None:
    """Put float32 adapters into Linears of the LLM, and freeze everything else.

    Their first values are drawn from `seed` alone, on every process alike; at first they change nothing, for B is zero.
    With `lora.bits` of 4 or 8 the frozen Linears of the LLM are moved to the CUDA device in that many bits.
    Raises ConfigError for targets that are no Linears of the LLM, and for what is not installed or not there.
    """
    peft = require("peft", "stage.lora", extra="lora")
    targets = _targets(model, lora.targets)
    if lora.bits < 16:
        _quantise(model, lora.bits)
    facts = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        # A list of names would, in PEFT, also mean the tower's.
        target_modules=rf"{_LLM}\.(?:.*\.)?(?:{'|'.join(map(re.escape, targets))})",
    )
    flag = f"is_loaded_in_{lora.bits}bit"  # by which PEFT chooses its layers
    setattr(model, flag, True)
    with torch.random.fork_rng(devices=[]):
        peft.inject_adapter_in_model(facts, model)
    delattr(model, flag)
    # PEFT's layers start out in train mode, where dropout acts.
    model.language_model.train(model.language_model.training)
    _draw(model, seed)


def adapter_parameters(model: nn.Module) -> list[str]:
    """Names of the adapters' parameters."""
    return [name for name, _ in model.named_parameters() if name.endswith((_DOWN, _UP))]


def save_adapter(
    model: VilaForConditionalGeneration,
    processor: VilaProcessor,
    folder: Path,
    base: str,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a directory that PEFT and `load_model` read: adapters, projector, a tower that learnt, and the processor.

    base:    path or hub id of the model that the adapters were put into, as the recipe names it.
    tensors: whole tensors by parameter name, where those of the model are dealt out; others in it are not needed.
    """
    parts = ["projector"]
    if any(parameter.requires_grad for parameter in model.vision_tower.parameters()):
        parts.append("vision_tower")
    held = dict(model.state_dict()) if tensors is None else tensors
    wanted = [*adapter_parameters(model), *(name for name in held if name.partition(".")[0] in parts)]
    chosen = {name: held[name].detach().cpu() for name in wanted}
    write_adapter(model, processor, chosen, folder, base=base, whole_modules=parts)


def merge_adapters(model: VilaForConditionalGeneration) -> None:
    """Fold the adapters into the weights of the LLM, which must be whole, and take them away; in place.

    Raises ConfigError for an LLM in 4 or 8 bits, which would round them away.
    """
    scale = _scale(model)
    for name, layer in _adapted(model):
        base = layer.get_submodule("base_layer")
        assert isinstance(base, nn.Linear)
        if not base.weight.is_floating_point():
            raise ConfigError(
                f"{name} is held in few bits, which would round its adapter away; save the adapter, and load or "
                "convert it: it is then merged into the weights of its base"
            )
        down, up = (layer.get_parameter(leaf.removeprefix(".")) for leaf in (_DOWN, _UP))
        with torch.no_grad():
            base.weight.data = merge_lora(base.weight, down, up, scale)
        model.set_submodule(name, base)
    del model.peft_config


def merged_tensors(model: VilaForConditionalGeneration, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the model as it is without adapters, from `tensors`, its whole ones by name with adapters."""
    scale = _scale(model)
    out = {}
    for name, tensor in tensors.items():
        stem, inside, leaf = name.partition(_BASE)
        if name.endswith((_DOWN, _UP)):
            continue
        changed = inside and leaf == "weight"
        new = merge_lora(tensor, tensors[stem + _DOWN], tensors[stem + _UP], scale) if changed else tensor
        out[f"{stem}.{leaf}" if inside else name] = new
    return out


def _scale(model: VilaForConditionalGeneration) -> float:
    facts = model.peft_config["default"]
    return float(facts.lora_alpha) / int(facts.r)


def _adapted(model: nn.Module) -> list[tuple[str, nn.Module]]:
    names = [name.removesuffix(_DOWN) for name in adapter_parameters(model) if name.endswith(_DOWN)]
    return [(name, model.get_submodule(name)) for name in names]


def _linears(model: VilaForConditionalGeneration) -> Iterator[tuple[str, nn.Linear]]:
    """The Linears of the LLM but its head, by their names in the model."""
    head = model.get_output_embeddings()
    for name, module in model.language_model.named_modules(prefix=_LLM):
        if isinstance(module, nn.Linear) and module is not head:
            yield name, module


def _targets(model: VilaForConditionalGeneration, wanted: Sequence[str]) -> list[str]:
    names = [name for name, _ in _linears(model)]
    known = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    unknown = [target for target in wanted if not any(name.endswith(f".{target}") for name in names)]
    if unknown:
        raise ConfigError(
            f"stage.lora.targets: the LLM has no Linear called {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(known)}"
        )
    return list(wanted) or known


def _draw(model: nn.Module, seed: int) -> None:
    """A as a Linear's weights are drawn, B zero, as in the paper's code; float32."""
    generator = torch.Generator().manual_seed(seed)
    for name in adapter_parameters(model):
        parameter = model.get_parameter(name)
        value = torch.zeros(parameter.shape)
        if name.endswith(_DOWN):
            nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
        parameter.data = value.to(parameter.device)


def _quantise(model: VilaForConditionalGeneration, bits: int) -> None:
    package = require("bitsandbytes", f"stage.lora.bits={bits}")
    if not torch.cuda.is_available():
        raise ConfigError(f"stage.lora.bits={bits} needs a CUDA device, and there is none; set stage.lora.bits=16")
    for name, linear in list(_linears(model)):
        model.set_submodule(name, _in_bits(package.nn, linear, bits).to("cuda"))


def _in_bits(layers: Any, linear: nn.Linear, bits: int) -> Any:
    """A Linear of bitsandbytes with the same weights, which it rounds when it is moved to its device."""
    facts: dict[str, Any] = {"bias": linear.bias is not None, "device": "meta"}
    if bits == 4:
        # Without double quantisation: it saves 0.37 bits a weight, and costs a second look-up in every product.
        kind = {"quant_type": "nf4", "compress_statistics": False}
        new = layers.Linear4bit(linear.in_features, linear.out_features, **facts, **kind)
        new.weight = layers.Params4bit(linear.weight.data, requires_grad=False, **kind)
    else:
        new = layers.Linear8bitLt(linear.in_features, linear.out_features, **facts, has_fp16_weights=False)
        new.weight = layers.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    if linear.bias is not None:
        new.bias = linear.bias
    return new
