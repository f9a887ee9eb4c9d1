"""A tokenizer in llama.cpp's words: the pieces with their kinds, scores or merges, special ids, the chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vila.chat.jinja import chat_template
from vila.chat.templates import find_template
from vila.core.errors import LayoutError

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from vila.model.processor import VilaProcessor

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's kinds of pieces."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_WORDS + r"\p{N}" + _REST: "qwen2", _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe"}
"""How Qwen2 and Llama 3 cut a text into words, and what llama.cpp calls it."""
KNOWN = "SentencePiece BPE (LLaMA), and byte-level BPE cut as in gpt-2, smollm, qwen2 or llama-bpe"


@dataclass(frozen=True)
class Vocabulary:
    """What the file says of a tokenizer.

    model:   `llama` for SentencePiece, `gpt2` for byte-level BPE.
    pre:     llama.cpp's name of the rule that cuts a text into words; `default` for SentencePiece.
    tokens:  one for each row of the embeddings, with its kind.
    scores:  of SentencePiece: the greater, the earlier a piece is put together. Empty for BPE.
    merges:  of BPE, two pieces with a space between them. Empty for SentencePiece.
    special: ids of `bos`, `eos`, `eot`, `unk`, `pad`, as far as there are any.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    kinds: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[str]
    special: Mapping[str, int]
    add_bos: bool
    add_space_prefix: bool
    chat_template: str


def tokenizer_refusals(tokenizer: Any) -> list[str]:
    """Why llama.cpp would cut a text into other tokens than this tokenizer does."""
    return _reasons(_spec(tokenizer))


def _reasons(spec: Mapping[str, Any]) -> list[str]:
    if spec["model"]["type"] != "BPE":
        return [f"a {spec['model']['type']} tokenizer cannot be written; {KNOWN} can"]
    if not _is_sentencepiece(spec) and _cut(spec) is None:
        return [f"llama.cpp has no name for how this tokenizer cuts a text into words; {KNOWN} can be written"]
    return []


def vocabulary_of(processor: VilaProcessor, rows: int) -> Vocabulary:
    """The vocabulary of a model whose embeddings have `rows` rows; rows without a token get an unused one.

    Raises LayoutError as `tokenizer_refusals`.
    """
    tokenizer = processor.tokenizer
    spec = _spec(tokenizer)
    if reasons := _reasons(spec):
        raise LayoutError(f"tokenizer: {'; '.join(reasons)}")
    pieces = {number: token for token, number in tokenizer.get_vocab().items() if number < rows}
    tokens = [pieces.get(number, f"[PAD{number}]") for number in range(rows)]
    is_sentencepiece = _is_sentencepiece(spec)
    merges = [tuple(one.split(" ", 1)) if isinstance(one, str) else tuple(one) for one in spec["model"]["merges"]]
    template = find_template(processor.template) if processor.template else None
    return Vocabulary(
        model="llama" if is_sentencepiece else "gpt2",
        pre="default" if is_sentencepiece else str(_cut(spec)),
        tokens=tokens,
        kinds=[_kind(number, pieces, tokenizer, is_sentencepiece) for number in range(rows)],
        scores=_scores(tokens, merges) if is_sentencepiece else (),
        merges=() if is_sentencepiece else [" ".join(pair) for pair in merges] or [_NO_MERGE],
        special=_special_ids(tokenizer, template.stop if template else (), rows),
        add_bos=bool(processor.span_tokenizer.bos_ids),
        add_space_prefix=processor.span_tokenizer.dummy_prefix,
        chat_template=chat_template(template) if template else "",
    )


# llama.cpp refuses a file without merges. "!!" is no token of a vocabulary that has none, so it falls apart again.
_NO_MERGE = "! !"


def describe_tokenizer(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """Add the tokenizer's metadata."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.kinds)
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


def _cut(spec: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for how a byte-level BPE tokenizer cuts a text, None when it has none."""
    if spec.get("normalizer") not in (None, {"type": "NFC"}):
        return None
    before = spec.get("pre_tokenizer") or {}
    steps = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    cuts_words = steps[-1].get("use_regex", True)
    match steps[:-1]:
        case []:
            return "gpt-2" if cuts_words else None
        case [{"type": "Digits", "individual_digits": True}]:
            return "smollm" if cuts_words else None
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}]:
            return None if cuts_words else _SPLITS.get(pattern)
    return None


def _kind(number: int, pieces: Mapping[int, str], tokenizer: Any, is_sentencepiece: bool) -> int:
    if number not in pieces:
        return UNUSED
    if is_sentencepiece and number == tokenizer.unk_token_id:
        return UNKNOWN
    if (added := tokenizer.added_tokens_decoder.get(number)) is not None:
        return CONTROL if added.special else USER_DEFINED
    return BYTE if is_sentencepiece and _BYTE.fullmatch(pieces[number]) else NORMAL


def _scores(tokens: Sequence[str], merges: Sequence[tuple[str, ...]]) -> list[float]:
    """SentencePiece puts the piece of the highest score together first: the earliest merge that makes a piece."""
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
