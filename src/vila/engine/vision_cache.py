"""Prompts with hashed images, and the cache of the vision tower's features by image content."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vila.chat.tokenize import Tokens
from vila.core.types import Image

# N images  P patches  C tower width

_MAX_IMAGES = 256
_TOWER_BATCH = 32
"""Images per forward pass of the tower, which bounds its memory."""


@dataclass(frozen=True, slots=True)
class HashedImage:
    """An image and the hash of its content, by which two images compare equal."""

    key: str
    image: Image = field(compare=False)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of a conversation and its images in order; runs[k] are start and length of image k's placeholders."""

    ids: Sequence[int]
    runs: tuple[tuple[int, int], ...] = ()
    images: tuple[HashedImage, ...] = ()


def build_prompt(tokens: Tokens) -> Prompt:
    """Return the prompt of a tokenized conversation, whose videos are already expanded to images."""
    images = [medium for medium in tokens.media if isinstance(medium, Image)]
    return Prompt(tokens.ids, tuple(tokens.runs), tuple(HashedImage(image.key(), image) for image in images))


class VisionCache:
    """LRU cache of tower features by image content.

    compute: features [N, P, C] of N images.
    kept:    maximum number of images.
    """

    def __init__(self, compute: Callable[[Sequence[Image]], Tensor], kept: int = _MAX_IMAGES) -> None:
        self.compute, self.kept = compute, kept
        self._features: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, images: Sequence[HashedImage]) -> Tensor:
        """Return features [N, P, C]; images that are not cached are computed, equal ones once."""
        missing = self.missing(images)
        for start in range(0, len(missing), _TOWER_BATCH):
            batch = missing[start : start + _TOWER_BATCH]
            self.add(batch, self.compute([hashed.image for hashed in batch]))
        for hashed in images:
            self._features.move_to_end(hashed.key)
        out = torch.stack([self._features[hashed.key] for hashed in images])
        while len(self._features) > self.kept:
            self._features.popitem(last=False)
        return out

    def missing(self, images: Sequence[HashedImage]) -> list[HashedImage]:
        """Return the images that are not cached, equal ones once."""
        return list({hashed.key: hashed for hashed in images if hashed.key not in self._features}.values())

    def add(self, images: Sequence[HashedImage], features_NPC: Tensor) -> None:
        """Add features that were computed elsewhere. The next `__call__` evicts the oldest beyond the limit."""
        # Copies: a view would keep the whole batch alive as long as any of its images.
        self._features.update((hashed.key, row.clone()) for hashed, row in zip(images, features_NPC, strict=True))
