"""What a mixture holds: samples, and an estimate of tokens and pictures, before a run is begun."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vila.chat.tokenize import TokenizedSample
from vila.core.types import Sample
from vila.data.mixture import Mixture, Part
from vila.data.view import Subset


@dataclass(frozen=True, slots=True)
class Share:
    """One data set in one epoch.

    samples:        exact.
    tokens, images: estimated from `surveyed` samples of it; image tokens are counted.
    token_share:    0..1 of the tokens of the mixture.
    """

    name: str
    samples: int
    tokens: int
    images: int
    token_share: float
    surveyed: int


def survey(mixture: Mixture, tokenise: Callable[[Part, Sample], TokenizedSample], sample: int = 64) -> list[Share]:
    """The shares of the data sets in one epoch, from at most `sample` tokenised samples of each.

    tokenise: `SampleReader.tokenise`. The samples are fixed, so that a survey can be repeated. Nothing is cut or
    dropped here, and no picture is opened.
    """
    facts = [
        (part, count, *_means(part, tokenise, sample))
        for part, count in zip(mixture.parts, mixture.per_epoch, strict=True)
    ]
    total = sum(count * tokens for _, count, tokens, _, _ in facts)
    return [
        Share(part.name, count, round(count * tokens), round(count * images), count * tokens / (total or 1), surveyed)
        for part, count, tokens, images, surveyed in facts
    ]


def _means(part: Part, tokenise: Callable[[Part, Sample], TokenizedSample], sample: int) -> tuple[float, float, int]:
    """Mean tokens and pictures of a sample, and from how many."""
    some = Subset(part.source, sample)
    tokens = images = 0
    for index in range(len(some)):
        one = tokenise(part, some[index])
        tokens += len(one)
        images += len(one.media)
    number = len(some) or 1
    return tokens / number, images / number, len(some)
