"""Calibration data for AWQ and GPTQ: sequences of text, or of conversations about images.

The AWQ release calibrates visual language models with text too: documents of at most 512 tokens, concatenated and cut
into sequences of 512.
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

SEQUENCE_LENGTH = 512
MAX_DOCUMENTS = 128
PACKAGED = "starter/text/english_calibration.txt"
"""Packaged calibration text, relative to `vila`; LICENSES.md in the same directory names its sources."""
MAX_TOKENS = 2048
"""Maximum number of tokens of a conversation."""
SAMPLES = 64
_TRIES = 8
"""Samples of a mixture that are tried for each wanted one."""

Document = str | Sequence[int]
"""A text, or its token ids."""


@dataclass(frozen=True, slots=True)
class CalibrationSequence:
    """Token ids with image placeholders, and the images in order."""

    ids: tuple[int, ...]
    media: tuple[Image, ...] = ()


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibration sequences. sha256: hash of all inputs, identifies the exact calibration."""

    name: str
    sha256: str
    sequences: tuple[CalibrationSequence, ...]

    @property
    def num_tokens(self) -> int:
        """Number of tokens, including image tokens."""
        return sum(len(sequence.ids) for sequence in self.sequences)

    def metadata(self) -> dict[str, Any]:
        """Return the record of the calibration in search files and summaries."""
        return {"name": self.name, "sha256": self.sha256, "rows": len(self.sequences), "tokens": self.num_tokens}


def packaged_documents() -> list[Document]:
    """Return the packaged English prose by paragraph: documentation and novels, not in the texts of `bench quality`."""
    text = files("vila").joinpath(PACKAGED).read_text(encoding="utf-8")
    return [*text.rstrip("\n").split("\n\n")]


def read_documents(path: Path, vocab_size: int | None = None) -> list[Document]:
    """Read the documents of a file: paragraphs of a .txt, or records `{"text": ..}` or `{"ids": [..]}` of a .jsonl.

    vocab_size: upper limit of ids; None: no limit.
    Raises DataError naming file and line if the file is missing, not UTF-8, empty, or of another format.
    """
    if path.suffix == ".jsonl":
        found = [_parse_document(path, number, value, vocab_size) for number, value in read_jsonl(path)]
    elif path.suffix == ".txt":
        found = [part for part in read_text(path).split("\n\n") if part.strip()]
    else:
        raise DataError("unsupported calibration file", file=path, value=path.suffix, expected=".txt or .jsonl")
    if not found:
        raise DataError("the file has no text", file=path, hint=f"give at least {SEQUENCE_LENGTH} tokens")
    return found


def _parse_document(path: Path, number: int, value: Any, vocab_size: int | None) -> Document:
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
    length: int = SEQUENCE_LENGTH,
    max_documents: int = MAX_DOCUMENTS,
    max_sequences: int | None = None,
    seed: int | None = 42,
) -> Calibration:
    """Cut documents into sequences of `length` tokens, as the AWQ release does.

    Each document is stripped and encoded with the tokenizer's leading special tokens. Empty documents and those of more
    than `length` tokens are skipped. The first `max_documents` are concatenated and cut; the remainder is dropped.
    seed: shuffles the documents first; None keeps their order.
    Raises DataError if they do not fill one sequence.
    """
    given: list[Document] = [one.strip() if isinstance(one, str) else list(one) for one in documents]
    digest = hashlib.sha256(json.dumps([given, length, max_documents, max_sequences, seed]).encode())
    if seed is not None:
        random.Random(seed).shuffle(given)
    stream: list[int] = []
    used = overlong = 0
    for document in given:
        ids = _encode(document, tokenizer)
        overlong += len(ids) > length
        if 0 < len(ids) <= length:
            stream += ids
            used += 1
        if used == max_documents or (max_sequences is not None and len(stream) >= max_sequences * length):
            break
    starts = range(0, len(stream) - length + 1, length)
    sequences = [CalibrationSequence(tuple(stream[start : start + length])) for start in starts][:max_sequences]
    if not sequences:
        raise DataError(
            f"{len(given)} documents give too few tokens, {overlong} of them are longer than {length} tokens",
            file=name,
            field="tokens",
            value=len(stream),
            expected=f"at least {length}",
            hint=f"give more text, in documents of at most {length} tokens",
        )
    digest.update(json.dumps([sequence.ids for sequence in sequences]).encode())
    return Calibration(name, digest.hexdigest(), tuple(sequences))


