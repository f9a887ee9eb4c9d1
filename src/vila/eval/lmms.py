"""lmms-eval model `vila_native`, registered through an entry point.

    lmms-eval eval --model vila_native --model_args pretrained=runs/starter/model --tasks pope

lmms-eval is imported only when it asks for the class; `import vila.eval.lmms` works without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image as PilImage

from vila.core.errors import ConfigError, DataError
from vila.core.system import current_process
from vila.core.types import Image, Message, Part, Text, Video
from vila.engine.sampling_params import SamplingParams

MODEL_ID = "vila_native"
"""lmms-eval's own model `vila` needs the original code base."""
_MAX_NEW_TOKENS = 128
_BATCH_SIZE = 16
_PLACEHOLDER = "<image>"
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_IGNORED_SETTINGS = ("until", "image_aspect_ratio", "use_cache", "num_beams", "do_sample", "max_length")


class LmmsAdapter:
    """Text generation for lmms-eval.

    model_args: pretrained (model directory), dtype (auto, bfloat16, float32), template, num_frames of videos.
    Raises ConfigError for other arguments.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "",
        dtype: str = "auto",
        template: str = "",
        num_frames: int | str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | str | None = None,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        from vila.engine.engine import Engine

        if unknown or not pretrained:
            problems = [f"unknown argument {name!r}" for name in unknown]
            problems += [] if pretrained else ["pretrained=DIRECTORY is missing"]
            raise ConfigError(f"{MODEL_ID}: {'; '.join(problems)}; known: pretrained, dtype, template, num_frames")
        process = current_process()
        self._rank, self._world_size = process.rank, process.world_size
        self.device = f"cuda:{process.local_rank}" if device == "cuda" and process.world_size > 1 else device or "cpu"
        self.batch_size = int(str(batch_size)) if str(batch_size).isdigit() else _BATCH_SIZE
        self._template, self._num_frames = template, int(num_frames) if num_frames else None
        self.engine = Engine.load(Path(pretrained), dtype=dtype, device=self.device)
        self._media_gap = self.engine.processor.find_template(template).media_gap

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the answers in the order of the requests. Raises the first error."""
        answers: list[str] = []
        for batch, sampling in _batches(requests, self.batch_size):
            conversations = [(self._message(request.args),) for request in batch]
            texts = self.engine.generate_batch(conversations, sampling, template=self._template)
            for request, text in zip(batch, texts, strict=True):
                self.cache_hook.add_partial("generate_until", request.args[:2], text)  # type: ignore[attr-defined]
            answers += texts
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not supported: no published score needs it."""
        raise NotImplementedError(f"{MODEL_ID} generates answers; choose tasks whose output_type is generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported: no published score needs it."""
        raise NotImplementedError(f"{MODEL_ID} answers one question at a time; choose single-round tasks")

    def _message(self, arguments: Sequence[Any]) -> Message:
        context, _, doc_to_visual, number, task, split = arguments
        visuals = doc_to_visual(self.task_dict[task][split][number])  # type: ignore[attr-defined]
        visuals = visuals if isinstance(visuals, list | tuple) else [visuals]
        media = [
            media_from_visual(each, f"{task} {split} {number}", self._num_frames)
            for each in visuals
            if each is not None
        ]
        return Message("user", message_parts(context, media, self._media_gap))


def manifest() -> Any:
    """Return the manifest of the entry point `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(MODEL_ID, simple_class_path=f"{__name__}.VilaNative")


def __getattr__(name: str) -> Any:
    if name == "VilaNative":
        return _native()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _native() -> type:
    from lmms_eval.api.model import lmms

    return type("VilaNative", (LmmsAdapter, lmms), {"__module__": __name__, "__doc__": LmmsAdapter.__doc__})


def sampling_from_kwargs(arguments: Mapping[str, Any]) -> SamplingParams:
    """Convert a task's generation settings; defaults: greedy, 128 tokens.

    `until` is ignored, as in the original scripts, and so is `image_aspect_ratio`, which the checkpoint defines.
    Raises ConfigError for beam search and for unknown settings.
    """
    beams = arguments.get("num_beams")
    if beams not in (None, 1):
        raise ConfigError("beam search is not supported", field="num_beams", value=beams, expected="1")
    settings = {name: value for name, value in arguments.items() if name not in _IGNORED_SETTINGS and value is not None}
    unknown = settings.keys() - {"max_new_tokens", "temperature", "top_p", "top_k", "max_gen_toks"}
    if unknown:
        raise ConfigError(
            f"not supported: {', '.join(sorted(unknown))}", field="generation_kwargs", hint="remove them from the task"
        )
    limit = int(settings.get("max_new_tokens", settings.get("max_gen_toks", _MAX_NEW_TOKENS)))
    temperature = float(settings.get("temperature", 0))
    if not temperature or arguments.get("do_sample") is False:
        return SamplingParams(max_new_tokens=limit)
    chosen = {"top_p": float(settings.get("top_p") or 1), "top_k": int(settings.get("top_k") or 0)}
    return SamplingParams(max_new_tokens=limit, temperature=temperature, **chosen)  # type: ignore[arg-type]


def media_from_visual(visual: Any, location: str, num_frames: int | None = None) -> Image | Video:
    """Convert a PIL image, or the path of an image or video. Raises DataError for other types."""
    if isinstance(visual, PilImage.Image):
        return Image(visual)
    if isinstance(visual, str | Path):
        if str(visual).lower().endswith(_IMAGE_SUFFIXES):
            return Image(visual)
        return Video(visual, num_frames)
    raise DataError(
        f"unsupported type {type(visual).__name__}",
        file=location,
        expected="a PIL image, or the path of an image or video",
    )


def message_parts(context: str, media: Sequence[Image | Video], gap: str) -> tuple[Part, ...]:
    """Put media at the `<image>` placeholders if their number matches, else before the text with `gap` after images."""
    pieces = re.split(_PLACEHOLDER, context)
    if media and len(pieces) == len(media) + 1:
        interleaved = [part for text, item in zip(pieces, media, strict=False) for part in (Text(text), item)]
        return tuple(part for part in (*interleaved, Text(pieces[-1])) if part != Text(""))
    before = [part for item in media for part in ((item, Text(gap)) if isinstance(item, Image) else (item,))]
    return (*before[:-1], Text(gap + context)) if before and before[-1] == Text(gap) else (*before, Text(context))


def _batches(requests: Sequence[Any], size: int) -> Iterator[tuple[list[Any], SamplingParams]]:
    """Yield runs of up to `size` requests with equal settings."""
    batch: list[Any] = []
    chosen = SamplingParams()
    for request in requests:
        own = sampling_from_kwargs(request.args[1])
        if batch and (own != chosen or len(batch) == size):
            yield batch, chosen
            batch = []
        batch.append(request)
        chosen = own
    if batch:
        yield batch, chosen
