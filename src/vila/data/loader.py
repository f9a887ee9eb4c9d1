"""From a mixture to steps of packed rows: fetch, render, tokenise."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from vila.chat.templates import find_template
from vila.chat.tokenize import CountTokens, SpanTokenizer, TokenizedSample, tokenize_sample
from vila.core.errors import DataError
from vila.core.types import Image
from vila.data.formats.protocol import FORMATS
from vila.data.mixture import Mixture, Part


def open_mixture(entries: Iterable[tuple[str, str, str, float, str]], seed: int) -> Mixture:
    """The mixture of entries (format, path, image_root, repeat, template)."""
    parts = []
    for kind, path, image_root, repeat, template in entries:
        file = Path(path)
        root = Path(image_root) if image_root else (file if file.is_dir() else file.parent)
        if template:
            find_template(template)
        parts.append(Part(file.stem, FORMATS[kind].open(file, root), repeat, template))
    return Mixture(parts, seed)


def tokenising_fetch(
    mixture: Mixture, template: str, tokenizer: SpanTokenizer, count: CountTokens
) -> Callable[[int], TokenizedSample]:
    """A function from global position to tokenised sample. A sample's own template wins over its data set's, that over
    the stage's."""

    def fetch(position: int) -> TokenizedSample:
        part, sample = mixture[position]
        chosen = find_template(sample.template or part.template or template)
        try:
            return tokenize_sample(sample, chosen, tokenizer, count)
        except DataError as error:
            raise DataError(f"data set {part.name!r}: {error}") from error

    return fetch


def images_of(mixture: Mixture) -> list[Image]:
    """Every distinct picture of the mixture, in the order of its data sets."""
    seen: dict[Image, None] = {}
    for part in mixture.parts:
        for index in range(len(part.source)):
            for item in part.source[index].media:
                if isinstance(item, Image):
                    seen.setdefault(item)
    return list(seen)
