"""LLaVA-1.5 layout, as VILA-2.7B, 7B and 13B were published: one directory, LLM and projector weights together.

Also reads a stage-1 directory (`mm_projector.bin`) and a LoRA directory (`adapter_model` and
`non_lora_trainables.bin`), which both need the directory of their base LLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vila.core.errors import LayoutError, WeightMismatchError
from vila.core.files import write_json
from vila.core.reading import Fields
from vila.families import FAMILIES, FAMILY_BY_LLAVA_TYPE, find_family
from vila.model.hub import find_folder
from vila.model.layouts.base import (
    CheckpointFiles,
    FullPrecisionLayout,
    Prefixes,
    Sources,
    WeightStorage,
    map_names,
    to_layout_name,
)
from vila.model.layouts.build_config import build_settings
from vila.model.layouts.config_file import MAX_LAYERS, read_config, read_generation_config, text_config
from vila.model.layouts.known_checkpoints import known_template
from vila.model.layouts.lora_adapter import TiedHead, read_adapter
from vila.model.layouts.tokenizer_files import read_tokenizer, write_tokenizer
from vila.model.layouts.tower_files import (
    TowerSpec,
    known_tower,
    read_image_mode,
    read_tower,
    tower_tensors,
    write_tower,
)
from vila.model.weights import TensorRef, find_weight_files, list_tensors, open_weight_file

PREFIXES: Prefixes = (
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower."),
    ("model.mm_projector.", "projector."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
_TOWER = "vision_tower"
_TIED = TiedHead("model.embed_tokens.weight", "lm_head.weight")
FIELDS = {
    "projector_type": "mm_projector_type",
    "select_layer": "mm_vision_select_layer",
    "select_feature": "mm_vision_select_feature",
    "template": "conversation_template",
}
"""Keys of the published config by our names."""


class LlavaV1Layout(FullPrecisionLayout):
    """config.json with `mm_*` keys, weights named as in LLaVA-1.5, tokenizer files."""

    name = "llava-v1"

    def matches(self, folder: Path) -> bool:
        """Return whether config.json has LLaVA-1.5's `mm_vision_tower`."""
        config = read_config(folder)
        return "mm_vision_tower" in config and "llm_cfg" not in config and "text_config" not in config

    def open(self, folder: Path, base: Path | None = None) -> CheckpointFiles:
        """Read the configs. `base` is the LLM of a stage-1 or LoRA directory."""
        fields = read_config(folder)
        kind = FAMILY_BY_LLAVA_TYPE[fields.text("model_type", choices=tuple(FAMILY_BY_LLAVA_TYPE))].model_type
        source = fields.text("mm_vision_tower")
        own = Fields({k: v for k, v in fields.items() if not k.startswith("mm_")}, fields.file, error=LayoutError)
        llm = text_config(own, kind)
        refs, tokenizer_folder = _llm_and_projector(folder, base, fields, llm)
        ours, unexpected = map_names(refs, PREFIXES)
        tower = self._tower(folder, fields, ours)
        added: list[str] = []
        if fields.flag("mm_use_im_start_end", False):
            patch = ["<im_patch>"] if fields.flag("mm_use_im_patch_token", True) else []
            added = [*patch, "<im_start>", "<im_end>"]
        with fields.naming(FIELDS):
            settings, processor = build_settings(
                llm=llm,
                tower=tower,
                tokenizer_folder=tokenizer_folder,
                load_tokenizer=partial(_load_tokenizer, tokenizer_folder, added),
                projector=fields.text("mm_projector_type", "linear"),
                vision_source=source if known_tower(source) else "",
                **read_settings(folder, fields),
            )
        sources = Sources(fields, own, tower.source, FIELDS)
        return CheckpointFiles(
            folder, settings, processor, ours, sources, unexpected, read_generation_config(tokenizer_folder)
        )

    def _tower(self, folder: Path, fields: Fields, ours: dict[str, TensorRef]) -> TowerSpec:
        """Return the tower's spec; adds its weights to `ours` unless the checkpoint contains them."""
        source = fields.text("mm_vision_tower")
        inside = any(name.startswith("vision_tower.") for name in ours)
        if inside and (known := known_tower(source)):
            return known
        tower_folder = _find_tower(folder, fields)
        tower = read_tower(tower_folder)
        if not inside:
            found, unexpected = tower_tensors(tower_folder, tower)
            if unexpected:
                raise WeightMismatchError(tower_folder, unexpected=unexpected)
            ours.update(found)
        return tower

    def check_writable(self, config: Any, processor: Any) -> None:
        """Raise LayoutError for a config that LLaVA-1.5's code does not support."""
        if config.projector_type == "mlp_downsample" or config.s2_scales:
            field, value = ("s2_scales", config.s2_scales) if config.s2_scales else ("projector_type", "mlp_downsample")
            raise LayoutError("not supported by llava-v1", field=field, value=value, hint="use vila-v15 or native")
        if config.vision_config.model_type != "clip_vision_model":
            raise LayoutError(
                "vision tower not supported by llava-v1",
                field="vision_config.model_type",
                value=config.vision_config.model_type,
                expected="clip_vision_model",
            )
        family = FAMILIES.get(config.text_config.model_type)
        if family is None or not family.llava_class:
            raise LayoutError(
                "LLM not supported by llava-v1", field="text_config.model_type", value=config.text_config.model_type
            )

    def write_files(self, model: Any, processor: Any, part: Path, storage: WeightStorage) -> None:
        """Write in this layout. A published tower is named in the config; another one gets its own directory."""
        config = storage.config(model)
        state = storage.state_dict(model)
        # LLaVA-1.5's code does not tie the LM head.
        state["language_model.lm_head.weight"] = model.get_output_embeddings().weight.detach()
        state = storage.cast(state)
        source = config.vision_source
        if not source:
            source = _TOWER
            write_tower(model, processor.spec, part / _TOWER, storage)
            state = {name: t for name, t in state.items() if not name.startswith("vision_tower.")}
        storage.save({to_layout_name(name, PREFIXES): tensor for name, tensor in state.items()}, part)
        write_json(part / "config.json", _config(config, processor, source), indent=2)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(part)
        write_tokenizer(processor.tokenizer, part, processor.template)


