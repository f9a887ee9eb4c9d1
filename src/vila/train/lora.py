"""LoRA (arXiv 2106.09685) and QLoRA (arXiv 2305.14314) for the LLM, with PEFT: add and save adapters."""

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
from vila.model.layouts.lora_adapter import write_adapter
from vila.model.modeling import VilaForConditionalGeneration
from vila.model.processor import VilaProcessor

_LLM = "language_model"
_DOWN, _UP = ".lora_A.default.weight", ".lora_B.default.weight"


def add_adapters(model: VilaForConditionalGeneration, lora: Lora, seed: int) -> None:
    """Add float32 adapters to Linears of the LLM, and freeze everything else.

    A is initialised from `seed`, the same on every rank; B is zero, so the output does not change at first.
    With `lora.bits` of 4 or 8 the frozen Linears of the LLM are quantized and moved to the CUDA device.
    Raises ConfigError for targets that are not Linears of the LLM and for a missing CUDA device, MissingExtraError for
    packages that are not installed.
    """
    peft = require("peft", "stage.lora", extra="lora")
    targets = _targets(model, lora.targets)
    if lora.bits < 16:
        _quantize(model, lora.bits)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        # With a list of names PEFT would also wrap the tower's Linears.
        target_modules=rf"{_LLM}\.(?:.*\.)?(?:{'|'.join(map(re.escape, targets))})",
    )
    flag = f"is_loaded_in_{lora.bits}bit"  # PEFT chooses its layers by this attribute
    setattr(model, flag, True)
    with torch.random.fork_rng(devices=[]):
        peft.inject_adapter_in_model(config, model)
    delattr(model, flag)
    # PEFT creates its layers in train mode, with dropout.
    model.language_model.train(model.language_model.training)
    _initialise(model, seed)


def adapter_parameters(model: nn.Module) -> list[str]:
    """Return the names of the adapters' parameters."""
    return [name for name, _ in model.named_parameters() if name.endswith((_DOWN, _UP))]


def save_adapter(
    model: VilaForConditionalGeneration,
    processor: VilaProcessor,
    folder: Path,
    base: str,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a directory that PEFT and `load_model` read: adapters, projector, a trained tower, and the processor.

    base:    path or hub id of the base model, as in the recipe.
    tensors: full tensors by parameter name, for a sharded model; must include the written parameters.
    """
    parts = ["projector"]
    if any(parameter.requires_grad for parameter in model.vision_tower.parameters()):
        parts.append("vision_tower")
    full = dict(model.state_dict()) if tensors is None else tensors
    wanted = [*adapter_parameters(model), *(name for name in full if name.partition(".")[0] in parts)]
    chosen = {name: full[name].detach().cpu() for name in wanted}
    write_adapter(model, processor, chosen, folder, base=base, whole_modules=parts)


def _linears(model: VilaForConditionalGeneration) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the Linears of the LLM except the LM head, with their names in the model."""
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
            "the LLM has no Linear of this name",
            field="stage.lora.targets",
            value=unknown[0] if len(unknown) == 1 else unknown,
            expected=", ".join(known),
        )
    return list(wanted) or known


def _initialise(model: nn.Module, seed: int) -> None:
    """Initialise A like the weight of a Linear and B with zeros, as in the paper's code; float32."""
    generator = torch.Generator().manual_seed(seed)
    for name in adapter_parameters(model):
        parameter = model.get_parameter(name)
        value = torch.zeros(parameter.shape)
        if name.endswith(_DOWN):
            nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
        parameter.data = value.to(parameter.device)


def _quantize(model: VilaForConditionalGeneration, bits: int) -> None:
    package = require("bitsandbytes", f"stage.lora.bits={bits}")
    if not torch.cuda.is_available():
        raise ConfigError("needs a CUDA device", field="stage.lora.bits", value=bits, hint="set stage.lora.bits=16")
    for name, linear in list(_linears(model)):
        model.set_submodule(name, _quantized_linear(package.nn, linear, bits).to("cuda"))


def _quantized_linear(layers: Any, linear: nn.Linear, bits: int) -> Any:
    """Return a Linear of bitsandbytes with the same weights; moving it to the device quantizes them."""
    options: dict[str, Any] = {"bias": linear.bias is not None, "device": "meta"}
    if bits == 4:
        # No double quantization: it saves 0.37 bits per weight, but adds a lookup to every matmul.
        nf4 = {"quant_type": "nf4", "compress_statistics": False}
        new = layers.Linear4bit(linear.in_features, linear.out_features, **options, **nf4)
        new.weight = layers.Params4bit(linear.weight.data, requires_grad=False, **nf4)
    else:
        new = layers.Linear8bitLt(linear.in_features, linear.out_features, **options, has_fp16_weights=False)
        new.weight = layers.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    if linear.bias is not None:
        new.bias = linear.bias
    return new
