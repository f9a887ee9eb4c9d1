"""One tokenizer walk: segments become ids, labels from character spans, and slots for media.

The text between two media is one chunk. A tokenizer with a dummy prefix (LLaMA's SentencePiece) puts it at the start
of every chunk and nowhere else, as the original does by tokenising the chunks one by one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from vila.chat.render import render, render_sample
from vila.chat.template import Span, Template
from vila.core.errors import DataError, TemplateError
from vila.core.types import Image, Message, Sample, Video

IGNORE = -100
"""Label of a token that is not supervised."""

Array = np.ndarray[Any, np.dtype[np.int64]]
CountTokens = Callable[[Image | Video], int]


@dataclass(slots=True)
class Tokens:
    """One conversation as ids. `ids` and `labels` have equal length; media[k] fills the slots of runs[k]."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    media: list[Image | Video] = field(default_factory=list)
    runs: list[tuple[int, int]] = field(default_factory=list)
    """Start and number of the slots of each medium."""

    def media_before(self, place: int) -> int:
        """How many media lie wholly before `place`."""
        return sum(start + slots <= place for start, slots in self.runs)


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """A sample with every medium already expanded. All arrays are int64 [S].

    segments: number of the part that a token belongs to, from 0; a sample without branches is all 0.
    parents:  number of the one part that the token's part also sees, -1 for none.
    slots:    1 where a media vector belongs.
    """

    id: str
    ids: Array
    labels: Array
    positions: Array
    segments: Array
    parents: Array
    slots: Array
    media: tuple[Image | Video, ...]

    def __len__(self) -> int:
        return int(self.ids.shape[0])


class SpanTokenizer:
    """What the walk needs to know of a tokenizer: plain encoding with offsets, special ids, BOS, dummy prefix."""

    def __init__(self, tokenizer: Any) -> None:
        """tokenizer: a transformers tokenizer backed by the `tokenizers` library."""
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        self.dummy_prefix = _strip_dummy_prefix(spec)
        spec["post_processor"] = None
        self._backend = Tokenizer.from_str(json.dumps(spec))
        # What a speaker writes is text, also when it spells a special token.
        self._backend.encode_special_tokens = True
        self.bos_ids: list[int] = ids_before_text(tokenizer)
        self.bos_id: int | None = tokenizer.bos_token_id
        self.special_ids = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.symbols = {"{bos}": tokenizer.bos_token or "", "{eos}": tokenizer.eos_token or ""}
        self.eos_id: int | None = tokenizer.eos_token_id
        self.image_token_id = len(tokenizer)
        names = sorted(self.special_ids, key=len, reverse=True)
        self._specials = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest entry of the vocabulary: a text of N has at least N / longest_token tokens."""
        return max(map(len, self._backend.get_vocab()))

    def encode(self, text: str, first: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character offsets of plain text; `first` says that it opens a chunk."""
        if not (first and self.dummy_prefix):
            coded = self._backend.encode(text, add_special_tokens=False)
            return coded.ids, coded.offsets
        # The prefix stands before the text also when that starts with a space (the original's slow tokenizer).
        coded = self._backend.encode(" " + text, add_special_tokens=False)
        return coded.ids, [(max(a - 1, 0), max(b - 1, 1)) for a, b in coded.offsets]

    def lost_after_media(self, ids: Sequence[int]) -> int:
        """How many tokens each chunk after a medium loses, given the ids before the first medium.

        The original takes the BOS off those chunks whenever the text opens with one. Where the template wrote it and
        the tokenizer adds none (llama_3), the chunk's own first token goes instead, and models were trained so.
        """
        return int(not self.bos_ids and list(ids[:1]) == [self.bos_id])

    def pieces(self, segment: Span) -> list[tuple[str, int | None]]:
        """A text segment as (text, None) runs and (text, id) special tokens; content holds no special tokens."""
        text = self.symbols.get(segment.text, segment.text) if segment.kind == "special" else segment.text
        if segment.kind == "content" or self._specials is None:
            return [(text, None)]
        return [(piece, self.special_ids.get(piece)) for piece in self._specials.split(text) if piece]


def check_special_tokens(template: Template, tokenizer: Any, num_rows: int) -> None:
    """Refuse a template whose special tokens the tokenizer lacks, or has no embedding for.

    The tokens would be cut into plain text: a model is then trained on other text than the template's, and its answers
    do not end. tokenizer: a transformers tokenizer. num_rows: rows of the LLM's token embeddings.
    Raises TemplateError.
    """
    ids = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items()}
    own = {"{bos}": tokenizer.bos_token, "{eos}": tokenizer.eos_token}
    found = {token: ids.get(own.get(token, token) or "") for token in sorted(template.special_tokens)}
    names = {"{bos}": "a BOS token", "{eos}": "an EOS token"}
    if lacking := [names.get(token, token) for token, id_ in found.items() if id_ is None]:
        raise TemplateError(
            f"the tokenizer lacks {', '.join(lacking)}, which this template writes",
            field="template",
            value=template.name,
            hint="give the template that the LLM was trained with, or another LLM",
        )
    rows = {own.get(token, token): id_ for token, id_ in found.items() if id_ is not None and id_ >= num_rows}
    if beyond := [f"{token} ({id_})" for token, id_ in rows.items()]:
        raise TemplateError(
            f"the LLM has {num_rows:,} embeddings, none of them for {', '.join(beyond)}",
            field="template",
            value=template.name,
            hint="the tokenizer is that of another LLM",
        )


def ids_before_text(tokenizer: Any) -> list[int]:
    """Return the ids that the tokenizer puts before a text: BOS, or none. An end of sequence that it adds is left out.

    Raises ValueError for a tokenizer whose post-processor drops the text.
    """
    whole: list[int] = tokenizer("a", add_special_tokens=True)["input_ids"]
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(whole)):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    raise ValueError("its post-processor drops the text")


