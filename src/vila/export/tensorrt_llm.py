"""A directory for TensorRT-LLM 1.x's PyTorch backend: VILA's three folders, the LLM in ModelOpt's INT4 or in 16 bits.

Its loader for VILA reads `llm/`, `vision_tower/` and `mm_projector/`; stock LLaVA directories it does not know.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from vila import __version__
from vila.core.files import write_json
from vila.core.reading import read_json
from vila.export.base import ExportOptions, Guide
from vila.export.source import LLM, SafetensorsWriter, Source
from vila.kernels.packings import pack_modelopt
from vila.model.layouts import llava_v1, tower_files, vila_v15
from vila.model.layouts.tokenizer_files import write_tokenizer
from vila.model.save_weights import TensorSpecs

GROUPS = (64, 128)
"""Group sizes of its INT4 products."""
TOWERS = ("clip_vision_model", "siglip_vision_model")
_PRECISIONS = {
    "int4": "symmetric 4-bit weights in groups (W4A16_AWQ), 16 bits elsewhere",
    "16-bit": "bfloat16 of a bfloat16 model, float16 of any other",
}


class TensorRtLlmTarget:
    """config.json, hf_quant_config.json and three folders."""

    name = "tensorrt-llm"
    summary = "VILA's three folders for TensorRT-LLM 1.x, INT4 as ModelOpt writes it"
    precisions = _PRECISIONS
    takes = frozenset({"load_awq", "group_size"})
    holds_llm = True
    verified = "bit by bit with an independent reader; TensorRT-LLM was not run"

    def refusals(self, source: Source, options: ExportOptions) -> list[str]:
        """Towers and projectors that its VILA does not have, and groups that do not fit."""
        from vila.export.base import int4_refusals, no_group_refusals

        config, out = source.config, []
        if config.vision_config.model_type not in TOWERS:
            out.append(
                f"a {config.vision_config.model_type} tower: its VILA has CLIP and SigLIP; "
                "--format tensorrt-llm-legacy takes the LLM alone"
            )
        if not re.fullmatch(r"linear|mlp_downsample|mlp\d+x_gelu", config.projector_type):
            out.append(
                f"the projector {config.projector_type}: its VILA has linear, mlp_downsample and mlpNx_gelu; "
                "--format tensorrt-llm-legacy takes the LLM alone"
            )
        if options.precision == "int4":
            out += int4_refusals(source, options, symmetric=True, outputs=2, groups=GROUPS)
        else:
            out += no_group_refusals(options)
        return out

    def write(self, source: Source, part: Path, options: ExportOptions) -> None:
        """The three folders, weight by weight."""
        from vila.export.base import group_of

        write_folders(source, part, group_of(source, options) if options.precision == "int4" else None)

    def guide(self, source: Source, options: ExportOptions) -> Guide:
        """How it is served, and what that program does otherwise than VILA."""
        return Guide(
            commands=(
                ("Serve it", "trtllm-serve {out} --backend pytorch"),
                ("Serve the LLM alone", "trtllm-serve {out}/llm --backend pytorch"),
            ),
            versions=("TensorRT-LLM 1.x, PyTorch backend: made for it, not run",),
            defects=(
                "TensorRT-LLM chooses the conversation template by the directory's name (`vila1.5-3b` and the like, "
                "in any case); under other names it uses the tokenizer's chat template, which is the model's own here.",
                "It puts a line feed after every picture, which VILA-1.0 and models trained without one never saw.",
                "Its INT4 loader asks for a `pre_quant_scale` on o_proj and down_proj; all scales are folded, so these "
                "are ones.",
            ),
            notes=(
                "Weights are rounded to symmetric INT4 in a pass of their own: an asymmetric AWQ result cannot be "
                "stored in this form.",
                "Group sizes are 64 or 128.",
            )
            if options.precision == "int4"
            else (),
        )


TARGET = TensorRtLlmTarget()


# --- modelopt
# INT4 as NVIDIA's ModelOpt writes it into a Hugging Face directory: the tensors of a Linear, and the two configs.


# N outputs  K inputs  G inputs of a group

QUANT_CONFIG = "hf_quant_config.json"
_PRODUCER = {"name": "modelopt", "version": f"vila {__version__}"}
"""Loaders know the form of the files by this name."""


def quant_config(group_size: int, ignore: Sequence[str]) -> dict[str, Any]:
    """hf_quant_config.json."""
    quantization = {
        "quant_algo": "W4A16_AWQ",
        "kv_cache_quant_algo": None,
        "group_size": group_size,
        "has_zero_point": False,
        "pre_quant_scale": True,
        "exclude_modules": list(ignore),
    }
    return {"producer": _PRODUCER, "quantization": quantization}


def hub_quantization(group_size: int, ignore: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    return {
        "quant_method": "modelopt",
        "quant_algo": "W4A16_AWQ",
        "group_size": group_size,
        "ignore": list(ignore),
        "producer": _PRODUCER,
    }


def declare_linear(
    stem: str, shape: tuple[int, ...], group_size: int, dtype: torch.dtype, with_scale: bool
) -> TensorSpecs:
    """Shapes and types of a Linear's tensors.

    weight uint8 [N/2, K], weight_scale [N, K/G] and, `with_scale`, pre_quant_scale [K] for the activation.
    """
    outputs, inputs = shape
    out = {
        f"{stem}.weight": ((outputs // 2, inputs), torch.uint8),
        f"{stem}.weight_scale": ((outputs, inputs // group_size), dtype),
    }
    return out | {f"{stem}.pre_quant_scale": ((inputs,), dtype)} if with_scale else out


def write_linear(
    writer: SafetensorsWriter, stem: str, source: Source, name: str, group_size: int, with_scale: bool
) -> None:
    """Round the weight `name` and write it. Its AWQ scale is folded already, so that of the activation is 1."""
    for weight in source.int4_rows(name, group_size, symmetric=True, scale_dtype=source.half):
        packed = pack_modelopt(weight)
        writer.append(f"{stem}.weight", packed["weight"])
        writer.append(f"{stem}.weight_scale", packed["weight_scale"])
    if with_scale:
        writer.append(f"{stem}.pre_quant_scale", torch.ones(source.shape(name)[1], dtype=source.half))


# --- vila_folders
# VILA-1.5's three folders as a stream, the LLM in ModelOpt's INT4 if asked.


_UNFUSED = ("o_proj", "down_proj")
IGNORE = ("lm_head", "*vision_tower*", "*mm_projector*")


def write_folders(source: Source, part: Path, group_size: int | None) -> None:
    """config.json, llm/, vision_tower/ and mm_projector/; group_size None keeps 16 bits throughout."""
    _write_llm(source, part / "llm", group_size)
    _write_tower(source, part / "vision_tower")
    _write_projector(source, part / "mm_projector")
    config = copy.deepcopy(source.config)
    config.dtype = source.half
    facts = vila_v15.vila_v15_config(config, source.processor)
    for name, key in vila_v15.PART_FOLDERS.items():
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
    facts |= llava_v1.legacy_rope_settings(facts.get("rope_parameters") or {})
    facts |= {"torch_dtype": _name(source.half), "architectures": [source.family.causal_lm]}
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
    facts = {**config.to_dict(), "architectures": [tower_files._ARCHITECTURES[config.model_type]]}
    facts.pop("dtype", None)
    write_json(folder / "config.json", {**facts, "torch_dtype": _name(source.half)}, indent=2)
    preprocessor = tower_files.preprocessor_config(config.model_type, source.processor.spec)
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


def _plain(source: Source, names: dict[str, str]) -> TensorSpecs:
    return {theirs: (source.shape(name), source.half) for name, theirs in names.items()}


def _copy(writer: SafetensorsWriter, source: Source, names: dict[str, str]) -> None:
    for name, theirs in names.items():
        for rows in source.rows(name, source.half):
            writer.append(theirs, rows)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
