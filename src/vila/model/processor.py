"""`VilaProcessor`: text, images and videos to model inputs, in the Hugging Face convention."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from vila.chat.content import expand_videos, parse_messages
from vila.chat.render import render
from vila.chat.template import Span, Template
from vila.chat.templates import find_template
from vila.chat.tokenize import SpanTokenizer, Tokens, check_special_tokens, tokenize
from vila.core.errors import MediaError, TemplateError
from vila.core.types import Image, Message, Video
from vila.core.vision_spec import ImageMode, VisionSpec
from vila.media.image import open_image
from vila.media.limits import DEFAULT_LIMITS, IsCancelled, MediaLimits, never
from vila.media.transform import Pixels, normalise, shrinker, square_bytes
from vila.media.video import open_frames

IMAGE_MARKER, VIDEO_MARKER = "<image>", "<video>"
_MARKERS = re.compile(f"({IMAGE_MARKER}|{VIDEO_MARKER})")


class VilaProcessor(ProcessorMixin):
    """Tokenizer, vision spec and conversation template of a model."""

    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: Any = None,
        vision_spec: dict[str, Any] | None = None,
        template: str = "",
        image_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        """image_token_id: placeholder id; None is the first id after the tokenizer's vocabulary."""
        self.vision_spec = vision_spec or {}
        self.template = template
        self.image_token_id = len(tokenizer) if image_token_id is None else image_token_id
        super().__init__(tokenizer, **kwargs)

    @cached_property
    def spec(self) -> VisionSpec:
        """Image preprocessing settings and number of tokens per image."""
        return VisionSpec.from_dict(self.vision_spec)

    def with_vision(
        self, *, image_mode: ImageMode | None = None, exif_orientation: bool | None = None
    ) -> VilaProcessor:
        """Return this processor with other vision settings; None keeps a setting."""
        spec = self._spec(image_mode, exif_orientation)
        if spec == self.spec:
            return self
        return VilaProcessor(self.tokenizer, spec.to_dict(), self.template, self.image_token_id)

    def _spec(self, image_mode: ImageMode | None, exif_orientation: bool | None = None) -> VisionSpec:
        spec = self.spec
        return replace(
            spec,
            image_mode=image_mode or spec.image_mode,
            exif_orientation=spec.exif_orientation if exif_orientation is None else exif_orientation,
        )

    @cached_property
    def span_tokenizer(self) -> SpanTokenizer:
        """Tokenizer for rendered spans."""
        span = SpanTokenizer(self.tokenizer)
        span.image_token_id = self.image_token_id
        return span

    def find_template(self, name: str = "") -> Template:
        """Return the template `name`, or the model's own.

        Raises TemplateError if the model has none, and for special tokens that the tokenizer lacks.
        """
        if not (name or self.template):
            hint = "set --template, or template= in Python (docs/chat.md lists the templates)"
            raise TemplateError("the checkpoint does not name its conversation template", field="template", hint=hint)
        chosen = find_template(name or self.template)
        if chosen.name not in self._checked_templates:
            check_special_tokens(chosen, self.tokenizer, sys.maxsize)
            self._checked_templates.add(chosen.name)
        return chosen

    @cached_property
    def _checked_templates(self) -> set[str]:
        """Names of templates whose special tokens the tokenizer has."""
        return set()

    def count(self, media: Image | Video) -> int:
        """Return the number of placeholders of an image. Raises MediaError for videos, which must be expanded first."""
        if isinstance(media, Video):
            raise MediaError(
                "a video must be replaced by its frames first", value=media.source, hint="call expand_videos first"
            )
        return self.spec.tokens_per_image

    def expand_videos(
        self,
        messages: Sequence[Message],
        gap: str,
        *,
        shrink: VisionSpec | None = None,
        limits: MediaLimits = DEFAULT_LIMITS,
        cancelled: IsCancelled = never,
    ) -> tuple[Message, ...]:
        """Replace each video by its frames, with `gap` after each frame, as the released code writes `<image>\\n`.

        shrink, limits, cancelled: see `frames`.
        """
        return expand_videos(messages, gap, partial(self.frames, shrink=shrink, limits=limits, cancelled=cancelled))

    def frames(
        self,
        video: Video,
        *,
        shrink: VisionSpec | None = None,
        limits: MediaLimits = DEFAULT_LIMITS,
        cancelled: IsCancelled = never,
    ) -> list[Image]:
        """Decode the sampled frames of a video, in order.

        shrink: resize each frame by these settings while decoding, which saves memory. `pixels` with the same settings
                leaves such frames unchanged; with other settings the result differs from that of full-size frames.
        limits, cancelled: see `open_frames`.
        """
        return [
            Image(frame)
            for frame in open_frames(
                video,
                video.num_frames or self.spec.num_video_frames,
                limits=limits,
                cancelled=cancelled,
                shrink=shrinker(shrink) if shrink else None,
            )
        ]

    def tokens(self, messages: Sequence[Message], template: str = "", *, prompt: bool = True) -> Tokens:
        """Tokenize a conversation with expanded placeholders; `prompt` appends the start of the assistant's turn."""
        chosen = self.find_template(template)
        messages = self.expand_videos(messages, chosen.media_gap)
        return tokenize(render(messages, chosen, prompt=prompt), self.span_tokenizer, self.count)

    def prompt(self, messages: Sequence[Message], template: str = "") -> Tokens:
        """Tokenize a conversation that ends with a user message as a prompt."""
        return self.tokens(messages, template)

    def pixels(self, images: Sequence[Image], image_aspect_ratio: ImageMode | None = None) -> Tensor:
        """Preprocess images to float32 [N, 3, S, S].

        image_aspect_ratio: `pad`, `resize` or `square`, for this call only.
        """
        spec = self._spec(image_aspect_ratio)
        if not images:
            return torch.zeros(0, 3, spec.image_size, spec.image_size)
        return torch.from_numpy(_pixels(images, spec))

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        videos: Any = None,
        return_tensors: str | None = "pt",
        *,
        image_aspect_ratio: ImageMode | None = None,
        padding_side: str = "right",
        **kwargs: Any,
    ) -> BatchFeature:
        """Convert raw text with `<image>` and `<video>` markers, and media in reading order, to model inputs.

        text:   one string or several, used as is, without a template.
        images: paths, URLs, bytes or PIL images. videos: paths, URLs or bytes; or lists of PIL frames.
        Returns input_ids and attention_mask [B, S] and, if there are images, pixel_values [N, 3, H, W].
        Raises MediaError if the numbers of markers and media differ.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        queues: dict[str, list[Any]] = {IMAGE_MARKER: _images(images), VIDEO_MARKER: _videos(videos)}
        for marker, given in queues.items():
            markers = sum(item.count(marker) for item in texts)
            if markers != len(given):
                field = {IMAGE_MARKER: "images", VIDEO_MARKER: "videos"}[marker]
                problem = f"number of media differs from the {marker} markers in the text"
                raise MediaError(problem, field=field, value=len(given), expected=str(markers))
        waiting = {marker: iter(given) for marker, given in queues.items()}
        gap = find_template(self.template).media_gap if self.template else "\n"
        spans = [self._raw(item, waiting, gap, image_aspect_ratio) for item in texts]
        sequences = [tokenize(one, self.span_tokenizer, self.count) for one in spans]
        return self._inputs(sequences, image_aspect_ratio, padding_side, return_tensors)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        template: str = "",
        image_aspect_ratio: ImageMode | None = None,
        padding_side: str = "right",
        **kwargs: Any,
    ) -> Any:
        """Render messages of content parts as a prompt, in reading order, with nothing inserted between parts:
        `{"type": "image", "path" | "url" | "image" | "base64": ..}`, `{"type": "video", ..}`, `{"type": "text", ..}`.

        A list of conversations is a batch. Returns text with `<image>` markers; with `tokenize`, the ids; with
        `return_dict`, all model inputs. The prompt ends with the start of the assistant's turn if the last message is
        the user's, or if `add_generation_prompt` is set.
        Raises TemplateError for invalid role order or unknown parts, MediaError for unreadable media.
        """
        if chat_template is not None:
            raise TemplateError(
                "Jinja templates are not supported", field="chat_template", hint="set template= to a name"
            )
        single = not conversation or isinstance(conversation[0], (Mapping, Message))
        chosen = self.find_template(template)
        rendered = []
        for one in [conversation] if single else conversation:
            messages = parse_messages(one)
            ends_open = bool(messages) and messages[-1].role == "user"
            if ends_open and add_generation_prompt is False:
                problem = "a conversation that ends with a user message always gets a generation prompt"
                raise TemplateError(problem, field="add_generation_prompt", value=False)
            ends_open = ends_open or bool(add_generation_prompt)
            expanded = self.expand_videos(messages, chosen.media_gap, shrink=self._spec(image_aspect_ratio))
            rendered.append(render(expanded, chosen, prompt=ends_open))
        if not tokenize:
            symbols = self.span_tokenizer.symbols
            texts = [
                "".join(symbols.get(s.text, s.text) if not s.media else IMAGE_MARKER for s in row) for row in rendered
            ]
            return texts[0] if single else texts
        tokens = [_tokenize(spans, self.span_tokenizer, self.count) for spans in rendered]
        inputs = self._inputs(tokens, image_aspect_ratio, padding_side, return_tensors)
        if return_dict:
            return inputs
        return inputs["input_ids"] if not single or return_tensors else inputs["input_ids"][0]

    def _inputs(
        self,
        sequences: Sequence[Tokens],
        image_aspect_ratio: ImageMode | None,
        padding_side: str,
        return_tensors: str | None,
    ) -> BatchFeature:
        width = max((len(tokens.ids) for tokens in sequences), default=0)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids, mask = [], []
        for tokens in sequences:
            missing = width - len(tokens.ids)
            left, right = (missing, 0) if padding_side == "left" else (0, missing)
            ids.append([pad] * left + tokens.ids + [pad] * right)
            mask.append([0] * left + [1] * len(tokens.ids) + [0] * right)
        data: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        images = [item for tokens in sequences for item in tokens.media if isinstance(item, Image)]
        if images:
            data["pixel_values"] = self.pixels(images, image_aspect_ratio)
        return BatchFeature(data, tensor_type=return_tensors)

    def _raw(
        self, text: str, waiting: Mapping[str, Iterator[Any]], gap: str, image_mode: ImageMode | None
    ) -> list[Span]:
        spans = []
        for piece in _MARKERS.split(text):
            if piece == IMAGE_MARKER:
                spans.append(Span("", "media", media=next(waiting[piece])))
            elif piece == VIDEO_MARKER:
                video = next(waiting[piece])
                frames = self.frames(video, shrink=self._spec(image_mode)) if isinstance(video, Video) else video
                for frame in frames:
                    spans += [Span("", "media", media=frame), Span(gap, "template")]
            elif spans and spans[-1].text == gap and spans[-1].media is None and piece.startswith(gap):
                spans[-1] = Span(piece, "template")
            else:
                spans.append(Span(piece, "template"))
        return [span for span in spans if span.text or span.media]


# `apply_chat_template` has an argument `tokenize`.
_tokenize = tokenize


def _pixels(images: Sequence[Image], spec: VisionSpec) -> Pixels:
    squares = [square_bytes(open_image(image, exif_orientation=spec.exif_orientation), spec) for image in images]
    return normalise(np.stack(squares), spec)


def _images(given: Any) -> list[Image]:
    if given is None:
        return []
    if not isinstance(given, (list, tuple)):
        return [given if isinstance(given, Image) else Image(given)]
    return [image for item in given for image in _images(item)]


def _videos(given: Any) -> list[Video | list[Image]]:
    if given is None:
        return []
    if not isinstance(given, (list, tuple)):
        return [given if isinstance(given, Video) else Video(given)]
    return [_images(item) if isinstance(item, (list, tuple)) else _videos(item)[0] for item in given]
