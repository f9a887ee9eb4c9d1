"""What published checkpoints leave unsaid: templates by name, LLM configs inside larger ones, bare tokenizers."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, LlamaTokenizer, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vila.chat.jinja import chat_template
from vila.chat.templates import find_template
from vila.core.errors import LayoutError
from vila.core.reading import read_json
from vila.core.vision_spec import ImageMode, VisionSpec
from vila.model.config import VilaConfig
from vila.model.layouts.towers import TowerFacts
from vila.model.processor import VilaProcessor
from vila.model.projector import projected_tokens
from vila.model.tower import patch_count

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


def text_config(kind: str, facts: Mapping[str, Any], folder: Path) -> PretrainedConfig:
    """The config of an LLM of transformers' type `kind` from the keys of an old or new config.json."""
    if kind not in CONFIG_MAPPING:
        raise LayoutError(f"{folder}: transformers knows no LLM of type {kind!r}")
    plain = {key: value for key, value in facts.items() if key not in ("model_type", "architectures")}
    return CONFIG_MAPPING[kind].from_dict(plain)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a directory, empty when there is none or it is no object."""
    try:
        facts = read_json(folder / "config.json")
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def generation_facts(folder: Path) -> dict[str, Any]:
    """generation_config.json of a directory, empty when there is none."""
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a directory; published ones may hold `tokenizer.model` and nothing else.

    LLaMA's gets what the original asks for: BOS unless the config says otherwise, `legacy=False`, padding with `<unk>`.
    Raises LayoutError when there is none.
    """
    path = folder / "tokenizer_config.json"
    facts = read_json(path) if path.is_file() else {}
    try:
        if (folder / "tokenizer.model").is_file() and facts.get("tokenizer_class", "Llama").startswith("Llama"):
            bos = facts.get("add_bos_token", True)
            tokenizer = LlamaTokenizer.from_pretrained(folder, local_files_only=True, legacy=False, add_bos_token=bos)
        else:
            # AutoTokenizer would read config.json and stumble over model types that only the original code knows.
            plain = AutoConfig.for_model("llama")
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, config=plain)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LayoutError(
            f"{folder}: no tokenizer that can be read ({reason}); a checkpoint holds tokenizer.model or tokenizer.json"
        ) from error
    if tokenizer.pad_token is None and tokenizer.unk_token is not None:
        tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


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
    """Config and processor of a model from its parts. Sizes that follow from others are computed here, once."""
    scales = sorted(s2_scales)
    seen = patch_count(tower.config, scales[0] if scales else tower.image_size)
    if select_feature == "cls_patch" and tower.config.model_type != "siglip_vision_model":
        seen += 1
    spec = VisionSpec(
        image_size=scales[-1] if scales else tower.image_size,
        tokens_per_image=projected_tokens(projector, seen),
        mean=tower.mean,
        std=tower.std,
        image_mode=image_mode,
        center_crop=tower.center_crop,
        num_video_frames=num_video_frames,
        exif_orientation=exif_orientation,
    )
    # Past both the tokenizer and the LLM's rows, so that no answer can ever hold it.
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
