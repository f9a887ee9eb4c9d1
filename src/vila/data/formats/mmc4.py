"""Format `mmc4`: interleaved documents, `text_list`, `image_info` with `matched_text_index`, `similarity_matrix`.

An image is given by `image_base64`, `file` ("0.jpg" for member KEY.0.jpg of a tar shard) or `image_name`. Pages are
built as upstream: the first 6 images in file order, each immediately before its sentence; sentences are joined with one
space, without space next to an image. `<image>` in a sentence stays text; upstream replaces it by `<IMAGE>`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from vila.core.types import Image, Part, Sample, Text
from vila.data.formats.base import DatasetFormat, Keep, list_at, merge_texts, page_sample
from vila.data.readers.media_refs import Keys
from vila.data.readers.records import Record, media_source


@dataclass(frozen=True, slots=True)
class Mmc4Options:
    """min_similarity: leave out images that are less similar to their sentence. max_images: keep the first ones.

    place: put an image at its `matched_text_index`, or at the most similar sentence.
    without_images: keep a document without images as a page of text, or drop it.
    """

    min_similarity: float = 0.0
    max_images: int = 6
    place: str = field(default="matched", metadata={"choices": ("matched", "similarity")})
    without_images: str = field(default="keep", metadata={"choices": ("keep", "drop")})


def sample_of(record: Record, root: Path, options: Mmc4Options) -> Sample:
    """Return the page as one user message. Raises DataError with file, record or key, and field."""
    sentences = _sentences(record)
    kept = _kept_images(record, len(sentences), options)
    images = [(sentence, _image(record, number, root)) for number, sentence in kept]
    parts = page_of(sentences, images)
    if not any(isinstance(part, Text) for part in parts):
        raise record.error("the document has no text", field="text_list")
    return page_sample(record, parts)


def page_of(sentences: Sequence[str], images: Sequence[tuple[int, Image]]) -> tuple[Part, ...]:
    """Return the sentences with each image before its sentence. images: (sentence index, image), in file order.

    Example: sentences s0, s1, s2 and images (2, a), (0, b), (2, c) return b, "s0 s1", a, c, "s2".
    """
    pieces: list[Part | str] = []
    for number, sentence in enumerate(sentences):
        pieces += [" "] * bool(number) + [image for at, image in images if at == number] + [sentence]
    parts = list(merge_texts(pieces))
    for number, part in enumerate(parts):
        if isinstance(part, Text):
            # Remove the one space next to an image; further spaces are from the document.
            text = part.text
            if number + 1 < len(parts):
                text = text.removesuffix(" ")
            parts[number] = Text(text.removeprefix(" ") if number else text)
    parts = list(merge_texts(parts))
    while parts and not isinstance(parts[-1], Text):
        parts.pop()
    return tuple(parts)


def _sentences(record: Record) -> list[str]:
    sentences = list_at(record, "text_list", "texts")
    for number, sentence in enumerate(sentences):
        if not isinstance(sentence, str):
            raise record.error(field=f"text_list[{number}]", value=sentence, expected="text")
    return sentences


def _kept_images(record: Record, sentences: int, options: Mmc4Options) -> list[tuple[int, int]]:
    """Return (index in image_info, index of the sentence) of the images to keep."""
    kept: list[tuple[int, int]] = []
    infos = _infos(record)
    for number, info in enumerate(infos):
        if len(kept) == options.max_images:
            break
        sentence = _sentence_index(record, number, info, sentences, options)
        if options.min_similarity <= 0 or _similarity(record, number, info, sentence) >= options.min_similarity:
            kept.append((number, sentence))
    return kept


def _infos(record: Record) -> list[Any]:
    infos = record.value.get("image_info")
    if infos is not None and not isinstance(infos, list):
        raise record.error(field="image_info", value=infos, expected="a list of objects")
    return infos or []


def _sentence_index(record: Record, number: int, info: Any, sentences: int, options: Mmc4Options) -> int:
    if not isinstance(info, Mapping):
        raise record.error(field=f"image_info[{number}]", value=info, expected="an object")
    if options.place == "similarity":
        similar = _similarities(record, number)
        return max(range(len(similar)), key=similar.__getitem__)
    sentence = info.get("matched_text_index")
    if not isinstance(sentence, int) or isinstance(sentence, bool) or not 0 <= sentence < sentences:
        expected = f"an index below {sentences}, the number of texts"
        raise record.error(field=f"image_info[{number}].matched_text_index", value=sentence, expected=expected)
    return sentence


def _similarity(record: Record, number: int, info: Mapping[str, Any], sentence: int) -> float:
    stated = info.get("matched_sim")
    if _is_number(stated) and sentence == info.get("matched_text_index"):
        return float(stated)
    return _similarities(record, number)[sentence]


def _similarities(record: Record, number: int) -> list[float]:
    """Return the similarities of an image to all sentences."""
    matrix = record.value.get("similarity_matrix")
    similar = matrix[number] if isinstance(matrix, list) and number < len(matrix) else None
    count = len(_sentences(record))
    if not isinstance(similar, list) or len(similar) != count or not similar or not all(map(_is_number, similar)):
        raise record.error(
            field=f"similarity_matrix[{number}]", value=similar, expected=f"{count} numbers, one per text"
        )
    return similar


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _image(record: Record, number: int, root: Path) -> Image:
    info = record.value["image_info"][number]
    here: Keys = ("image_info", number)
    for key in ("image_base64", "file", "image_name"):
        if info.get(key) is None:
            continue
        if key == "image_base64":
            if not isinstance(info[key], str):
                raise record.error(field=f"image_info[{number}].{key}", value=info[key], expected="base64 text")
            return Image(record.stored((*here, key)))
        return Image(media_source(record, (*here, key), root))
    raise record.error(
        "no image", field=f"image_info[{number}]", value=info, expected="one of image_base64, file, image_name"
    )


def _has_images(record: Record, options: Mmc4Options) -> bool:
    return bool(_kept_images(record, len(_sentences(record)), options))


def _keep(options: Mmc4Options) -> Keep | None:
    if options.without_images == "keep":
        return None
    return f"with images {options}", partial(_has_images, options=options)


FORMAT = DatasetFormat(
    "mmc4",
    "MMC4 documents: `text_list`, `image_info` and `similarity_matrix`; tar or JSON.",
    sample_of,
    Mmc4Options,
    media=("image_info",),
    keep=_keep,
)
