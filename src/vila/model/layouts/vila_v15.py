"""The layout of VILA-1.5: three folders, `llm/`, `vision_tower/` and `mm_projector/`, below one config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vila.core.errors import LayoutError
from vila.core.files import atomic_path, write_json
from vila.model.hub import local_folder
from vila.model.layouts.names import claim
from vila.model.layouts.protocol import Checkpoint
from vila.model.layouts.published import (
    compose,
    generation_facts,
    own_facts,
    read_config,
    read_tokenizer,
    template_of,
    text_config,
    write_tokenizer,
)
from vila.model.layouts.storage import FULL, Storage
from vila.model.layouts.towers import OTHER_HALF, TowerFacts, image_mode_of, intern_vit_pieces, read_tower
from vila.model.layouts.vision_folder import write_tower
from vila.model.weights import Piece, find_files, pieces_of
from vila.model.written import write_weights

_PARTS = {"llm": "llm_cfg", "vision_tower": "vision_tower_cfg", "mm_projector": "mm_projector_cfg"}
_TOWERS = ("clip_vision_model", "siglip_vision_model", "internvl_vision")


class VilaV15Layout:
    """Three folders; the config's `*_cfg` keys say where they are."""

    name = "vila-v15"

    def recognises(self, folder: Path) -> bool:
        """Whether config.json says that the LLM is a part of its own."""
        return "llm_cfg" in read_config(folder)

    def open(self, folder: Path, base: Path | None = None) -> Checkpoint:
        """Understand the three folders."""
        facts = read_config(folder)
        llm_folder, tower_folder, projector_folder = (_part(folder, facts, part, key) for part, key in _PARTS.items())
        _refuse_resolution(folder, facts)
        llm_facts = read_config(llm_folder)
        llm = text_config(llm_facts.get("model_type", "llama"), llm_facts, llm_folder)
        tower = read_tower(tower_folder)
        pieces, unclaimed = claim(pieces_of(find_files(llm_folder)), (("", "language_model."),))
        found, lost = _tower_pieces(tower_folder, tower)
        pieces.update({f"vision_tower.{name}": piece for name, piece in found.items()})
        projector = read_config(projector_folder).get("mm_projector_type") or "linear"
        if projector != "identity":
            mine, wild = claim(pieces_of(find_files(projector_folder)), (("layers.", "projector."),))
            pieces.update(mine)
            lost += wild
        config, processor = compose(
            llm=llm,
            tower=tower,
            tokenizer=read_tokenizer(llm_folder),
            projector=projector,
            select_layer=facts.get("mm_vision_select_layer", -2),
            select_feature=facts.get("mm_vision_select_feature") or "patch",
            image_mode=image_mode_of(facts.get("image_aspect_ratio")),
            template=facts.get("conversation_template") or template_of(folder),
            s2_scales=[int(scale) for scale in str(facts["s2_scales"]).split(",")] if facts.get("s2") else (),
            s2_max_split=int(facts.get("s2_max_split_size") or 0) if facts.get("s2") else 0,
            num_video_frames=int(facts.get("num_video_frames") or 8),
            exif_orientation=facts.get("exif_orientation") is not False,
        )
        return Checkpoint(folder, config, processor, pieces, [*unclaimed, *lost], generation_facts(llm_folder))

    def check(self, model: Any, processor: Any) -> None:
        """Raise LayoutError as `refuse_to_write`, and for a model in 4 bits."""
        refuse_to_write(model.config)
        FULL.check(model)

    def write(self, model: Any, processor: Any, folder: Path) -> None:
        """Write the three folders."""
        write_folders(model, processor, folder, FULL)


def refuse_to_write(config: Any) -> None:
    """Raise LayoutError for a tower that VILA-1.5's code does not build."""
    kind = config.vision_config.model_type
    if kind not in _TOWERS:
        raise LayoutError(f"a {kind} tower cannot be written as vila-v15: its code builds CLIP, SigLIP, InternViT")


def write_folders(model: Any, processor: Any, folder: Path, storage: Storage) -> None:
    """Write the three folders, the LLM's weights in `storage`. Raises LayoutError as `refuse_to_write`."""
    refuse_to_write(model.config)
    config = storage.config(model)
    weights = storage.stored(storage.state(model.language_model))
    with atomic_path(folder) as part:
        part.mkdir()
        write_tower(model, processor.spec, part / "vision_tower", storage)
        _write_llm(model, processor, part / "llm", config)
        storage.save(weights, part / "llm")
        _write_projector(model, part / "mm_projector", storage)
        configs = {key: read_config(part / name) for name, key in _PARTS.items()}
        write_json(part / "config.json", {**config_facts(config, processor), **configs}, indent=2)


def _part(folder: Path, facts: Mapping[str, Any], part: str, key: str) -> Path:
    """The folder of one part: inside the checkpoint, or where a string in the config points."""
    if (folder / part / "config.json").is_file():
        return folder / part
    source = facts.get(key) or (facts.get("mm_vision_tower") if part == "vision_tower" else None)
    if isinstance(source, str):
        for place in (folder / source, folder.parent / source, Path(source)):
            if (place / "config.json").is_file():
                return place
        return local_folder(source)
    raise LayoutError(f"{folder}: no folder {part}/ with a config.json; fetch the checkpoint again")


def _refuse_resolution(folder: Path, facts: Mapping[str, Any]) -> None:
    if facts.get("vision_resolution", -1) not in (-1, None):
        raise LayoutError(
            f"{folder}: vision_resolution={facts['vision_resolution']} stretches the tower's positions, which no "
            "published checkpoint does and which is not supported"
        )


def _tower_pieces(folder: Path, tower: TowerFacts) -> tuple[dict[str, Piece], list[str]]:
    pieces = pieces_of(find_files(folder))
    if tower.config.model_type == "internvl_vision":
        return intern_vit_pieces(pieces)
    return claim(pieces, tower.prefixes, ignore=OTHER_HALF)


def _write_llm(model: Any, processor: Any, folder: Path, config: Any) -> None:
    folder.mkdir()
    facts = config.text_config.to_dict()
    facts.pop("dtype", None)
    facts["torch_dtype"] = str(config.dtype).removeprefix("torch.")
    facts["architectures"] = [type(model.language_model).__name__]
    rope = facts.get("rope_parameters") or {}
    facts.update(old_rope(rope))
    write_json(folder / "config.json", facts, indent=2)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    write_tokenizer(processor.tokenizer, folder, processor.template)


def old_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The keys by which transformers 4 knew rotary positions, beside the new one."""
    kind = rope.get("rope_type", "default")
    stretched = {"type": kind, **{k: v for k, v in rope.items() if k not in ("rope_type", "rope_theta")}}
    return {"rope_theta": rope.get("rope_theta", 10000.0), "rope_scaling": None if kind == "default" else stretched}


def _write_projector(model: Any, folder: Path, storage: Storage) -> None:
    folder.mkdir()
    facts = {
        "architectures": ["MultimodalProjector"],
        "mm_projector_type": model.config.projector_type,
        "model_type": "v2l_projector",
    }
    write_json(folder / "config.json", facts, indent=2)
    weights = {f"layers.{name}": tensor.detach() for name, tensor in model.projector.state_dict().items()}
    write_weights(storage.stored(weights), folder)


def config_facts(config: Any, processor: Any) -> dict[str, Any]:
    """What the config.json of the whole model holds, without those of its parts."""
    facts = {
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
    return {**facts, **own_facts(config, processor)}


LAYOUT = VilaV15Layout()
