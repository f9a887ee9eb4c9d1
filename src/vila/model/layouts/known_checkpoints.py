"""Config and processor of a model from published parts; the templates that published checkpoints do not name."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from vila.chat.jinja import chat_template
from vila.chat.templates import find_template
from vila.core.errors import LayoutError
from vila.core.reading import Fields
from vila.core.vision_spec import ImageMode, VisionSpec
from vila.model.config import VilaConfig
from vila.model.layouts.towers import TowerFacts
from vila.model.processor import VilaProcessor
from vila.model.projector import projected_tokens
from vila.model.tower import check_features, check_image_size, has_cls, patch_count

_TEMPLATES = {
    "vila-2.7b": "vicuna_v1",
    "vila-7b": "vicuna_v1",
    "vila-13b": "vicuna_v1",
    "vila1.5-3b": "vicuna_v1",
    "vila1.5-3b-s2": "vicuna_v1",
    "llama-3-vila1.5-8b": "llama_3",
    "vila1.5-13b": "vicuna_v1",
    "vila1.5-40b": "hermes-2",
    "llava-v1.5-7b": "vicuna_v1",
    "llava-v1.5-13b": "vicuna_v1",
    "llava-v1.5-7b-lora": "vicuna_v1",
    "llava-v1.5-13b-lora": "vicuna_v1",
    "llava-1.5-7b-hf": "vicuna_v1",
    "llava-1.5-13b-hf": "vicuna_v1",
}
"""The template that each published checkpoint was trained with. Its directory or hub repository has exactly this name,
in any case; other names say nothing, because a wrong template still answers, only worse."""


def template_of(folder: Path) -> str:
    """The template of a published checkpoint by its name, empty for any other."""
    # The hub's cache: models--OWNER--NAME/snapshots/COMMIT.
    name = folder.parent.parent.name.rpartition("--")[2] if folder.parent.name == "snapshots" else folder.name
    return _TEMPLATES.get(name.lower(), "")


def write_tokenizer(tokenizer: Any, folder: Path, template: str, *, after_image_space: bool = False) -> None:
    """The tokenizer's files, with the conversation template as a Jinja one.

    With a SentencePiece model behind it also `tokenizer.model`, which is all that older code reads.
    """
    tokenizer = copy.copy(tokenizer)
    if template:
        tokenizer.chat_template = chat_template(find_template(template), after_image_space=after_image_space)
    tokenizer.save_pretrained(folder)
    source = getattr(tokenizer, "vocab_file", None)
    if source and Path(source).name == "tokenizer.model" and Path(source).is_file():
        shutil.copyfile(source, folder / "tokenizer.model")


def own_facts(config: Any, processor: Any) -> dict[str, Any]:
    """Settings of ours that config.json of a published layout holds beside the original's, where they matter."""
    facts: dict[str, Any] = {"conversation_template": config.template} if config.template else {}
    if not processor.spec.exif_orientation:
        facts["exif_orientation"] = False
    return facts


def compose(
    *,
    llm: PretrainedConfig,
    tower: TowerFacts,
    tokenizer: Any,
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
) -> tuple[VilaConfig, VilaProcessor]:
    """Make config and processor of a model from its parts. Sizes that follow from others are computed here, once.

    Raises LayoutError with the field for parts that do not go together.
    """
    check_features(tower.config, select_layer, select_feature)
    scales = sorted(s2_scales)
    image_size = scales[-1] if scales else tower.image_size
    if scales:
        check_image_size(tower.config, image_size, scales, s2_max_split)
    spec = VisionSpec(
        image_size=image_size,
        tokens_per_image=image_tokens(tower.config, image_size, scales, projector, select_feature),
        mean=tower.mean,
        std=tower.std,
        image_mode=image_mode,
        center_crop=tower.center_crop,
        num_video_frames=num_video_frames,
        exif_orientation=exif_orientation,
    )
    # Past both the tokenizer and the LLM's embeddings, so that no answer can hold it.
    placeholder = max(len(tokenizer), llm.vocab_size) if image_token_id is None else image_token_id
    config = VilaConfig(
        vision_config=tower.config,
        text_config=llm,
        projector_type=projector,
        select_layer=select_layer,
        select_feature=select_feature,
        image_token_id=placeholder,
        vision_spec=spec.to_dict(),
        template=template,
        s2_scales=scales,
        s2_max_split=s2_max_split,
        vision_source=vision_source,
    )
    processor = VilaProcessor(tokenizer, vision_spec=spec.to_dict(), template=template, image_token_id=placeholder)
    return config, processor


def image_tokens(
    tower: PretrainedConfig, image_size: int, scales: Sequence[int], projector: str, select_feature: str
) -> int:
    """Return the number of image placeholders of one image. Raises LayoutError for parts that do not go together."""
    patches = patch_count(tower, scales[0] if scales else image_size)
    return projected_tokens(projector, patches + (select_feature == "cls_patch" and has_cls(tower)))


def check_spec(config: VilaConfig, spec: VisionSpec) -> None:
    """Compare stored vision settings with the tower and projector of a config. Raises LayoutError with the field."""
    tower = config.vision_config
    check_features(tower, config.select_layer, config.select_feature)
    check_image_size(tower, spec.image_size, config.s2_scales, config.s2_max_split)
    tokens = image_tokens(tower, spec.image_size, config.s2_scales, config.projector_type, config.select_feature)
    if spec.tokens_per_image != tokens:
        raise LayoutError(
            "not what tower and projector give",
            field="tokens_per_image",
            value=spec.tokens_per_image,
            expected=f"{tokens}",
        )


def check_placeholder(facts: Fields, key: str, id_: int, tokenizer: Any) -> None:
    """Refuse an image placeholder that is a token of text, such as BOS. Raises LayoutError."""
    token = str(tokenizer.convert_ids_to_tokens(id_)) if id_ in tokenizer.all_special_ids else "<image>"
    if "image" not in token.lower() and "img" not in token.lower():
        own = tokenizer.get_vocab().get("<image>", len(tokenizer))
        raise facts.refusal(key, f"the tokenizer has {token!r} there", expected=f"{own}, or an id past the tokenizer")
