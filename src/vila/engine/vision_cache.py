"""Prompts with hashed images, and the cache of the vision tower's features by image content."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vila.chat.tokenize import Tokens
from vila.core.types import Image
from vila.model.processor import VilaProcessor

# N images  P patches  C tower width  H, W pixels

_MAX_IMAGES = 256


@dataclass(frozen=True, slots=True)
class HashedImage:
    """An image with the hash of its content and its preprocessing, by which two images compare equal.

    preprocess: pixel values [3, H, W].
    """

    key: str
    preprocess: Callable[[], Tensor] = field(compare=False)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of a conversation and its images in order; runs[k] are start and length of image k's placeholders."""

    ids: Sequence[int]
    runs: tuple[tuple[int, int], ...] = ()
    images: tuple[HashedImage, ...] = ()


def build_prompt(tokens: Tokens, processor: VilaProcessor) -> Prompt:
    """Return the prompt of a tokenized conversation, whose videos are already expanded to images."""
    settings = repr(processor.spec)

    def hashed(image: Image) -> HashedImage:
        key = hashlib.sha256(f"{image.key()}{settings}".encode()).hexdigest()
        return HashedImage(key, lambda: processor.pixels([image])[0])

    return Prompt(tokens.ids, tuple(tokens.runs), tuple(hashed(one) for one in tokens.media if isinstance(one, Image)))


class VisionCache:
    """LRU cache of tower features [P, C] by image."""

    def __init__(self, max_images: int = _MAX_IMAGES) -> None:
        self.max_images = max_images
        self._features: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, images: Sequence[HashedImage]) -> Tensor:
        """Return the features [N, P, C] of images that are all cached, and evict the oldest beyond the limit."""
        for image in images:
            self._features.move_to_end(image.key)
        out = torch.stack([self._features[image.key] for image in images])
        while len(self._features) > self.max_images:
            self._features.popitem(last=False)
        return out

    def missing(self, images: Iterable[HashedImage]) -> list[HashedImage]:
        """Return the images that are not cached, equal ones once."""
        return list({image.key: image for image in images if image.key not in self._features}.values())

    def add(self, images: Sequence[HashedImage], features_NPC: Tensor) -> None:
        """Add features."""
        # Copies: a view would keep the whole batch alive as long as any of its images.
        self._features.update((image.key, row.clone()) for image, row in zip(images, features_NPC, strict=True))
