"""Pictures by content, and the tower's features of those seen lately."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vila.chat.tokenize import Tokens
from vila.core.types import Image

# N pictures  P patches  C tower width

_KEPT_PICTURES = 256
_TOWER_BATCH = 32
"""Pictures that go through the tower at a time, which bounds its memory."""


@dataclass(frozen=True, slots=True)
class HashedImage:
    """An image and the hash of its content; equal when the content is."""

    key: str
    image: Image = field(compare=False)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenized conversation and its pictures in reading order; runs[k] are start and number of picture k's slots."""

    ids: Sequence[int]
    runs: tuple[tuple[int, int], ...] = ()
    pictures: tuple[HashedImage, ...] = ()


def build_prompt(tokens: Tokens) -> Prompt:
    """A prompt from what the processor made of a conversation; every medium is an image by then."""
    images = [medium for medium in tokens.media if isinstance(medium, Image)]
    return Prompt(tokens.ids, tuple(tokens.runs), tuple(HashedImage(image.key(), image) for image in images))


class VisionCache:
    """Tower features by picture. Each distinct one is computed once; those used longest ago are forgotten first.

    compute: features [N, P, C] of N images.
    """

    def __init__(self, compute: Callable[[Sequence[Image]], Tensor], kept: int = _KEPT_PICTURES) -> None:
        self.compute, self.kept = compute, kept
        self._features: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, pictures: Sequence[HashedImage]) -> Tensor:
        """Features [N, P, C] of pictures, of which some may be equal."""
        missing = {picture.key: picture.image for picture in pictures if picture.key not in self._features}
        keys, images = list(missing), list(missing.values())
        for start in range(0, len(keys), _TOWER_BATCH):
            features_NPC = self.compute(images[start : start + _TOWER_BATCH])
            # Copies: a view would keep the whole batch alive as long as any picture of it.
            self._features.update(
                (key, row.clone()) for key, row in zip(keys[start : start + _TOWER_BATCH], features_NPC, strict=True)
            )
        for picture in pictures:
            self._features.move_to_end(picture.key)
        out = torch.stack([self._features[picture.key] for picture in pictures])
        while len(self._features) > self.kept:
            self._features.popitem(last=False)
        return out

    def missing(self, pictures: Sequence[HashedImage]) -> list[HashedImage]:
        """Those whose features would have to be computed, equal ones once."""
        return list({picture.key: picture for picture in pictures if picture.key not in self._features}.values())

    def add(self, pictures: Sequence[HashedImage], features_NPC: Tensor) -> None:
        """Features that were computed elsewhere; none are forgotten before the next ones are asked for."""
        self._features.update((picture.key, row.clone()) for picture, row in zip(pictures, features_NPC, strict=True))
