"""transformers' LLaVA layout, which stock transformers, vLLM, SGLang and llama.cpp's converter read.

Three adaptations make stock code compute the same: a `linear` projector becomes two layers without activation, the
second an identity. `<image>` needs an id below the vocabulary size, so the mean row is appended to embeddings and LM
head if there is none; it can never be the most likely token. Stock tokenisation omits the `▁` that the released code
inserts at the start of text after an image, so the chat template writes a space there.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from vila.chat.templates import find_template
from vila.core.errors import LayoutError
from vila.core.files import write_json
from vila.core.reading import Fields
from vila.core.vision_spec import IMAGE_MODES, MAX_SIDE, MAX_VIDEO_FRAMES, ImageMode
from vila.model.layouts.base import (
    CheckpointFiles,
    FullPrecisionLayout,
    Prefixes,
    Sources,
    WeightStorage,
    keep_rows,
    map_names,
    to_layout_name,
)
from vila.model.layouts.build_config import build_settings
from vila.model.layouts.config_file import MAX_LAYERS, read_config, read_generation_config, text_config, tower_config
from vila.model.layouts.known_checkpoints import known_template
from vila.model.layouts.tokenizer_files import check_placeholder, read_tokenizer, write_tokenizer
from vila.model.layouts.tower_files import image_processor_settings, tower_spec
from vila.model.weights import TensorRef, find_weight_files, list_tensors

IMAGE = "<image>"
NAME_PREFIXES: Prefixes = (
    ("language_model.", "language_model."),
    ("vision_tower.vision_model.", "vision_tower."),
    ("vision_tower.", "vision_tower."),
    ("multi_modal_projector.linear_1.", "projector.0."),
    ("multi_modal_projector.linear_2.", "projector.2."),
)
"""Weight name prefixes: theirs, ours."""
VOCABULARY = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
"""Weights with one row per token."""
PREFIXED_TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Towers whose weights are nested one module deeper."""


def name_prefixes(config: Any) -> Prefixes:
    """Return the prefixes that apply to a model's tower."""
    plain = config.vision_config.model_type not in PREFIXED_TOWERS
    return tuple(pair for pair in NAME_PREFIXES if not (plain and pair[0] == "vision_tower.vision_model."))


def llava_config(config: Any, processor: Any, image_id: int, rows: int) -> dict[str, Any]:
    """Return the content of config.json. rows: rows of the embeddings, including the image token's."""
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
    """Write processor and tokenizer files for stock transformers."""
    spec, kind = processor.spec, config.vision_config.model_type
    square = {"height": spec.image_size, "width": spec.image_size}
    image = image_processor_settings(spec)
    if spec.image_mode == "pad":
        image |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_center_crop": True}
        image |= {"size": {"shortest_edge": spec.image_size}, "crop_size": square}
    elif spec.image_mode == "square" and spec.center_crop:
        image |= {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True}
        image |= {"size": {"shortest_edge": spec.image_size}, "crop_size": square}
    else:
        image |= {"image_processor_type": "SiglipImageProcessor", "size": square}
    write_json(part / "preprocessor_config.json", {**image, "processor_class": "LlavaProcessor"}, indent=2)
    processor_config = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "num_additional_image_tokens": 0 if kind == "siglip_vision_model" else 1,
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": "default" if config.select_feature == "patch" else "full",
    }
    write_json(part / "processor_config.json", processor_config, indent=2)
    write_tokenizer(tokenizer, part, config.template, after_image_space=True)


def write_generation(model: Any, processor: Any, image_id: int, part: Path) -> None:
    """Write the model's generation_config.json, with the template's stop tokens as additional end-of-sequence ids."""
    config = copy.deepcopy(model.generation_config)
    special = processor.span_tokenizer.special_ids
    stops = find_template(processor.template).stop if processor.template else ()
    ends = {special[stop] for stop in stops if stop in special}
    ends |= {processor.tokenizer.eos_token_id} - {None}
    settings: Mapping[str, Any] = config.to_diff_dict()
    write_json(
        part / "generation_config.json",
        {**settings, "eos_token_id": sorted(ends), "suppress_tokens": [image_id]},
        indent=2,
    )


# Module names since transformers 4.52.
_NEW: Prefixes = (
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.vision_model.", "vision_tower."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.linear_1.", "projector.0."),
    ("model.multi_modal_projector.linear_2.", "projector.2."),
)
_TOWERS = (*PREFIXED_TOWERS, "dinov2")
_FIELDS = {
    "projector_type": "projector_hidden_act",
    "select_layer": "vision_feature_layer",
    "select_feature": "vision_feature_select_strategy",
    "template": "vila.template",
}


