"""LLM and tokenizer of a GGUF file: tensor names, metadata, row order for llama.cpp's rotary embedding, vocabulary."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gguf import GGUFWriter, RopeScalingType
from torch import Tensor

from vila.chat.jinja import chat_template
from vila.chat.templates import find_template
from vila.core.errors import LayoutError
from vila.export.gguf_tensors import GgufTensor, TensorType, choose_type, int4_chunks
from vila.export.source import CHUNK_BYTES, LLM, ExportSource
from vila.families import FAMILIES, find_family, head_width, num_kv_heads, rope_parameters
from vila.model.processor import VilaProcessor

TYPES = {"f16": TensorType.F16, "q8_0": TensorType.Q8_0, "q4_0": TensorType.Q4_0, "q4_1": TensorType.Q4_1}
_FILE_TYPES = {"f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7}
_ROPES = ("default", "linear", "llama3")
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INSIDE = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def llm_problems(config: Any) -> list[str]:
    """Return why llama.cpp does not support this LLM. config: its transformers config."""
    reasons = []
    supported = [family.model_type for family in FAMILIES.values() if family.gguf]
    if config.model_type not in supported:
        reasons.append(f"LLM type {config.model_type!r} is not supported; supported: {', '.join(supported)}")
    rope = rope_parameters(config).get("rope_type", "default")
    if rope not in _ROPES:
        reasons.append(f"rope_type {rope!r} is not supported; supported: {', '.join(_ROPES)}")
    if getattr(config, "use_sliding_window", False):
        reasons.append("sliding window attention is not supported (use_sliding_window=true)")
    if config.hidden_act != "silu":
        reasons.append(f"hidden_act {config.hidden_act!r} is not supported; llama.cpp computes 'silu'")
    return reasons


def context_length(config: Any) -> int:
    """Return the context length; for Mistral at most the sliding window, which llama.cpp does not implement."""
    window = getattr(config, "sliding_window", None)
    longest = int(config.max_position_embeddings)
    return min(longest, window) if config.model_type == "mistral" and window else longest


def add_llm_metadata(writer: GGUFWriter, config: Any, precision: str) -> None:
    """Add the metadata of the LLM."""
    writer.add_type("model")
    writer.add_file_type(_FILE_TYPES[precision])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(num_kv_heads(config))
    writer.add_key_length(head_width(config))
    writer.add_value_length(head_width(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_width(config))
    rope = rope_parameters(config)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def llm_tensors(source: ExportSource, precision: str) -> list[GgufTensor]:
    """Return the tensors of the LLM in the order of its blocks.

    Vectors are float32. With 4-bit precisions embeddings and LM head have 8 bits, since quantization affects them most;
    llama-quantize does the same. A matrix whose rows are not whole blocks of 32 is F16.
    """
    config = source.config.text_config
    packed = {f"{name}.weight": weight for name, weight in source.int4.items()}
    tensors = []
    for name in sorted([*source.tensors, *packed], key=_order):
        if not name.startswith(LLM) or (name == f"{LLM}lm_head.weight" and source.is_tied):
            continue
        module, leaf = name.removeprefix(LLM).rsplit(".", 1)
        wanted = TensorType.Q8_0 if module in _OUTSIDE and precision in ("q4_0", "q4_1") else TYPES[precision]
        shape = packed[name].shape if name in packed else source.shape(name)
        type_ = choose_type(wanted, shape)
        # Quantization to blocks makes several float32 copies of a chunk.
        rows = partial(source.rows, name, torch.float32, CHUNK_BYTES // 4)
        rows = partial(int4_chunks, source, f"{LLM}{module}", type_) if name in packed else rows
        chunks = partial(_reorder, rows, _head_rows(module, config))
        tensors.append(GgufTensor(f"{_gguf_name(module)}.{leaf}", shape, type_, chunks))
    if rope_parameters(config).get("rope_type") == "llama3":
        factors = llama3_rope_factors(rope_parameters(config), head_width(config))
        tensors.append(GgufTensor("rope_freqs.weight", tuple(factors.shape), TensorType.F32, lambda: iter([factors])))
    return tensors


def interleave_rotary_halves(rows: Tensor, width: int) -> Tensor:
    """Interleave the two rotary halves of each head of q or k [heads * width, ...], as llama.cpp expects.

    A head of four rows [a0 a1 b0 b1] becomes [a0 b0 a1 b1].
    """
    return rows.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)


def llama3_rope_factors(rope: Any, width: int) -> Tensor:
    """Return the divisor of each rotary frequency of Llama 3.1, float32 [width / 2]: 1, a ramp, `factor`.

    As the `llama3` scaling of transformers: only wavelengths longer than the original context are scaled fully.
    """
    theta, factor = rope.get("rope_theta", 10000.0), rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    positions = rope["original_max_position_embeddings"]
    waves = 2 * math.pi * theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    ramp = ((positions / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - ramp) / factor + ramp)).float()


def _reorder(rows_of: Callable[[], Iterator[Tensor]], width: int) -> Iterator[Tensor]:
    """Yield the rows, with the rotary halves interleaved in every head of `width` rows; 0 keeps their order."""
    if not width:
        yield from rows_of()
        return
    rest: Tensor | None = None
    for chunk in rows_of():
        rows = chunk if rest is None else torch.cat([rest, chunk])
        whole = len(rows) // width * width
        if whole:
            yield interleave_rotary_halves(rows[:whole], width)
        rest = rows[whole:].clone()


def _head_rows(module: str, config: Any) -> int:
    """Return the rows of a head that must be interleaved, else 0: llama.cpp rotates adjacent rows in `llama` only."""
    rotated = module.endswith(("self_attn.q_proj", "self_attn.k_proj"))
    return head_width(config) if rotated and find_family(config.model_type).gguf == "llama" else 0


def _gguf_name(module: str) -> str:
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    _, _, index, inside = module.split(".", 3)
    return f"blk.{index}.{_INSIDE[inside]}"


def _order(name: str) -> tuple[int, str]:
    parts = name.removeprefix(LLM).split(".")
    return (int(parts[2]) if parts[1] == "layers" else -1, name)


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's token types."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_WORDS + r"\p{N}" + _REST: "qwen2", _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe"}
"""Pre-tokenizer patterns of Qwen2 and Llama 3, and their names in llama.cpp."""
SUPPORTED = "SentencePiece BPE (LLaMA), byte-level BPE with the pre-tokenizer of gpt-2, smollm, qwen2 or llama-bpe"


@dataclass(frozen=True)
class Vocabulary:
    """Tokenizer metadata of a GGUF file.

    model:   `llama` for SentencePiece, `gpt2` for byte-level BPE.
    pre:     llama.cpp's name of the pre-tokenizer; `default` for SentencePiece.
    tokens:  one for each row of the embeddings; types: their token types.
    scores:  of SentencePiece; tokens with higher scores are merged first. Empty for BPE.
    merges:  of BPE, two tokens separated by a space. Empty for SentencePiece.
    special: ids of `bos`, `eos`, `eot`, `unk`, `pad`, if they exist.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[str]
    special: Mapping[str, int]
    add_bos: bool
    add_space_prefix: bool
    chat_template: str


