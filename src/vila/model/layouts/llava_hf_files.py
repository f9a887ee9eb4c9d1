"""What transformers' LLaVA directory calls its weights, and what its small files hold."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vila.chat.templates import find_template
from vila.core.files import write_json
from vila.model.layouts.names import Prefixes
from vila.model.layouts.published import write_tokenizer
from vila.model.layouts.vision_folder import pixel_facts

IMAGE = "<image>"
CLASSIC: Prefixes = (
    ("language_model.", "language_model."),
    ("vision_tower.vision_model.", "vision_tower."),
    ("vision_tower.", "vision_tower."),
    ("multi_modal_projector.linear_1.", "projector.0."),
    ("multi_modal_projector.linear_2.", "projector.2."),
)
"""Their prefixes and ours."""
VOCABULARY = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
"""Weights with a row for each token."""
PREFIXED_TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Towers whose weights lie one module deeper."""


def their_prefixes(config: Any) -> Prefixes:
    """The pairs of CLASSIC that hold for a model's tower."""
    plain = config.vision_config.model_type not in PREFIXED_TOWERS
    return tuple(pair for pair in CLASSIC if not (plain and pair[0] == "vision_tower.vision_model."))


def config_facts(config: Any, processor: Any, image_id: int, rows: int) -> dict[str, Any]:
    """What config.json holds. rows: of the embeddings, which the image's own token may have made more."""
    llm, tower = config.text_config.to_dict(), config.vision_config.to_dict()
    llm["vocab_size"] = rows
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": llm,
        "vision_config": tower,
        "image_token_index": image_id,
        "image_seq_length": processor.spec.tokens_per_image,
        "projector_hidden_act": "linear" if config.projector_type == "linear" else "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.select_layer,
        "vision_feature_select_strategy": "default" if config.select_feature == "patch" else "full",
        "tie_word_embeddings": config.text_config.tie_word_embeddings,
        "dtype": str(config.dtype).removeprefix("torch."),
        "torch_dtype": str(config.dtype).removeprefix("torch."),
        "vila": {
            "vocab_size": config.text_config.vocab_size,
            "template": config.template,
            "image_mode": processor.spec.image_mode,
            "num_video_frames": processor.spec.num_video_frames,
            "vision_source": config.vision_source,
            **({} if processor.spec.exif_orientation else {"exif_orientation": False}),
        },
    }


def write_processor(processor: Any, tokenizer: Any, config: Any, part: Path) -> None:
    """Write what stock transformers reads pictures and conversations by."""
    spec, kind = processor.spec, config.vision_config.model_type
    square = {"height": spec.image_size, "width": spec.image_size}
    image = pixel_facts(spec)
    if spec.image_mode == "pad":
        image |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_center_crop": True}
        image |= {"size": {"shortest_edge": spec.image_size}, "crop_size": square}
    elif spec.image_mode == "square" and spec.center_crop:
        image |= {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True}
        image |= {"size": {"shortest_edge": spec.image_size}, "crop_size": square}
    else:
        image |= {"image_processor_type": "SiglipImageProcessor", "size": square}
    write_json(part / "preprocessor_config.json", {**image, "processor_class": "LlavaProcessor"}, indent=2)
    facts = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "num_additional_image_tokens": 0 if kind == "siglip_vision_model" else 1,
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": "default" if config.select_feature == "patch" else "full",
    }
    write_json(part / "processor_config.json", facts, indent=2)
    write_tokenizer(tokenizer, part, config.template, after_image_space=True)


def write_generation(model: Any, processor: Any, image_id: int, part: Path) -> None:
    """Write generation_config.json: that of the model, ended by the template's stop tokens as well."""
    config = copy.deepcopy(model.generation_config)
    special = processor.span_tokenizer.special_ids
    ends = {special[stop] for stop in _stops(processor) if stop in special}
    ends |= {processor.tokenizer.eos_token_id} - {None}
    facts: Mapping[str, Any] = config.to_diff_dict()
    write_json(
        part / "generation_config.json",
        {**facts, "eos_token_id": sorted(ends), "suppress_tokens": [image_id]},
        indent=2,
    )


def _stops(processor: Any) -> tuple[str, ...]:
    return find_template(processor.template).stop if processor.template else ()
