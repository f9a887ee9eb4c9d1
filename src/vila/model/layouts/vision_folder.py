"""Writing a vision tower as a directory of its own, the way its publisher does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vila.core.errors import LayoutError
from vila.core.files import write_json
from vila.core.vision_spec import VisionSpec
from vila.model.layouts.storage import FULL, Storage
from vila.model.layouts.towers import to_intern_vit, to_intern_vit_weights
from vila.model.weights import state_of
from vila.model.written import write_weights

_ARCHITECTURES = {"clip_vision_model": "CLIPVisionModel", "siglip_vision_model": "SiglipVisionModel"}


def write_tower(model: Any, spec: VisionSpec, folder: Path, storage: Storage = FULL) -> None:
    """config.json, preprocessor_config.json and weights of the model's tower, into a new directory `folder`.

    They are safetensors whatever `storage` says, which gives the type of the numbers.
    """
    config = model.config.vision_config
    weights = state_of(model.vision_tower)
    if config.model_type == "internvl_vision":
        facts, weights = to_intern_vit(config), to_intern_vit_weights(weights)
    elif config.model_type in _ARCHITECTURES:
        facts = {**config.to_dict(), "architectures": [_ARCHITECTURES[config.model_type]]}
        facts.pop("dtype", None)
        weights = {f"vision_model.{name}": tensor for name, tensor in weights.items()}
    else:
        raise LayoutError(f"a {config.model_type} tower has no published folder form; use the native layout")
    stored = storage.stored(weights)
    dtype = str(next(iter(stored.values())).dtype).removeprefix("torch.")
    folder.mkdir()
    write_json(folder / "config.json", {**facts, "torch_dtype": dtype}, indent=2)
    write_json(folder / "preprocessor_config.json", preprocessor_facts(config.model_type, spec), indent=2)
    write_weights(stored, folder)


def preprocessor_facts(kind: str, spec: VisionSpec) -> dict[str, Any]:
    """What preprocessor_config.json holds for a kind of tower."""
    size = spec.image_size
    square = {"height": size, "width": size}
    shared = pixel_facts(spec)
    if kind == "siglip_vision_model":
        return {**shared, "image_processor_type": "SiglipImageProcessor", "size": square}
    return {
        **shared,
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": True,
        "crop_size": square,
        "size": {"shortest_edge": size},
    }


def pixel_facts(spec: VisionSpec) -> dict[str, Any]:
    """What every image processor says of values and resampling."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
