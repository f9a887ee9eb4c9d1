"""Combine the parts of a model to settings and processor files, and check that the parts are compatible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vila.core.errors import LayoutError
from vila.core.vision_spec import ImageMode, VisionSpec
from vila.model.layouts.base import ProcessorFiles
from vila.model.layouts.tower_files import TowerSpec
from vila.model.settings import ModelSettings
from vila.model.vision_sizes import (
    check_features,
    check_image_size,
    has_cls_token,
    num_patches,
    num_projected_tokens,
)


def build_settings(
    *,
    llm: Any,
    tower: TowerSpec,
    tokenizer_folder: Path,
    load_tokenizer: Callable[[], Any],
    projector: str,
    select_layer: int,
    select_feature: str,
    image_mode: ImageMode,
    template: str,
    image_token_id: int | None = None,
    s2_scales: Sequence[int] = (),
    s2_max_split: int = 0,
    num_video_frames: int = 8,
    vision_source: str = "",
    exif_orientation: bool = True,
) -> tuple[ModelSettings, ProcessorFiles]:
    """Return settings and processor files of a model, including all derived sizes.

    load_tokenizer: reads the tokenizer; called when the processor is loaded.
    Raises LayoutError with the field for incompatible parts.
    """
    check_features(tower.config, select_layer, select_feature)
    scales = sorted(s2_scales)
    image_size = scales[-1] if scales else tower.image_size
    if scales:
        check_image_size(tower.config, image_size, scales, s2_max_split)
    spec = VisionSpec(
        image_size=image_size,
        tokens_per_image=num_image_tokens(tower.config, image_size, scales, projector, select_feature),
        mean=tower.mean,
        std=tower.std,
        image_mode=image_mode,
        center_crop=tower.center_crop,
        num_video_frames=num_video_frames,
        exif_orientation=exif_orientation,
    )

    def load() -> tuple[Any, int]:
        tokenizer = load_tokenizer()
        # Outside both the tokenizer's and the LLM's vocabulary, so that the model cannot generate it.
        placeholder = max(len(tokenizer), llm.vocab_size) if image_token_id is None else image_token_id
        return tokenizer, placeholder

    settings = ModelSettings(
        vision_config=tower.config,
        text_config=llm,
        projector_type=projector,
        select_layer=select_layer,
        select_feature=select_feature,
        image_token_id=image_token_id,
        vision_spec=spec.to_dict(),
        template=template,
        s2_scales=scales,
        s2_max_split=s2_max_split,
        vision_source=vision_source,
    )
    return settings, ProcessorFiles(tokenizer_folder, spec.to_dict(), template, load)


def num_image_tokens(tower: Any, image_size: int, scales: Sequence[int], projector: str, select_feature: str) -> int:
    """Return the number of image placeholders per image. Raises LayoutError for incompatible parts."""
    patches = num_patches(tower, scales[0] if scales else image_size)
    return num_projected_tokens(projector, patches + (select_feature == "cls_patch" and has_cls_token(tower)))


def check_vision_spec(config: ModelSettings, spec: VisionSpec) -> None:
    """Compare a stored vision spec with the tower and projector of a config. Raises LayoutError with the field."""
    tower = config.vision_config
    check_features(tower, config.select_layer, config.select_feature)
    check_image_size(tower, spec.image_size, config.s2_scales, config.s2_max_split)
    tokens = num_image_tokens(tower, spec.image_size, config.s2_scales, config.projector_type, config.select_feature)
    if spec.tokens_per_image != tokens:
        problem = "does not match tower and projector"
        raise LayoutError(problem, field="tokens_per_image", value=spec.tokens_per_image, expected=f"{tokens}")