class LlavaHfLayout(FullPrecisionLayout):
    """config.json with `model_type: llava` and a `text_config`."""

    name = "llava-hf"

    def matches(self, folder: Path) -> bool:
        """Return whether config.json is a transformers LlavaConfig."""
        config = read_config(folder)
        return config.get("model_type") == "llava" and "text_config" in config

    def open(self, folder: Path, base: Path | None = None) -> CheckpointFiles:
        """Read the configs. Raises LayoutError for unsupported LLaVA variants."""
        fields = read_config(folder)
        text, vision = fields.section("text_config"), fields.section("vision_config")
        llm = text_config(text, text.text("model_type", "llama"))
        # Old configs contain only values that differ from the defaults of the config classes.
        tower = tower_config(vision, vision.text("model_type", "clip_vision_model")) if vision else _default_tower()
        layer = _select_layer(fields)
        if not fields.flag("multimodal_projector_bias", True):
            raise fields.refusal("multimodal_projector_bias", "a projector without biases is not supported")
        refs, unexpected = map_names(list_tensors(find_weight_files(folder)), (*NAME_PREFIXES, *_NEW))
        projector = _projector(fields, refs)
        ours = fields.section("vila")
        image_id = fields.integer("image_token_index", _IMAGE_TOKEN_INDEX, minimum=1)
        placeholder: int | None = image_id
        if rows := ours.integer("vocab_size", None, minimum=1):
            llm.vocab_size = rows
            placeholder = None
            refs.update({name: keep_rows(refs[name], rows) for name in VOCABULARY if name in refs})

        def load_tokenizer() -> Any:
            tokenizer = read_tokenizer(folder)
            if rows:
                _remove_image_token(tokenizer)
            else:
                check_placeholder(fields, "image_token_index", image_id, tokenizer)
            return tokenizer

        images = _image_fields(folder)
        strategy = fields.text("vision_feature_select_strategy", "default", choices=("default", "full"))
        mode = "pad" if images.flag("do_pad", False) else "square"
        with fields.naming(_FIELDS):
            settings, processor = build_settings(
                llm=llm,
                tower=tower_spec(tower, images, vision, _image_side(images)),
                tokenizer_folder=folder,
                load_tokenizer=load_tokenizer,
                projector=projector,
                select_layer=layer,
                select_feature="patch" if strategy == "default" else "cls_patch",
                image_mode=cast(ImageMode, ours.text("image_mode", mode, choices=IMAGE_MODES)),
                template=ours.text("template", "") or known_template(folder),
                image_token_id=placeholder,
                num_video_frames=ours.integer("num_video_frames", 8, minimum=1, maximum=MAX_VIDEO_FRAMES),
                exif_orientation=ours.flag("exif_orientation", True),
                vision_source=ours.text("vision_source", ""),
            )
        # The suppressed id is that of <image>, which our model does not have.
        generation = read_generation_config(folder, ignored=("suppress_tokens",))
        sources = Sources(fields, text, vision, _FIELDS)
        return CheckpointFiles(folder, settings, processor, refs, sources, unexpected, generation)

    def check_writable(self, config: Any, processor: Any) -> None:
        """Raise LayoutError for a config that transformers' LLaVA does not support."""
        kind = config.vision_config.model_type
        if config.s2_scales or config.projector_type not in ("linear", "mlp2x_gelu"):
            field = "s2_scales" if config.s2_scales else "projector_type"
            value = getattr(config, field)
            raise LayoutError("not supported by llava-hf", field=field, value=value, hint="use vila-v15 or native")
        if kind not in _TOWERS:
            problem, field = "vision tower not supported by llava-hf", "vision_config.model_type"
            raise LayoutError(problem, field=field, value=kind, expected=", ".join(_TOWERS))
        if config.select_layer == -1 and kind != "clip_vision_model":
            problem = f"not supported by llava-hf for {kind}: stock transformers may normalise the last hidden state"
            raise LayoutError(problem, field="select_layer", value=-1)
        if processor.spec.image_mode == "resize" and kind == "clip_vision_model":
            problem = "not supported by llava-hf for CLIP, whose processor crops or pads"
            raise LayoutError(problem, field="image_mode", value="resize")

    def write_files(self, model: Any, processor: Any, part: Path, storage: WeightStorage) -> None:
        """Write model, processor, tokenizer with `<image>`, chat template and generation config."""
        config = storage.config(model)
        tokenizer, image_id = with_image_token(processor)
        rows = max(config.text_config.vocab_size, image_id + 1)
        config_json = llava_config(config, processor, image_id, rows)
        if storage.quantization_config:
            config_json["quantization_config"] = dict(storage.quantization_config)
        storage.save(storage.cast(_weights(storage.state_dict(model), config, rows)), part)
        write_json(part / "config.json", config_json, indent=2)
        write_processor(processor, tokenizer, config, part)
        write_generation(model, processor, image_id, part)


