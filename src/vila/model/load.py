"""From directories to models: a whole checkpoint, or a new model from an LLM and a vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from vila.core.errors import LayoutError
from vila.core.vision_spec import ImageMode, VisionSpec
from vila.model.config import VilaConfig
from vila.model.layouts.protocol import detect_layout
from vila.model.processor import VilaProcessor
from vila.model.projector import build_projector
from vila.model.tower import TOWER_TYPES, patch_count
from vila.model.vila import VilaForConditionalGeneration

_STATISTICS = {
    "clip_vision_model": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip_vision_model": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and standard deviation, RGB, that each tower was trained with."""


def load_model(
    path: str | Path, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
) -> tuple[VilaForConditionalGeneration, VilaProcessor]:
    """Model (eval mode) and processor of a checkpoint directory. `dtype="auto"` keeps that of the file.

    Raises LayoutError when the path is not a checkpoint or its weights do not match its config.
    """
    folder = Path(path)
    kind = dtype if dtype == "auto" or isinstance(dtype, torch.dtype) else getattr(torch, str(dtype))
    model, processor = detect_layout(folder).read(folder, kind)
    return model.to(device), processor


def save_model(model: VilaForConditionalGeneration, processor: VilaProcessor, folder: Path) -> None:
    """Write a native checkpoint directory atomically."""
    from vila.model.layouts.native import LAYOUT

    LAYOUT.write(model, processor, folder)


def assemble(
    *,
    llm: str,
    vision: str,
    projector: str,
    select_layer: int,
    select_feature: str,
    image_size: int,
    image_mode: ImageMode,
    template: str,
    seed: int,
) -> tuple[VilaForConditionalGeneration, VilaProcessor]:
    """A new float32 model from the directories or hub ids of an LLM and a tower; `seed` draws the projector."""
    vision_config = AutoConfig.from_pretrained(vision)
    vision_config = getattr(vision_config, "vision_config", vision_config)
    text_config = AutoConfig.from_pretrained(llm)
    if vision_config.model_type not in TOWER_TYPES:
        raise LayoutError(f"{vision}: {vision_config.model_type!r} is not a known tower ({', '.join(TOWER_TYPES)})")
    tokenizer = AutoTokenizer.from_pretrained(llm)
    mean, std = _STATISTICS[vision_config.model_type]
    tokens = patch_count(vision_config, image_size)
    if select_feature == "cls_patch" and vision_config.model_type != "siglip_vision_model":
        tokens += 1
    spec = VisionSpec(image_size, tokens, mean, std, image_mode)
    config = VilaConfig(
        vision_config=vision_config,
        text_config=text_config,
        projector_type=projector,
        select_layer=select_layer,
        select_feature=select_feature,
        image_token_id=len(tokenizer),
        vision_spec=spec.to_dict(),
        template=template,
    )
    with torch.device("meta"):
        model = VilaForConditionalGeneration(config)
    model.language_model = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
    model.vision_tower = AutoModel.from_pretrained(vision, config=vision_config, dtype=torch.float32)
    model.projector = _seeded_projector(projector, vision_config.hidden_size, text_config.hidden_size, seed)
    return model.eval(), VilaProcessor(tokenizer, vision_spec=spec.to_dict(), template=template)


def _seeded_projector(kind: str, width_in: int, width_out: int, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_projector(kind, width_in, width_out)