def tokenizer_problems(tokenizer: Any) -> list[str]:
    """Return why llama.cpp would tokenize text differently."""
    return _spec_problems(_spec(tokenizer))


def _spec_problems(spec: Mapping[str, Any]) -> list[str]:
    if spec["model"]["type"] != "BPE":
        return [f"a {spec['model']['type']} tokenizer is not supported; supported: {SUPPORTED}"]
    if not _is_sentencepiece(spec) and _pre_tokenizer(spec) is None:
        return [f"the pre-tokenizer is not supported by llama.cpp; supported: {SUPPORTED}"]
    return []


def build_vocabulary(processor: VilaProcessor, rows: int) -> Vocabulary:
    """Return the vocabulary of a model with `rows` embeddings; rows without a token get an unused token.

    Raises LayoutError for an unsupported tokenizer.
    """
    tokenizer = processor.tokenizer
    spec = _spec(tokenizer)
    if problems := _spec_problems(spec):
        raise LayoutError("; ".join(problems), field="tokenizer")
    pieces = {number: token for token, number in tokenizer.get_vocab().items() if number < rows}
    tokens = [pieces.get(number, f"[PAD{number}]") for number in range(rows)]
    is_sentencepiece = _is_sentencepiece(spec)
    merges = [tuple(one.split(" ", 1)) if isinstance(one, str) else tuple(one) for one in spec["model"]["merges"]]
    template = find_template(processor.template) if processor.template else None
    return Vocabulary(
        model="llama" if is_sentencepiece else "gpt2",
        pre="default" if is_sentencepiece else str(_pre_tokenizer(spec)),
        tokens=tokens,
        types=[_token_type(number, pieces, tokenizer, is_sentencepiece) for number in range(rows)],
        scores=_scores(tokens, merges) if is_sentencepiece else (),
        merges=() if is_sentencepiece else [" ".join(pair) for pair in merges] or [_NO_MERGE],
        special=_special_ids(tokenizer, template.stop if template else (), rows),
        add_bos=bool(processor.span_tokenizer.bos_ids),
        add_space_prefix=processor.span_tokenizer.dummy_prefix,
        chat_template=chat_template(template) if template else "",
    )


# llama.cpp rejects a file without merges. This one has no effect: "!!" is not in a vocabulary without merges.
_NO_MERGE = "! !"


def add_tokenizer_metadata(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """Add the metadata of the tokenizer."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for name, number in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _spec(tokenizer: Any) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return spec


def _is_sentencepiece(spec: Mapping[str, Any]) -> bool:
    return bool(spec["model"].get("byte_fallback"))


def _pre_tokenizer(spec: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name of the pre-tokenizer of a byte-level BPE tokenizer, None if it has none."""
    if spec.get("normalizer") not in (None, {"type": "NFC"}):
        return None
    before = spec.get("pre_tokenizer") or {}
    steps = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    uses_regex = steps[-1].get("use_regex", True)
    match steps[:-1]:
        case []:
            return "gpt-2" if uses_regex else None
        case [{"type": "Digits", "individual_digits": True}]:
            return "smollm" if uses_regex else None
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}]:
            return None if uses_regex else _SPLITS.get(pattern)
    return None


def _token_type(number: int, pieces: Mapping[int, str], tokenizer: Any, is_sentencepiece: bool) -> int:
    if number not in pieces:
        return UNUSED
    if is_sentencepiece and number == tokenizer.unk_token_id:
        return UNKNOWN
    if (added := tokenizer.added_tokens_decoder.get(number)) is not None:
        return CONTROL if added.special else USER_DEFINED
    return BYTE if is_sentencepiece and _BYTE.fullmatch(pieces[number]) else NORMAL


def _scores(tokens: Sequence[str], merges: Sequence[tuple[str, ...]]) -> list[float]:
    """Return scores that reproduce the order of merges: SentencePiece merges the token with the highest score first."""
    first: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        first.setdefault("".join(pair), rank)
    return [-float(first.get(token, 0)) for token in tokens]


def _special_ids(tokenizer: Any, stop: Sequence[str], rows: int) -> dict[str, int]:
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    known = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    turn_ends = [known[text] for text in stop if text in known and known[text] != ids["eos"]]
    if turn_ends:
        ids["eot"] = turn_ends[0]
    return {name: number for name, number in ids.items() if number is not None and number < rows}