def _load_tokenizer(folder: Path, added: list[str]) -> Any:
    tokenizer = read_tokenizer(folder)
    if added:
        tokenizer.add_tokens(added, special_tokens=True)
    return tokenizer


def read_settings(folder: Path, fields: Fields) -> dict[str, Any]:
    """Read the settings that LLaVA-1.5 and VILA-1.5 have in common, as arguments of `build_config`."""
    return {
        "select_layer": fields.integer("mm_vision_select_layer", -2, minimum=-MAX_LAYERS, maximum=MAX_LAYERS),
        "select_feature": fields.text("mm_vision_select_feature", "patch"),
        "image_mode": read_image_mode(fields),
        "template": fields.text("conversation_template", "") or known_template(folder),
        "exif_orientation": fields.flag("exif_orientation", True),
    }


def _llm_and_projector(folder: Path, base: Path | None, fields: Fields, llm: Any) -> tuple[dict[str, TensorRef], Path]:
    """Return the weights by published names, and the directory of the tokenizer.

    An adapter that changes only embeddings or LM head unties them in `llm`, the LLM's config.
    """
    adapter = (folder / "adapter_config.json").is_file()
    projector = folder / "mm_projector.bin"
    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    if not (adapter or (projector.is_file() and not has_weights)):
        return list_tensors(find_weight_files(folder)), folder
    if base is None:
        named = fields.text("_name_or_path", "")
        hint = f" (the config names {named!r})" if named else ""
        kind = "a LoRA directory without its base" if adapter else "a stage-1 directory: a projector without its LLM"
        raise LayoutError(kind, file=folder, hint=f"pass the directory of the base LLM as base= or --model-base{hint}")
    refs = list_tensors(find_weight_files(base))
    extra = folder / "non_lora_trainables.bin" if adapter else projector
    if extra.is_file():
        refs.update(_stripped(list_tensors([open_weight_file(extra)])))
    if adapter:
        refs, tied = read_adapter(folder, refs, _TIED if llm.tie_word_embeddings else None)
        llm.tie_word_embeddings = tied
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))
    return refs, folder if has_tokenizer else base


def _stripped(refs: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """Return the weights next to an adapter by their names in a whole checkpoint, as the released code does.

    `base_model.` is removed from each name; if a name then begins with `model.model.`, one `model.` is removed from
    every name: `base_model.model.lm_head.weight` becomes `lm_head.weight`.
    """
    names = {name: name.removeprefix("base_model.") for name in refs}
    if any(name.startswith("model.model.") for name in names.values()):
        names = {name: short.removeprefix("model.") for name, short in names.items()}
    return {names[name]: ref for name, ref in refs.items()}


def _find_tower(folder: Path, fields: Fields) -> Path:
    source = fields.text("mm_vision_tower")
    try:
        return find_folder(source, folder)
    except LayoutError as error:
        problem = f"no directory in or next to the checkpoint or below {Path.cwd()}, and not on the hub ({error})"
        hint = "put the vision tower there, or change the config"
        raise fields.refusal("mm_vision_tower", problem, hint=hint) from error


def vila_settings(config: Any, processor: Any) -> dict[str, Any]:
    """Return our own settings in config.json of a published layout, where they differ from the defaults."""
    settings: dict[str, Any] = {"conversation_template": config.template} if config.template else {}
    if not processor.spec.exif_orientation:
        settings["exif_orientation"] = False
    return settings


def _config(config: Any, processor: Any, source: str) -> dict[str, Any]:
    family = find_family(config.text_config.model_type)
    llm = config.text_config.to_dict()
    rope = llm.pop("rope_parameters", None) or {}
    out = {
        **llm,
        "architectures": [family.llava_class],
        "model_type": family.llava_model_types[0],
        **legacy_rope_settings(rope),
        "torch_dtype": str(config.dtype).removeprefix("torch."),
        "mm_vision_tower": source,
        "mm_projector_type": config.projector_type,
        "mm_hidden_size": config.vision_width,
        "mm_vision_select_layer": config.select_layer,
        "mm_vision_select_feature": config.select_feature,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": processor.spec.image_mode,
        "tokenizer_model_max_length": config.context_length,
        "tokenizer_padding_side": "right",
    }
    out.pop("dtype", None)
    return {**out, **vila_settings(config, processor)}


def legacy_rope_settings(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary position settings under the keys of transformers 4."""
    kind = rope.get("rope_type", "default")
    scaling = {"type": kind, **{k: v for k, v in rope.items() if k not in ("rope_type", "rope_theta")}}
    return {"rope_theta": rope.get("rope_theta", 10000.0), "rope_scaling": None if kind == "default" else scaling}


LAYOUT = LlavaV1Layout()
