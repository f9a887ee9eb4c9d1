"""Models with random weights and the sizes of known models, for speed measurements without a download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from vila.core.errors import ConfigError
from vila.kernels.int4 import Int4Weight
from vila.model.config import VilaConfig
from vila.model.int4_weights import use_int4
from vila.model.modeling import VilaForConditionalGeneration

# O outputs  I inputs  G inputs of a group


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama model. `tied`: the LM head shares the embeddings."""

    title: str
    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False


SHAPES: Mapping[str, Shape] = {
    "vila-7b": Shape("VILA-7B", 4096, 11008, 32, 32, 32, 32000),
    "vila-13b": Shape("VILA-13B", 5120, 13824, 40, 40, 40, 32000),
    "tinyllama": Shape("TinyLlama-1.1B", 2048, 5632, 22, 32, 4, 32000),
    "smollm": Shape("SmolLM2-135M", 576, 1536, 30, 9, 3, 49152, tied=True),
    "tiny": Shape("tiny", 128, 256, 2, 2, 1, 512, tied=True),
}
"""Known sizes; `tiny` is for tests."""


def text_config(shape: Shape, context: int) -> LlamaConfig:
    """Return the LLM's config for a context length."""
    return LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=context,
    )


def check_groups(shape: Shape, group_size: int) -> None:
    """Raise ConfigError if the group size does not divide the input sizes; 0: no groups."""
    if group_size and (shape.width % group_size or shape.mlp % group_size):
        problem = f"{shape.title} has layers of {shape.width} and {shape.mlp} inputs, which it does not divide"
        raise ConfigError(problem, field="group_size", value=group_size, hint="use 64 or 32")


def random_model(
    shape: Shape, dtype: torch.dtype, device: str = "cpu", *, group_size: int = 0, context: int = 4096
) -> VilaForConditionalGeneration:
    """Return a model with random weights, created on `device`, and a minimal vision tower.

    group_size: group size of INT4 weights in the decoder blocks; 0: weights in `dtype`.
    Raises ConfigError as `check_groups`.
    """
    check_groups(shape, group_size)
    model = _skeleton(shape, context).to(device=device, dtype=dtype)
    blocks = model.get_decoder().layers
    for index in range(shape.layers):
        with torch.device("meta"):
            block = LlamaDecoderLayer(model.config.text_config, index).eval()
        blocks.append(block)
    model.config.text_config.num_hidden_layers = shape.layers
    generator = torch.Generator(device).manual_seed(0)
    inside = {module for module in blocks.modules()}
    weights = {}
    for name, module in model.named_modules():
        if module not in inside:
            continue
        if isinstance(module, nn.Linear):
            if group_size:
                weights[name] = random_int4(module.out_features, module.in_features, group_size, generator)
            else:
                drawn = torch.empty(module.weight.shape, dtype=dtype, device=device)
                _set(module, drawn.normal_(std=module.in_features**-0.5, generator=generator))
        elif hasattr(module, "weight"):
            _set(module, torch.ones(shape.width, dtype=dtype, device=device))
    if weights:
        use_int4(model, weights)
    return model.eval()


def random_int4(num_outputs: int, num_inputs: int, group_size: int, generator: torch.Generator) -> Int4Weight:
    """Return uniform codes with scales that preserve the variance of the input."""
    groups, device = num_inputs // group_size, generator.device
    codes = torch.randint(0, 256, (num_outputs, num_inputs // 2), dtype=torch.uint8, generator=generator, device=device)
    # Codes from -8 to 7 have a standard deviation of 4.6.
    scales = torch.full((num_outputs, groups), num_inputs**-0.5 / 4.6, dtype=torch.float16, device=device)
    return Int4Weight(codes, scales, torch.full((num_outputs, groups), 8, dtype=torch.uint8, device=device), group_size)


def _skeleton(shape: Shape, context: int) -> VilaForConditionalGeneration:
    """Return the model without decoder blocks."""
    text = text_config(shape, context)
    text.num_hidden_layers = 0
    vision = CLIPVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=28, patch_size=14
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VilaForConditionalGeneration(VilaConfig(vision_config=vision, text_config=text, select_layer=-1)).eval()


def _set(module: nn.Module, weight: torch.Tensor) -> None:
    module.weight = nn.Parameter(weight, requires_grad=False)