def with_image_token(processor: Any) -> tuple[Any, int]:
    """Return a copy of the tokenizer with `<image>` as a special token, and the id of that token."""
    from transformers import AddedToken

    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    return tokenizer, int(tokenizer.convert_tokens_to_ids(IMAGE))


def _image_side(images: Fields) -> int | None:
    """Read the image size of the processor, which may differ from the tower's config (DINOv2)."""
    for key in ("crop_size", "size"):
        if isinstance(images.get(key), dict):
            sides = images.section(key)
            for side in ("height", "shortest_edge"):
                if side in sides:
                    return sides.integer(side, minimum=1, maximum=MAX_SIDE)
        elif images.get(key) is not None:
            return images.integer(key, minimum=1, maximum=MAX_SIDE)
    return None


_IMAGE_TOKEN_INDEX, _SELECT_LAYER = 32000, -2
"""Defaults of transformers' LlavaConfig."""


def _default_tower() -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model("llava").vision_config


def _select_layer(fields: Fields) -> int:
    if isinstance(fields.get("vision_feature_layer"), list):
        raise fields.refusal("vision_feature_layer", "features of several layers are not supported")
    return fields.integer("vision_feature_layer", _SELECT_LAYER, minimum=-MAX_LAYERS, maximum=MAX_LAYERS)


def _projector(fields: Fields, refs: dict[str, TensorRef]) -> str:
    """Return the projector type. For a linear projector written by us, remove the second layer, an identity."""
    if fields.text("projector_hidden_act", "gelu", choices=("gelu", "linear")) == "gelu":
        return "mlp2x_gelu"
    folder = fields.file.parent
    second = {leaf: refs.pop(f"projector.2.{leaf}", None) for leaf in ("weight", "bias")}
    for leaf, ref in second.items():
        if ref is None:
            raise LayoutError("missing", file=folder, field=f"multi_modal_projector.linear_2.{leaf}")
        import torch

        with ref.file.open() as get:
            tensor = get(ref.name)
            expected = torch.eye(tensor.shape[0]) if leaf == "weight" else torch.zeros(tensor.shape[0])
            if not torch.equal(tensor.float(), expected):
                problem = "two linear projector layers without an activation are not supported"
                raise LayoutError(problem, file=folder, field=f"multi_modal_projector.linear_2.{leaf}")
    for leaf in ("weight", "bias"):
        refs[f"projector.{leaf}"] = refs.pop(f"projector.0.{leaf}")
    return "linear"


def _image_fields(folder: Path) -> Fields:
    for name, key in (("processor_config.json", "image_processor"), ("preprocessor_config.json", "")):
        if (folder / name).is_file():
            fields = Fields.of_file(folder / name, LayoutError)
            if fields := (fields.section(key) if key else fields):
                return fields
    return Fields({}, folder / "preprocessor_config.json", error=LayoutError)


def _remove_image_token(tokenizer: Any) -> None:
    from tokenizers import Tokenizer

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != IMAGE]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(spec))


def _weights(state: dict[str, Any], config: Any, rows: int) -> dict[str, Any]:
    """Return the weights by LLaVA's names, with `rows` rows of embeddings and LM head."""
    import torch

    for name in VOCABULARY:
        if name in state and rows > state[name].shape[0]:
            # Computed from the stored dtype, so that writing a model again gives the same row.
            mean = state[name].to(config.dtype).float().mean(0, keepdim=True).to(state[name].dtype)
            state[name] = torch.cat([state[name], mean.expand(rows - state[name].shape[0], -1)])
    if config.projector_type == "linear":
        for leaf in ("weight", "bias"):
            state[f"projector.0.{leaf}"] = state.pop(f"projector.{leaf}")
        first = state["projector.0.weight"]
        state["projector.2.weight"] = torch.eye(first.shape[0], dtype=first.dtype)
        state["projector.2.bias"] = torch.zeros_like(state["projector.0.bias"])
    prefixes = name_prefixes(config)
    return {to_layout_name(name, prefixes): tensor for name, tensor in state.items()}


LAYOUT = LlavaHfLayout()
