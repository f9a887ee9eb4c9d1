"""VILA-1.5 layout: three directories, `llm/`, `vision_tower/` and `mm_projector/`, below one config.json."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from vila.core.errors import LayoutError
from vila.core.files import write_json
from vila.core.reading import Fields
from vila.core.vision_spec import MAX_SIDE, MAX_VIDEO_FRAMES
from vila.model.hub import find_folder
from vila.model.layouts.base import CheckpointFiles, FullPrecisionLayout, Sources, WeightStorage, map_names
from vila.model.layouts.build_config import build_settings
from vila.model.layouts.config_file import read_config, read_generation_config, text_config
from vila.model.layouts.llava_v1 import FIELDS, legacy_rope_settings, read_settings, vila_settings
from vila.model.layouts.tokenizer_files import read_tokenizer, write_tokenizer
from vila.model.layouts.tower_files import read_tower, tower_tensors, write_tower
from vila.model.vision_sizes import check_projector
from vila.model.weights import find_weight_files, list_tensors

PART_FOLDERS = {"llm": "llm_cfg", "vision_tower": "vision_tower_cfg", "mm_projector": "mm_projector_cfg"}
_TOWERS = ("clip_vision_model", "siglip_vision_model", "internvl_vision")
_SCALES = re.compile(r"[1-9]\d{0,4}(, *[1-9]\d{0,4})*")


class VilaV15Layout(FullPrecisionLayout):
    """Three directories; the config's `*_cfg` keys locate them."""

    name = "vila-v15"

    def matches(self, folder: Path) -> bool:
        """Return whether config.json has a separate LLM config."""
        return "llm_cfg" in read_config(folder)

    def open(self, folder: Path, base: Path | None = None) -> CheckpointFiles:
        """Read the configs of the three directories."""
        fields = read_config(folder)
        llm_folder, tower_folder, projector_folder = (
            _part(folder, fields, part, key) for part, key in PART_FOLDERS.items()
        )
        if fields.integer("vision_resolution", -1, minimum=-1) != -1:
            raise fields.refusal("vision_resolution", "interpolated position embeddings are not supported")
        llm_fields = read_config(llm_folder)
        llm = text_config(llm_fields, llm_fields.text("model_type", "llama"))
        tower = read_tower(tower_folder)
        refs, unexpected = map_names(list_tensors(find_weight_files(llm_folder)), (("", "language_model."),))
        found, unexpected_tower = tower_tensors(tower_folder, tower)
        refs.update(found)
        projector_fields = read_config(projector_folder)
        projector = projector_fields.text("mm_projector_type", "linear")
        with projector_fields.naming(FIELDS):
            check_projector(projector)
        if projector != "identity":
            own, unexpected_projector = map_names(
                list_tensors(find_weight_files(projector_folder)), (("layers.", "projector."),)
            )
            refs.update(own)
            unexpected += unexpected_projector
        scales, max_split = _scales(fields)
        with fields.naming(FIELDS):
            settings, processor = build_settings(
                llm=llm,
                tower=tower,
                tokenizer_folder=llm_folder,
                load_tokenizer=partial(read_tokenizer, llm_folder),
                projector=projector,
                s2_scales=scales,
                s2_max_split=max_split,
                num_video_frames=fields.integer("num_video_frames", 8, minimum=1, maximum=MAX_VIDEO_FRAMES),
                **read_settings(folder, fields),
            )
        sources = Sources(fields, llm_fields, tower.source, FIELDS)
        unexpected += unexpected_tower
        generation = read_generation_config(llm_folder)
        return CheckpointFiles(folder, settings, processor, refs, sources, unexpected, generation)

    def check_writable(self, config: Any, processor: Any) -> None:
        """Raise LayoutError for a tower that VILA-1.5's code does not support."""
        kind = config.vision_config.model_type
        if kind not in _TOWERS:
            problem, field = "vision tower not supported by vila-v15", "vision_config.model_type"
            raise LayoutError(problem, field=field, value=kind, expected=", ".join(_TOWERS))

    def write_files(self, model: Any, processor: Any, part: Path, storage: WeightStorage) -> None:
        """Write the three directories, the LLM's weights with the given storage."""
        config = storage.config(model)
        write_tower(model, processor.spec, part / "vision_tower", storage)
        _write_llm(model, processor, part / "llm", config)
        storage.save(storage.cast(storage.state_dict(model.language_model)), part / "llm")
        _write_projector(model, part / "mm_projector", storage)
        configs = {key: dict(read_config(part / name)) for name, key in PART_FOLDERS.items()}
        write_json(part / "config.json", {**vila_v15_config(config, processor), **configs}, indent=2)


def _scales(fields: Fields) -> tuple[list[int], int]:
    """Read S2 image sizes such as `336,672,1008` and the maximum tile size, in pixels; ([], 0) without S2."""
    if not fields.flag("s2", False):
        return [], 0
    text = fields.text("s2_scales")
    if not _SCALES.fullmatch(text):
        raise fields.refusal("s2_scales", expected="sides in pixels, such as 336,672,1008")
    return list(map(int, text.split(","))), fields.integer("s2_max_split_size", minimum=1, maximum=MAX_SIDE)


def _part(folder: Path, fields: Fields, part: str, key: str) -> Path:
    """Return the directory of one part: inside the checkpoint, or where the config refers to."""
    if (folder / part / "config.json").is_file():
        return folder / part
    source = fields.get(key) or (fields.get("mm_vision_tower") if part == "vision_tower" else None)
    if isinstance(source, str):
        return find_folder(source, folder)
    raise LayoutError(f"no directory {part}/ with a config.json", file=folder, hint="download the checkpoint again")


def _write_llm(model: Any, processor: Any, folder: Path, config: Any) -> None:
    folder.mkdir()
    llm_config = config.text_config.to_dict()
    llm_config.pop("dtype", None)
    llm_config["torch_dtype"] = str(config.dtype).removeprefix("torch.")
    llm_config["architectures"] = [type(model.language_model).__name__]
    rope = llm_config.get("rope_parameters") or {}
    llm_config.update(legacy_rope_settings(rope))
    write_json(folder / "config.json", llm_config, indent=2)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    write_tokenizer(processor.tokenizer, folder, processor.template)


def _write_projector(model: Any, folder: Path, storage: WeightStorage) -> None:
    from vila.model.save_weights import write_weights

    folder.mkdir()
    projector_config = {
        "architectures": ["MultimodalProjector"],
        "mm_projector_type": model.config.projector_type,
        "model_type": "v2l_projector",
    }
    write_json(folder / "config.json", projector_config, indent=2)
    weights = {f"layers.{name}": tensor.detach() for name, tensor in model.projector.state_dict().items()}
    write_weights(storage.cast(weights), folder)


def vila_v15_config(config: Any, processor: Any) -> dict[str, Any]:
    """Return config.json of the whole model, without the configs of its parts."""
    out = {
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        "hidden_size": config.text_config.hidden_size,
        "image_aspect_ratio": processor.spec.image_mode,
        "interpolate_mode": "linear",
        "mm_hidden_size": config.vision_width,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": config.select_feature,
        "mm_vision_select_layer": config.select_layer,
        "model_dtype": str(config.dtype),
        "num_video_frames": processor.spec.num_video_frames,
        "s2": bool(config.s2_scales),
        "s2_scales": ",".join(map(str, config.s2_scales)),
        "s2_max_split_size": config.s2_max_split,
        "vision_resolution": -1,
    }
    return {**out, **vila_settings(config, processor)}


LAYOUT = VilaV15Layout()
