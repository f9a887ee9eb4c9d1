"""Tokenization of rendered conversations: token ids, labels from character spans, image placeholders.

The text between two images is one chunk. If the tokenizer has a dummy prefix (LLaMA's SentencePiece), every chunk gets
one: upstream tokenizes the chunks one by one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from vila.chat.render import render_sample
from vila.chat.template import Span, Template
from vila.core.errors import DataError, TemplateError
from vila.core.types import Image, Sample, Video

IGNORE = -100
"""Label of a token that is not supervised."""

Array = np.ndarray[Any, np.dtype[np.int64]]
CountTokens = Callable[[Image | Video], int]
"""Number of image placeholders of an image or video."""


@dataclass(slots=True)
class Tokens:
    """Tokens of one conversation.

    ids, labels: of equal length; labels are not shifted.
    media:       images and videos in reading order.
    runs:        (start, length) of the image placeholders of each of `media`.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    media: list[Image | Video] = field(default_factory=list)
    runs: list[tuple[int, int]] = field(default_factory=list)

    def media_before(self, position: int) -> int:
        """Return the number of media whose placeholders end at or before token `position`."""
        return sum(start + length <= position for start, length in self.runs)


class TokenSegment(NamedTuple):
    """A run of consecutive tokens of a sample: a shared prefix, or one conversation (behind the prefix).

    length:   number of tokens.
    position: position id of the first token.
    parent:   index of the segment that these tokens also attend to, -1 for none.
    """

    length: int
    position: int
    parent: int


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """A tokenized sample, images expanded to placeholders. Compact, since look-ahead buffers hold thousands of them.

    ids:            int32 [S], `image_token_id` at every image placeholder.
    is_supervised:  bool [S], True for the tokens that are their own labels.
    segments:       in order of the tokens; a sample without branches has one.
    media:          references in reading order, never pixels.
    dataset:        name of the data set of a mixture, "" if there is none.
    """

    id: str
    ids: np.ndarray[Any, np.dtype[np.int32]]
    is_supervised: np.ndarray[Any, np.dtype[np.bool_]]
    segments: tuple[TokenSegment, ...]
    image_token_id: int
    media: tuple[Image | Video, ...]
    dataset: str = ""

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @property
    def labels(self) -> Array:
        """Ids of the supervised tokens, IGNORE elsewhere, int64 [S]."""
        return np.where(self.is_supervised, self.ids, np.int64(IGNORE))

    @property
    def is_placeholder(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """True where an image feature belongs, bool [S]."""
        is_placeholder: np.ndarray[Any, np.dtype[np.bool_]] = self.ids == self.image_token_id
        return is_placeholder

    @property
    def positions(self) -> Array:
        """Position ids, int64 [S]: they restart in every conversation, and continue behind a shared prefix."""
        lengths, starts, _ = self._columns()
        positions: Array = np.arange(len(self)) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
        return positions

    @property
    def segment_ids(self) -> Array:
        """Index of each token's segment, int64 [S]."""
        lengths, _, _ = self._columns()
        return np.repeat(np.arange(len(lengths)), lengths)

    @property
    def parent_ids(self) -> Array:
        """Index of the segment that each token's segment also attends to, -1 for none, int64 [S]."""
        lengths, _, parents = self._columns()
        return np.repeat(parents, lengths)

    def _columns(self) -> Array:
        return np.array(self.segments, dtype=np.int64).reshape(-1, 3).T


class SpanTokenizer:
    """Tokenizer of spans: encodes plain text with offsets; special tokens, BOS and dummy prefix are handled here."""

    def __init__(self, tokenizer: Any) -> None:
        """tokenizer: a transformers tokenizer backed by the `tokenizers` library."""
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        self.dummy_prefix = _strip_dummy_prefix(spec)
        spec["post_processor"] = None
        self._backend = Tokenizer.from_str(json.dumps(spec))
        # Content stays text, also where it spells a special token.
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
        """Characters of the longest vocabulary entry; a text of N characters has at least N / longest_token tokens."""
        return max(map(len, self._backend.get_vocab()))

    def encode(self, text: str, first: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and character offsets of plain text. first: whether the text starts a chunk."""
        if not (first and self.dummy_prefix):
            coded = self._backend.encode(text, add_special_tokens=False)
            return coded.ids, coded.offsets
        # The prefix is added even if the text starts with a space, as by upstream's slow tokenizer.
        coded = self._backend.encode(" " + text, add_special_tokens=False)
        return coded.ids, [(max(a - 1, 0), max(b - 1, 1)) for a, b in coded.offsets]

    def lost_after_media(self, ids: Sequence[int]) -> int:
        """Return how many leading tokens are dropped from each chunk after a medium; `ids` start the conversation.

        Upstream drops the first token of those chunks, meant to be BOS, whenever the text starts with BOS. If the
        template writes BOS and the tokenizer adds none (llama_3), the first token of the chunk itself is dropped;
        published models were trained that way.
        """
        return int(not self.bos_ids and list(ids[:1]) == [self.bos_id])

    def pieces(self, span: Span) -> list[tuple[str, int | None]]:
        """Split a span into (text, None) and (special token, id); content has no special tokens."""
        text = self.symbols.get(span.text, span.text) if span.kind == "special" else span.text
        if span.kind == "content" or self._specials is None:
            return [(text, None)]
        return [(piece, self.special_ids.get(piece)) for piece in self._specials.split(text) if piece]


def check_special_tokens(template: Template, tokenizer: Any, num_rows: int) -> None:
    """Raise TemplateError for special tokens of the template without an id in the tokenizer or without an embedding.

    They would be tokenized as plain text: the model would be trained on other text, and answers would not end.

    tokenizer: a transformers tokenizer.
    num_rows:  rows of the token embedding matrix of the LLM.
    """
    ids = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items()}
    own = {"{bos}": tokenizer.bos_token, "{eos}": tokenizer.eos_token}
    found = {token: ids.get(own.get(token, token) or "") for token in sorted(template.special_tokens)}
    names = {"{bos}": "a BOS token", "{eos}": "an EOS token"}
    if lacking := [names.get(token, token) for token, id_ in found.items() if id_ is None]:
        problem = f"the tokenizer lacks {', '.join(lacking)}, which the template uses"
        hint = "use the template that the LLM was trained with, or another LLM"
        raise TemplateError(problem, field="template", value=template.name, hint=hint)
    rows = {own.get(token, token): id_ for token, id_ in found.items() if id_ is not None and id_ >= num_rows}
    if beyond := [f"{token} ({id_})" for token, id_ in rows.items()]:
        raise TemplateError(
            f"the LLM has {num_rows:,} token embeddings, none for {', '.join(beyond)}",
            field="template",
            value=template.name,
            hint="the tokenizer belongs to another LLM",
        )


def ids_before_text(tokenizer: Any) -> list[int]:
    """Return the ids that the tokenizer adds before a text: BOS, or none.

    Raises ValueError if the post-processor of the tokenizer drops the text.
    """
    whole: list[int] = tokenizer("a", add_special_tokens=True)["input_ids"]
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(whole)):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    raise ValueError("its post-processor drops the text")


def _strip_dummy_prefix(spec: dict[str, Any]) -> bool:
    """Remove the dummy prefix from a serialised tokenizer, in place; return whether there was one."""
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


def tokenize(spans: Sequence[Span], tokenizer: SpanTokenizer, count: CountTokens) -> Tokens:
    """Tokenize a rendered conversation."""
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
        # before[i]: supervised characters among the first i; a token is supervised if its span contains one.
        train = np.repeat([flag for _, flag in run], [len(piece) for piece, _ in run])
        before = [0, *np.cumsum(train).tolist()]
        put(ids, [i if before[b] > before[a] else IGNORE for i, (a, b) in zip(ids, offsets, strict=True)])
        run.clear()

    for span in spans:
        if span.media is not None:
            flush()
            lost = tokenizer.lost_after_media(out.ids)
            length = count(span.media)
            out.runs.append((len(out.ids), length))
            out.ids.extend([tokenizer.image_token_id] * length)
            out.labels.extend([IGNORE] * length)
            out.media.append(span.media)
            first = True
            continue
        for text, special in tokenizer.pieces(span):
            if special is None:
                run.append((text, span.train))
                continue
            flush()
            put([special], [special if span.train else IGNORE])
    flush()
    return out


def tokenize_sample(
    sample: Sample, template: Template, tokenizer: SpanTokenizer, count: CountTokens, dataset: str = ""
) -> TokenizedSample:
    """Tokenize a training sample. dataset: name of its data set.

    The conversations of its branches are tokenized separately and share their longest common token prefix.
    Raises DataError with the sample if it does not fit the template or has no supervised token.
    """
    conversations = [tokenize(spans, tokenizer, count) for spans in render_sample(sample, template)]
    for index, tokens in enumerate(conversations):
        if all(label == IGNORE for label in tokens.labels[1:]):
            raise DataError(
                f"no supervised token (template {template.name!r})",
                record=f"sample {sample.id!r}",
                field=f"branches[{index}]" if sample.branches else None,
            )
    shared = shared_prefix(conversations) if len(conversations) > 1 else 0
    first = conversations[0]
    ids, labels = first.ids[:shared], first.labels[:shared]
    media = first.media[: first.media_before(shared)]
    segments = [TokenSegment(shared, 0, -1)] if shared else []
    for tokens in conversations:
        segments.append(TokenSegment(len(tokens.ids) - shared, shared, 0 if shared else -1))
        ids += tokens.ids[shared:]
        labels += tokens.labels[shared:]
        media += tokens.media[tokens.media_before(shared) :]
    is_supervised = np.array(labels) != IGNORE
    # The first token of a segment has no predecessor in it that could predict it.
    is_supervised[np.cumsum([0, *(segment.length for segment in segments[:-1])])] = False
    return TokenizedSample(
        sample.id,
        np.array(ids, dtype=np.int32),
        is_supervised,
        tuple(segments),
        tokenizer.image_token_id,
        tuple(media),
        dataset,
    )


def shared_prefix(conversations: Sequence[Tokens]) -> int:
    """Return the length of the common token prefix of all conversations.

    It leaves every conversation at least one token, does not end inside the placeholders of an image, and is followed
    by an unsupervised token in every conversation: a supervised one would be predicted from another segment.
    """
    first = conversations[0]
    length = min(len(tokens.ids) for tokens in conversations) - 1
    for other in conversations[1:]:
        length = next(
            (i for i in range(length) if other.ids[i] != first.ids[i] or other.labels[i] != first.labels[i]), length
        )
        for k, (start, _) in enumerate(first.runs):
            if start < length and other.media[k] != first.media[k]:
                length = start
    while length and any(tokens.labels[length] != IGNORE for tokens in conversations):
        length -= 1
    for start, num_placeholders in first.runs:
        if start < length < start + num_placeholders:
            length = start
    return length