def _encode(document: Document, tokenizer: Any) -> list[int]:
    if not isinstance(document, str):
        return list(document)
    return list(tokenizer(document)["input_ids"]) if document else []


def sample_calibration(
    conversations: Iterable[Sequence[Any]],
    processor: Any,
    *,
    name: str,
    template: str = "",
    max_tokens: int = MAX_TOKENS,
) -> Calibration:
    """Return one sequence per conversation with its images, rendered as in training.

    Raises DataError for a conversation of more than `max_tokens` tokens; TemplateError, MediaError.
    """
    sequences = []
    for number, messages in enumerate(conversations):
        tokens = processor.tokens(parse_messages(messages), template, prompt=False)
        if not 0 < len(tokens.ids) <= max_tokens:
            raise DataError(
                file=name,
                record=f"conversation {number}",
                field="tokens",
                value=len(tokens.ids),
                expected=f"1 to {max_tokens}",
                hint="omit it, or increase max_tokens",
            )
        sequences.append(CalibrationSequence(tuple(tokens.ids), tuple(tokens.media)))
    if not sequences:
        raise DataError("no conversations", file=name, hint="give at least one")
    return Calibration(name, _digest(sequences), tuple(sequences))


def join_calibrations(*parts: Calibration) -> Calibration:
    """Return all sequences of several calibrations, such as text and images, in order."""
    digest = hashlib.sha256(" ".join(part.sha256 for part in parts).encode()).hexdigest()
    sequences = tuple(sequence for part in parts for sequence in part.sequences)
    return Calibration("+".join(part.name for part in parts), digest, sequences)


def mixture_calibration(
    mixture: Mixture, processor: Any, *, samples: int = SAMPLES, name: str = "mixture"
) -> Calibration:
    """Return the first `samples` conversations of a training mixture, each with its own template.

    One branch is used of a sample with several questions. Conversations are concatenated into sequences of up to 512
    tokens, as text documents are: most are far shorter, and padding costs as much as tokens. Samples with videos, and
    those of more than MAX_TOKENS tokens, are skipped.
    Raises DataError if too few samples are left.
    """
    sequences: list[CalibrationSequence] = []
    tried = overlong = videos = 0
    while len(sequences) < samples and tried < samples * _TRIES:
        dataset, sample = mixture[tried]
        conversations = list(sample.conversations())
        chosen = conversations[tried % len(conversations)]
        tried += 1
        if any(isinstance(one, Video) for one in sample.media):
            videos += 1
            continue
        template = sample.template or dataset.template
        if len(processor.tokens(chosen, template, prompt=False).ids) > MAX_TOKENS:
            overlong += 1
            continue
        sequences += sample_calibration([chosen], processor, name=name, template=template).sequences
    if len(sequences) < samples:
        raise DataError(
            f"too few of {tried} samples fit: {overlong} are longer than {MAX_TOKENS} tokens, {videos} have videos",
            file=name,
            field="samples",
            value=len(sequences),
            expected=str(samples),
            hint="give a mixture of shorter samples with images",
        )
    return Calibration(name, _digest(sequences), tuple(_concatenate(sequences)))


def _digest(sequences: Iterable[CalibrationSequence]) -> str:
    content = [[sequence.ids, [image.key() for image in sequence.media]] for sequence in sequences]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _concatenate(sequences: Iterable[CalibrationSequence]) -> list[CalibrationSequence]:
    """Join consecutive sequences up to SEQUENCE_LENGTH tokens."""
    out: list[CalibrationSequence] = []
    for sequence in sequences:
        if out and len(out[-1].ids) + len(sequence.ids) <= SEQUENCE_LENGTH:
            out[-1] = CalibrationSequence(out[-1].ids + sequence.ids, out[-1].media + sequence.media)
        else:
            out.append(sequence)
    return out
