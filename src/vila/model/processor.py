"""Text and pictures to model inputs, in the Hugging Face convention; also the bundle that every other path uses."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from vila.chat.template import Segment, Template
from vila.chat.templates import find_template
from vila.chat.tokenize import SpanTokenizer, Tokens, tokenize, tokenize_prompt
from vila.core.errors import MediaError, TemplateError
from vila.core.types import Image, Message, Video
from vila.core.vision_spec import VisionSpec
from vila.media.image import open_image
from vila.media.transform import pixels

IMAGE_MARKER = "<image>"


class VilaProcessor(ProcessorMixin):
    """A tokenizer, the vision spec and the conversation template of one model."""

    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self, tokenizer: Any = None, vision_spec: dict[str, Any] | None = None, template: str = "", **kwargs: Any
    ) -> None:
        self.vision_spec = vision_spec or {}
        self.template = template
        super().__init__(tokenizer, **kwargs)

    @cached_property
    def spec(self) -> VisionSpec:
        """How pictures become pixels and how many tokens each takes."""
        return VisionSpec.from_dict(self.vision_spec)

    @cached_property
    def span_tokenizer(self) -> SpanTokenizer:
        """The tokenizer as the walk needs it."""
        return SpanTokenizer(self.tokenizer)

    @property
    def image_token_id(self) -> int:
        """The placeholder id, the first one past the tokenizer."""
        return self.span_tokenizer.image_token_id

    def find_template(self, name: str = "") -> Template:
        """The template called `name`, or the model's own. Raises TemplateError when the model names none."""
        if not (name or self.template):
            raise TemplateError(
                "this model does not say which conversation template it was trained with; give one (--template)"
            )
        return find_template(name or self.template)

    def count(self, media: Image | Video) -> int:
        """Slots that a medium takes."""
        if isinstance(media, Video):
            raise MediaError(f"{media.source!r}: this model's processor reads pictures only")
        return self.spec.tokens_per_image

    def prompt(self, messages: Sequence[Message], template: str = "") -> Tokens:
        """The expanded prompt of a conversation that ends with the user's turn."""
        return tokenize_prompt(messages, self.find_template(template), self.span_tokenizer, self.count)

    def pixels(self, images: Sequence[Image]) -> Tensor:
        """Pictures as float32 [N, 3, S, S]."""
        size = self.spec.image_size
        if not images:
            return torch.zeros(0, 3, size, size)
        return torch.from_numpy(np.stack([pixels(open_image(image), self.spec) for image in images]))

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Raw text with `<image>` markers, and the pictures for them in reading order.

        Returns input_ids and attention_mask [B, S] (padded on the right) and pixel_values [N, 3, H, W].
        Raises MediaError when the number of markers and pictures differ.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        pictures = [_as_image(image) for image in _flatten(images)]
        markers = sum(item.count(IMAGE_MARKER) for item in texts)
        if markers != len(pictures):
            raise MediaError(f"the text has {markers} {IMAGE_MARKER} markers but {len(pictures)} pictures were given")
        queue = iter(pictures)
        rows = [tokenize(_raw_segments(item, queue), self.span_tokenizer, self.count).ids for item in texts]
        width = max(map(len, rows), default=0)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        data: dict[str, Any] = {
            "input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        }
        if pictures:
            data["pixel_values"] = self.pixels(pictures)
        return BatchFeature(data, tensor_type=None if return_tensors == "pt" else return_tensors)


def _raw_segments(text: str, pictures: Any) -> list[Segment]:
    segments = []
    for place, chunk in enumerate(text.split(IMAGE_MARKER)):
        if place:
            segments.append(Segment("", "media", media=next(pictures)))
        segments.append(Segment(chunk, "template"))
    return segments


def _flatten(images: Any) -> list[Any]:
    if images is None:
        return []
    if not isinstance(images, (list, tuple)):
        return [images]
    return [item for image in images for item in _flatten(image)]


def _as_image(image: Any) -> Image:
    return image if isinstance(image, Image) else Image(image)
