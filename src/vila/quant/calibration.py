"""Calibration: the text, or the conversations about pictures, whose activations decide which channels matter.

The original takes text also for visual language models: whole documents of at most 512 tokens, one after the other,
cut into rows of 512.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from vila.chat.content import parse_messages
from vila.core.errors import DataError
from vila.core.reading import read_jsonl, read_text
from vila.core.types import Image, Video
from vila.data.mixture import Mixture

BLOCK = 512
DOCUMENTS = 128
PACKAGED = "starter/text/english_calibration.txt"
"""The packaged text, in `vila`; the LICENSES.md beside it names its sources."""

Document = str | Sequence[int]
"""A text, or one that is ids already."""


@dataclass(frozen=True, slots=True)
class CalibrationSequence:
    """One sequence that the model sees. A picture's ids are placeholders; `media` are its pictures in order."""

    ids: tuple[int, ...]
    media: tuple[Image, ...] = ()


@dataclass(frozen=True, slots=True)
class Calibration:
    """Rows, and what they are called. sha256 is of everything that was given: it names the exact calibration."""

    name: str
    sha256: str
    rows: tuple[CalibrationSequence, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, those of pictures among them."""
        return sum(len(row.ids) for row in self.rows)

    def facts(self) -> dict[str, Any]:
        """What a result says of it."""
        return {"name": self.name, "sha256": self.sha256, "rows": len(self.rows), "tokens": self.num_tokens}


def packaged_documents() -> list[Document]:
    """English prose that travels with the package: paragraphs of documentation and of novels, none of them in the
    texts that quality is measured on."""
    text = files("vila").joinpath(PACKAGED).read_text(encoding="utf-8")
    return [*text.rstrip("\n").split("\n\n")]


def read_documents(path: Path, vocab_size: int | None = None) -> list[Document]:
    """Read the documents of a file: paragraphs of a .txt, or rows of a .jsonl, `{"text": ..}` or `{"ids": [..]}` each.

    vocab_size: ids are below it; None checks no upper limit.
    Raises DataError with file, line and remedy: absent, not UTF-8, empty, another kind of file, or another form of row.
    """
    if path.suffix == ".jsonl":
        found = [_document(path, number, value, vocab_size) for number, value in read_jsonl(path)]
    elif path.suffix == ".txt":
        found = [part for part in read_text(path).split("\n\n") if part.strip()]
    else:
        raise DataError("not read as calibration text", file=path, value=path.suffix, expected=".txt or .jsonl")
    if not found:
        raise DataError("holds no text to calibrate with", file=path, hint=f"give at least {BLOCK} tokens of it")
    return found


def _document(path: Path, number: int, value: Any, vocab_size: int | None) -> Document:
    if isinstance(value, dict):
        if isinstance(text := value.get("text"), str):
            return text
        ids = value.get("ids")
        if isinstance(ids, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
            for one in ids:
                if one < 0 or (vocab_size is not None and one >= vocab_size):
                    limit = "" if vocab_size is None else f" to {vocab_size - 1}"
                    raise DataError(
                        file=path, record=f"line {number}", field="ids", value=one, expected=f"ids from 0{limit}"
                    )
            return ids
    raise DataError(file=path, record=f"line {number}", value=value, expected='{"text": "..."} or {"ids": [...]}')


def text_calibration(
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    name: str = "packaged",
    block: int = BLOCK,
    max_documents: int = DOCUMENTS,
    max_rows: int | None = None,
    seed: int | None = 42,
) -> Calibration:
    """Rows of `block` tokens out of documents, as the original makes them.

    Each document is stripped and encoded with what the tokenizer puts before a text; empty ones and those of more than
    `block` tokens are left out; the first `max_documents` are joined and cut, and the tail is dropped.
    seed: shuffles the documents before; None keeps their order. max_rows: takes no more than that many rows.
    Raises DataError with the numbers when they do not make one row.
    """
    given: list[Document] = [one.strip() if isinstance(one, str) else list(one) for one in documents]
    digest = hashlib.sha256(json.dumps([given, block, max_documents, max_rows, seed]).encode())
    if seed is not None:
        random.Random(seed).shuffle(given)
    stream: list[int] = []
    kept = overlong = 0
    for document in given:
        ids = _ids(document, tokenizer)
        overlong += len(ids) > block
        if 0 < len(ids) <= block:
            stream += ids
            kept += 1
        if kept == max_documents or (max_rows is not None and len(stream) >= max_rows * block):
            break
    rows = [CalibrationSequence(tuple(stream[at : at + block])) for at in range(0, len(stream) - block + 1, block)][
        :max_rows
    ]
    if not rows:
        left_out = f", {overlong} longer than {block} tokens left out" if overlong else ""
        raise DataError(
            f"calibration {name!r}: {len(given)} documents give {len(stream)} tokens{left_out}, and a row takes "
            f"{block}; give more text, in documents of at most {block} tokens"
        )
    digest.update(json.dumps([row.ids for row in rows]).encode())
    return Calibration(name, digest.hexdigest(), tuple(rows))


def _ids(document: Document, tokenizer: Any) -> list[int]:
    if not isinstance(document, str):
        return list(document)
    return list(tokenizer(document)["input_ids"]) if document else []


def sample_calibration(
    conversations: Iterable[Sequence[Any]], processor: Any, *, name: str, template: str = "", max_tokens: int = 2048
) -> Calibration:
    """One row for each whole conversation, its pictures in their places, as training shows them to the model.

    max_tokens: longer conversations are refused. Raises DataError naming the conversation; TemplateError, MediaError.
    """
    rows = []
    for number, messages in enumerate(conversations):
        tokens = processor.tokens(parse_messages(messages), template, prompt=False)
        if not 0 < len(tokens.ids) <= max_tokens:
            raise DataError(
                f"calibration {name!r} conversation {number}: {len(tokens.ids)} tokens, and a row holds 1 to "
                f"{max_tokens}; leave it out or raise max_tokens"
            )
        rows.append(CalibrationSequence(tuple(tokens.ids), tuple(tokens.media)))
    if not rows:
        raise DataError(f"calibration {name!r}: no conversations; give at least one")
    content = [[row.ids, [image.key() for image in row.media]] for row in rows]
    return Calibration(name, hashlib.sha256(json.dumps(content).encode()).hexdigest(), tuple(rows))


def join_calibrations(*parts: Calibration) -> Calibration:
    """All rows of several calibrations, such as text and pictures, in order."""
    digest = hashlib.sha256(" ".join(part.sha256 for part in parts).encode()).hexdigest()
    return Calibration("+".join(part.name for part in parts), digest, tuple(row for part in parts for row in part.rows))


# --- mixture_calibration
# Calibration out of a training mixture: conversations about pictures as the model was taught on them.


SAMPLES = 64
_TRIES = 8


def mixture_calibration(
    mixture: Mixture, processor: Any, *, samples: int = SAMPLES, name: str = "mixture", max_tokens: int = 2048
) -> Calibration:
    """The first `samples` conversations in the mixture's own order, each under its own template, joined to rows.

    Of a sample with several questions one is taken. Conversations follow one another in a row of about 512 tokens, as
    documents do in calibration by text: most are far shorter, and padding costs as much as tokens.
    Samples with clips, and those of more than `max_tokens` tokens, are left out.
    Raises DataError when too few are left, saying how many were left out.
    """
    rows: list[CalibrationSequence] = []
    tried = long = clips = 0
    while len(rows) < samples and tried < samples * _TRIES:
        part, sample = mixture[tried]
        conversations = list(sample.conversations())
        chosen = conversations[tried % len(conversations)]
        tried += 1
        if any(isinstance(one, Video) for one in sample.media):
            clips += 1
            continue
        template = sample.template or part.template
        if len(processor.tokens(chosen, template, prompt=False).ids) > max_tokens:
            long += 1
            continue
        rows += sample_calibration([chosen], processor, name=name, template=template, max_tokens=max_tokens).rows
    if len(rows) < samples:
        raise DataError(
            f"calibration {name!r}: {len(rows)} of {samples} samples found in {tried}, {long} longer than {max_tokens} "
            f"tokens and {clips} with clips left out; give a mixture of shorter samples with pictures"
        )
    content = [[row.ids, [image.key() for image in row.media]] for row in rows]
    return Calibration(name, hashlib.sha256(json.dumps(content).encode()).hexdigest(), tuple(_joined(rows)))


def _joined(rows: Iterable[CalibrationSequence]) -> list[CalibrationSequence]:
    """Neighbouring rows as one, as long as that has at most a block of tokens."""
    out: list[CalibrationSequence] = []
    for row in rows:
        if out and len(out[-1].ids) + len(row.ids) <= BLOCK:
            out[-1] = CalibrationSequence(out[-1].ids + row.ids, out[-1].media + row.media)
        else:
            out.append(row)
    return out
