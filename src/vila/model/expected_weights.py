"""Names and shapes of a model's weights from its settings alone, for `vila info`, which must not import torch.

Covers the types in `settings.DEFAULTS`; a test compares it with the models that transformers builds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vila.families import head_width, num_kv_heads
from vila.model.settings import ModelSettings
from vila.model.vision_sizes import check_square, has_cls_token
from vila.model.weights import Shape

Weights = Iterator[tuple[str, Shape]]


def expected_weights(settings: ModelSettings) -> dict[str, Shape] | None:
    """Return the shape of every weight by its published name, without a tied LM head; None if it is not known here."""
    tower = settings.vision_config
    if not settings.is_plain or getattr(tower, "use_swiglu_ffn", False) or settings.projector_type == "identity":
        return None
    towers = {"clip_vision_model": _clip, "siglip_vision_model": _siglip, "dinov2": _dinov2}
    parts = {
        "vision_tower": towers[tower.model_type](tower),
        "projector": _projector(settings.projector_type, settings.vision_width, settings.text_config.hidden_size),
        "language_model": _llm(settings.text_config),
    }
    return {f"{part}.{name}": shape for part, weights in parts.items() for name, shape in weights}


def _linear(name: str, outputs: int, inputs: int, *, bias: bool = True) -> Weights:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _norm(name: str, width: int) -> Weights:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _llm(llm: Any) -> Weights:
    width, mlp, head = llm.hidden_size, llm.intermediate_size, head_width(llm)
    queries, keys = llm.num_attention_heads * head, num_kv_heads(llm) * head
    # Qwen2 has biases in query, key and value; the others have them nowhere, or where the config says.
    biased = getattr(llm, "attention_bias", False)
    qkv_biased, mlp_biased = biased or llm.model_type == "qwen2", getattr(llm, "mlp_bias", False)
    yield "model.embed_tokens.weight", (llm.vocab_size, width)
    for index in range(llm.num_hidden_layers):
        block = f"model.layers.{index}"
        yield from _linear(f"{block}.self_attn.q_proj", queries, width, bias=qkv_biased)
        yield from _linear(f"{block}.self_attn.k_proj", keys, width, bias=qkv_biased)
        yield from _linear(f"{block}.self_attn.v_proj", keys, width, bias=qkv_biased)
        yield from _linear(f"{block}.self_attn.o_proj", width, queries, bias=biased)
        yield from _linear(f"{block}.mlp.gate_proj", mlp, width, bias=mlp_biased)
        yield from _linear(f"{block}.mlp.up_proj", mlp, width, bias=mlp_biased)
        yield from _linear(f"{block}.mlp.down_proj", width, mlp, bias=mlp_biased)
        yield f"{block}.input_layernorm.weight", (width,)
        yield f"{block}.post_attention_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)
    if not llm.tie_word_embeddings:
        yield "lm_head.weight", (llm.vocab_size, width)


def _num_positions(tower: Any) -> int:
    patches = check_square(tower.image_size, "image_size") // check_square(tower.patch_size, "patch_size")
    return int(patches**2) + has_cls_token(tower)


def _patch_shape(tower: Any) -> Shape:
    side = check_square(tower.patch_size, "patch_size")
    return tower.hidden_size, tower.num_channels, side, side


def _encoder(tower: Any) -> Weights:
    width = tower.hidden_size
    for index in range(tower.num_hidden_layers):
        block = f"encoder.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{block}.self_attn.{name}", width, width)
        yield from _norm(f"{block}.layer_norm1", width)
        yield from _linear(f"{block}.mlp.fc1", tower.intermediate_size, width)
        yield from _linear(f"{block}.mlp.fc2", width, tower.intermediate_size)
        yield from _norm(f"{block}.layer_norm2", width)
    yield from _norm("post_layernorm", width)


def _clip(tower: Any) -> Weights:
    width = tower.hidden_size
    yield "embeddings.class_embedding", (width,)
    yield "embeddings.patch_embedding.weight", _patch_shape(tower)
    yield "embeddings.position_embedding.weight", (_num_positions(tower), width)
    yield from _norm("pre_layrnorm", width)
    yield from _encoder(tower)


def _siglip(tower: Any) -> Weights:
    width = tower.hidden_size
    yield "embeddings.patch_embedding.weight", _patch_shape(tower)
    yield "embeddings.patch_embedding.bias", (width,)
    yield "embeddings.position_embedding.weight", (_num_positions(tower), width)
    yield from _encoder(tower)
    if tower.vision_use_head:
        yield "head.probe", (1, 1, width)
        yield "head.attention.in_proj_weight", (3 * width, width)
        yield "head.attention.in_proj_bias", (3 * width,)
        yield from _linear("head.attention.out_proj", width, width)
        yield from _norm("head.layernorm", width)
        yield from _linear("head.mlp.fc1", tower.intermediate_size, width)
        yield from _linear("head.mlp.fc2", width, tower.intermediate_size)


def _dinov2(tower: Any) -> Weights:
    width, mlp = tower.hidden_size, int(tower.hidden_size * tower.mlp_ratio)
    yield "embeddings.cls_token", (1, 1, width)
    if tower.use_mask_token:
        yield "embeddings.mask_token", (1, width)
    yield "embeddings.position_embeddings", (1, _num_positions(tower), width)
    yield "embeddings.patch_embeddings.projection.weight", _patch_shape(tower)
    yield "embeddings.patch_embeddings.projection.bias", (width,)
    for index in range(tower.num_hidden_layers):
        block = f"encoder.layer.{index}"
        for name in ("query", "key", "value"):
            yield from _linear(f"{block}.attention.attention.{name}", width, width, bias=tower.qkv_bias)
        yield from _linear(f"{block}.attention.output.dense", width, width)
        yield from _norm(f"{block}.norm1", width)
        yield from _norm(f"{block}.norm2", width)
        yield f"{block}.layer_scale1.lambda1", (width,)
        yield f"{block}.layer_scale2.lambda1", (width,)
        yield from _linear(f"{block}.mlp.fc1", mlp, width)
        yield from _linear(f"{block}.mlp.fc2", width, mlp)
    yield from _norm("layernorm", width)


def _projector(kind: str, width_in: int, width_out: int) -> Weights:
    if kind == "linear":
        yield "weight", (width_out, width_in)
        yield "bias", (width_out,)
    elif kind == "mlp_downsample":
        yield from _norm("1", 4 * width_in)
        yield from _linear("2", width_out, 4 * width_in)
        yield from _linear("4", width_out, width_out)
    else:
        yield from _linear("0", width_out, width_in)
        for index in range(1, int(kind[3 : kind.index("x")])):
            yield from _linear(str(2 * index), width_out, width_out)
