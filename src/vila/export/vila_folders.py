"""VILA-1.5's three folders as a stream, the LLM in ModelOpt's INT4 if asked."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from vila import __version__
from vila.core.files import write_json
from vila.core.reading import read_json
from vila.export.modelopt import QUANT_CONFIG, declare_linear, hub_quantization, quant_config, write_linear
from vila.export.source import LLM, Source
from vila.export.stream import SafetensorsWriter
from vila.model.layouts import vila_v15, vision_folder
from vila.model.layouts.published import write_tokenizer
from vila.model.safetensors_file import Declared

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_UNFUSED = ("o_proj", "down_proj")
IGNORE = ("lm_head", "*vision_tower*", "*mm_projector*")


def write_folders(source: Source, part: Path, group_size: int | None) -> None:
    """config.json, llm/, vision_tower/ and mm_projector/; group_size None keeps 16 bits throughout."""
    _write_llm(source, part / "llm", group_size)
    _write_tower(source, part / "vision_tower")
    _write_projector(source, part / "mm_projector")
    config = copy.deepcopy(source.config)
    config.dtype = source.half
    facts = vila_v15.config_facts(config, source.processor)
    for name, key in vila_v15._PARTS.items():
        # The program takes the folder's name from here.
        facts[key] = {**read_json(part / name / "config.json"), "_name_or_path": name}
    # Without this word the program draws a random projector.
    facts["resume_path"] = "."
    if group_size is not None:
        facts["quantization_config"] = hub_quantization(group_size, IGNORE)
        write_json(part / QUANT_CONFIG, quant_config(group_size, IGNORE), indent=2)
    write_json(part / "config.json", facts, indent=2)


def _write_llm(source: Source, folder: Path, group_size: int | None) -> None:
    folder.mkdir()
    llm = source.config.text_config
    facts = llm.to_dict()
    facts.pop("dtype", None)
    facts |= vila_v15.old_rope(facts.get("rope_parameters") or {})
    facts |= {"torch_dtype": _name(source.half), "architectures": [_ARCHITECTURES[llm.model_type]]}
    facts["model_max_length"] = source.config.context_length
    if group_size is not None:
        facts["quantization_config"] = hub_quantization(group_size, IGNORE)
        write_json(folder / QUANT_CONFIG, quant_config(group_size, IGNORE), indent=2)
    write_json(folder / "config.json", facts, indent=2)
    GenerationConfig.from_dict(dict(source.checkpoint.generation)).save_pretrained(folder)
    write_tokenizer(source.processor.tokenizer, folder, source.processor.template)
    _write_llm_weights(source, folder, group_size)


def _write_llm_weights(source: Source, folder: Path, group_size: int | None) -> None:
    linears = set() if group_size is None else {f"{name}.weight" for name in source.block_linears()}
    names = [name for name in source.names if name.startswith(LLM) and not _is_tied_head(source, name)]
    declared: dict[str, Any] = {}
    for name in names:
        theirs = name.removeprefix(LLM)
        if name in linears and group_size is not None:
            stem = theirs.removesuffix(".weight")
            declared |= declare_linear(stem, source.shape(name), group_size, source.half, _needs_scale(stem))
        else:
            declared[theirs] = (source.shape(name), source.half)
    with SafetensorsWriter(folder, declared) as writer:
        for name in names:
            theirs = name.removeprefix(LLM)
            if name in linears and group_size is not None:
                stem = theirs.removesuffix(".weight")
                write_linear(writer, stem, source, name, group_size, _needs_scale(stem))
            else:
                _copy(writer, source, {name: theirs})


def _needs_scale(stem: str) -> bool:
    return stem.endswith(_UNFUSED)


def _is_tied_head(source: Source, name: str) -> bool:
    return source.is_tied and name == f"{LLM}lm_head.weight"


def _write_tower(source: Source, folder: Path) -> None:
    folder.mkdir()
    config = source.config.vision_config
    facts = {**config.to_dict(), "architectures": [vision_folder._ARCHITECTURES[config.model_type]]}
    facts.pop("dtype", None)
    write_json(folder / "config.json", {**facts, "torch_dtype": _name(source.half)}, indent=2)
    preprocessor = vision_folder.preprocessor_facts(config.model_type, source.processor.spec)
    write_json(folder / "preprocessor_config.json", preprocessor, indent=2)
    names = dict(_renamed(source, "vision_tower.", "vision_model."))
    with SafetensorsWriter(folder, _plain(source, names)) as writer:
        _copy(writer, source, names)


def _write_projector(source: Source, folder: Path) -> None:
    folder.mkdir()
    facts = {
        "architectures": ["MultimodalProjector"],
        "mm_projector_type": source.config.projector_type,
        "model_type": "v2l_projector",
        "producer": f"vila {__version__}",
    }
    write_json(folder / "config.json", facts, indent=2)
    names = dict(_renamed(source, "projector.", "layers."))
    with SafetensorsWriter(folder, _plain(source, names)) as writer:
        _copy(writer, source, names)


def _renamed(source: Source, ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    for name in source.pieces:
        if name.startswith(ours):
            yield name, theirs + name.removeprefix(ours)


def _plain(source: Source, names: dict[str, str]) -> Declared:
    return {theirs: (source.shape(name), source.half) for name, theirs in names.items()}


def _copy(writer: SafetensorsWriter, source: Source, names: dict[str, str]) -> None:
    for name, theirs in names.items():
        for rows in source.rows(name, source.half):
            writer.append(theirs, rows)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
