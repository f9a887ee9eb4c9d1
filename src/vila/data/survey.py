"""Content of a mixture before a run begins: samples, an estimate of tokens and images, and whether it has images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vila.chat.tokenize import TokenizedSample
from vila.core.errors import ConfigError, VilaError
from vila.core.types import Sample
from vila.data.mixture import Mixture, Part
from vila.data.view import Subset

MAX_LOOKED_AT: Final = 2000
"""Samples of each data set in which `require_images` looks for an image."""


@dataclass(frozen=True, slots=True)
class Share:
    """One data set in one epoch.

    samples:        exact.
    tokens, images: estimated from `surveyed` samples of it; image tokens are counted.
    token_share:    0..1 of the tokens of the mixture.
    lengths:        of the surveyed samples, in tokens.
    """

    name: str
    samples: int
    tokens: int
    images: int
    token_share: float
    surveyed: int
    lengths: tuple[int, ...] = ()


def survey(mixture: Mixture, tokenise: Callable[[Part, Sample], TokenizedSample], sample: int = 64) -> list[Share]:
    """Estimate the shares of the data sets in one epoch from at most `sample` tokenised samples of each.

    tokenise: `SampleReader.tokenise`. The samples are fixed, so that a survey can be repeated. Nothing is cut or
    dropped here, and no image is opened.
    """
    facts = [
        (part, count, *_counts(part, tokenise, sample))
        for part, count in zip(mixture.parts, mixture.per_epoch, strict=True)
    ]
    mean = {part.name: sum(lengths) / (len(lengths) or 1) for part, _, lengths, _ in facts}
    total = sum(count * mean[part.name] for part, count, _, _ in facts)
    return [
        Share(
            part.name,
            count,
            round(count * mean[part.name]),
            round(count * images / (len(lengths) or 1)),
            count * mean[part.name] / (total or 1),
            len(lengths),
            tuple(lengths),
        )
        for part, count, lengths, images in facts
    ]


def require_images(mixture: Mixture, reason: str) -> None:
    """Raise ConfigError if no sample among up to MAX_LOOKED_AT of each data set has an image or a video.

    reason: why the run needs images. A record that cannot be read may hold one, so then nothing is refused.
    """
    looked_at = 0
    for part in mixture.parts:
        some = Subset(part.source, MAX_LOOKED_AT)
        for index in range(len(some)):
            try:
                if some[index].media:
                    return
            except VilaError:
                return
        looked_at += len(some)
    raise ConfigError(
        f"none of {looked_at:,} samples has an image or a video, and {reason}",
        field="data.mixture",
        hint="give a data set with images, or train the LLM too: stage.tune=[projector,llm]",
    )


def _counts(part: Part, tokenise: Callable[[Part, Sample], TokenizedSample], sample: int) -> tuple[list[int], int]:
    """Return the tokens of each of some samples, and how many images they have."""
    some = Subset(part.source, sample)
    lengths, images = [], 0
    for index in range(len(some)):
        one = tokenise(part, some[index])
        lengths.append(len(one))
        images += len(one.media)
    return lengths, images