def _strip_dummy_prefix(spec: dict[str, Any]) -> bool:
    """Take the dummy prefix out of a serialised tokenizer; True when there was one."""
    found = False
    pre = spec.get("pre_tokenizer") or {}
    for part in [pre, *pre.get("pretokenizers", [])]:
        if part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            part["prepend_scheme"] = "never"
            found = True
    normalizer = spec.get("normalizer") or {}
    kept = [part for part in normalizer.get("normalizers", []) if part.get("type") != "Prepend"]
    if len(kept) != len(normalizer.get("normalizers", [])):
        normalizer["normalizers"] = kept
        found = True
    return found


def tokenize(segments: Sequence[Span], tokenizer: SpanTokenizer, count: CountTokens) -> Tokens:
    """Walk the segments once. `count` gives the number of slots that a medium takes."""
    out = Tokens(list(tokenizer.bos_ids), [IGNORE] * len(tokenizer.bos_ids))
    run: list[tuple[str, bool]] = []
    first, lost = True, 0

    def put(ids: list[int], labels: list[int]) -> None:
        nonlocal first, lost
        out.ids.extend(ids[lost:])
        out.labels.extend(labels[lost:])
        first, lost = False, 0

    def flush() -> None:
        text = "".join(piece for piece, _ in run)
        if not text:
            return
        ids, offsets = tokenizer.encode(text, first)
        # Supervised characters before each place: a token is supervised when its span holds one.
        train = np.repeat([flag for _, flag in run], [len(piece) for piece, _ in run])
        before = [0, *np.cumsum(train).tolist()]
        put(ids, [i if before[b] > before[a] else IGNORE for i, (a, b) in zip(ids, offsets, strict=True)])
        run.clear()

    for segment in segments:
        if segment.media is not None:
            flush()
            lost = tokenizer.lost_after_media(out.ids)
            slots = count(segment.media)
            out.runs.append((len(out.ids), slots))
            out.ids.extend([tokenizer.image_token_id] * slots)
            out.labels.extend([IGNORE] * slots)
            out.media.append(segment.media)
            first = True
            continue
        for text, special in tokenizer.pieces(segment):
            if special is None:
                run.append((text, segment.train))
                continue
            flush()
            put([special], [special if segment.train else IGNORE])
    flush()
    return out


def tokenize_prompt(
    messages: Sequence[Message], template: Template, tokenizer: SpanTokenizer, count: CountTokens
) -> Tokens:
    """The prompt that ends where the assistant is to answer."""
    return tokenize(render(messages, template, prompt=True), tokenizer, count)


def tokenize_sample(
    sample: Sample, template: Template, tokenizer: SpanTokenizer, count: CountTokens
) -> TokenizedSample:
    """Tokenise a training sample. Branches share the longest token prefix that all of them have, so that a row with a
    shared prefix is its separate conversations token for token.

    Raises DataError with the sample if it does not fit the template or supervises nothing.
    """
    parts = [tokenize(segments, tokenizer, count) for segments in render_sample(sample, template)]
    for number, part in enumerate(parts):
        if all(label == IGNORE for label in part.labels[1:]):
            field = f"branches[{number}]" if sample.branches else None
            raise DataError(
                f"no token is supervised under template {template.name!r}", record=f"sample {sample.id!r}", field=field
            )
    return _join(sample.id, parts, tokenizer.image_token_id)


def _join(sample_id: str, parts: list[Tokens], image_token_id: int) -> TokenizedSample:
    shared = shared_prefix(parts) if len(parts) > 1 else 0
    head = parts[0]
    pieces = [(head.ids[:shared], head.labels[:shared], 0)] if shared else []
    media = head.media[: head.media_before(shared)]
    for part in parts:
        pieces.append((part.ids[shared:], part.labels[shared:], shared))
        media = [*media, *part.media[part.media_before(shared) :]]
    lengths = [len(ids) for ids, _, _ in pieces]
    ids = np.concatenate([np.asarray(piece, dtype=np.int64) for piece, _, _ in pieces])
    labels = np.concatenate([np.asarray(piece, dtype=np.int64) for _, piece, _ in pieces])
    positions = np.concatenate([np.arange(start, start + len(piece)) for piece, _, start in pieces])
    segments = np.repeat(np.arange(len(pieces)), lengths)
    parents = np.repeat([-1] + [0 if shared else -1] * (len(pieces) - 1), lengths)
    # The first token of a part has no predecessor in it that could predict it.
    labels[np.cumsum([0, *lengths[:-1]])] = IGNORE
    slots = (ids == image_token_id).astype(np.int64)
    return TokenizedSample(sample_id, ids, labels, positions, segments, parents, slots, tuple(media))


def shared_prefix(parts: Sequence[Tokens]) -> int:
    """Length of the token prefix that all conversations have in common.

    It never ends inside a medium, leaves every conversation at least one token, and is cut back until each of them
    goes on with an unsupervised token: a supervised one would have to be predicted across the seam.
    """
    head = parts[0]
    length = min(len(part.ids) for part in parts) - 1
    for part in parts[1:]:
        length = next(
            (i for i in range(length) if part.ids[i] != head.ids[i] or part.labels[i] != head.labels[i]), length
        )
        for k, (start, _) in enumerate(head.runs):
            if start < length and part.media[k] != head.media[k]:
                length = start
    while length and any(part.labels[length] != IGNORE for part in parts):
        length -= 1
    for start, slots in head.runs:
        if start < length < start + slots:
            length = start
    return length
