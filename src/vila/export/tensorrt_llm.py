"""Export `tensorrt-llm`: VILA-1.5's three folders for the PyTorch backend of TensorRT-LLM 1.x.

Its VILA loader reads `llm/`, `vision_tower/` and `mm_projector/`, not transformers' LLaVA directories. The LLM is in
ModelOpt's INT4 or in 16 bits.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from vila import __version__
from vila.core.files import write_json
from vila.core.reading import read_json
from vila.export.base import ExportOptions, ExportTarget, Readme, choose_group_size, group_size_problems, int4_problems
from vila.export.source import LLM, ExportSource, StreamedTensors, write_tensors
from vila.kernels.packings import pack_modelopt
from vila.model.layouts import llava_v1, tower_files, vila_v15
from vila.model.layouts.tokenizer_files import write_tokenizer

GROUPS = (64, 128)
"""Group sizes of its INT4 kernels."""
TOWERS = ("clip_vision_model", "siglip_vision_model")


def _problems(source: ExportSource, options: ExportOptions) -> list[str]:
    config, out = source.config, []
    if config.vision_config.model_type not in TOWERS:
        out.append(
            f"vision tower {config.vision_config.model_type} is not supported; supported: CLIP and SigLIP "
            "(for the LLM alone: --format tensorrt-llm-legacy)"
        )
    if not re.fullmatch(r"linear|mlp_downsample|mlp\d+x_gelu", config.projector_type):
        out.append(
            f"projector {config.projector_type} is not supported; supported: linear, mlp_downsample and mlpNx_gelu "
            "(for the LLM alone: --format tensorrt-llm-legacy)"
        )
    if options.precision == "int4":
        out += int4_problems(source, options, symmetric=True, outputs=2, groups=GROUPS)
    else:
        out += group_size_problems(options)
    return out


def _write(source: ExportSource, part: Path, options: ExportOptions) -> None:
    group_size = choose_group_size(source, options) if options.precision == "int4" else None
    _write_llm(source, part / "llm", group_size)
    _write_tower(source, part / "vision_tower")
    _write_projector(source, part / "mm_projector")
    config = copy.deepcopy(source.config)
    config.dtype = source.half_dtype
    facts = vila_v15.vila_v15_config(config, source.processor)
    for name, key in vila_v15.PART_FOLDERS.items():
        # TensorRT-LLM takes the folder's name from this key.
        facts[key] = {**read_json(part / name / "config.json"), "_name_or_path": name}
    # Without this key TensorRT-LLM initialises the projector randomly.
    facts["resume_path"] = "."
    if group_size is not None:
        facts["quantization_config"] = quantization_config(group_size, IGNORE)
        write_json(part / QUANT_CONFIG, quant_config(group_size, IGNORE), indent=2)
    write_json(part / "config.json", facts, indent=2)


def _readme(source: ExportSource, options: ExportOptions) -> Readme:
    return Readme(
        commands=(
            ("Serve the model", "trtllm-serve {out} --backend pytorch"),
            ("Serve the LLM alone", "trtllm-serve {out}/llm --backend pytorch"),
        ),
        versions=("TensorRT-LLM 1.x, PyTorch backend: not tested",),
        defects=(
            "TensorRT-LLM selects the chat template by the directory name (`vila1.5-3b` and similar names). With "
            "other names it uses the chat template of the tokenizer, which is the correct one here.",
            "It inserts a newline after every image; VILA-1.0 and some other models were trained without it.",
            "Its INT4 loader requires a `pre_quant_scale` for o_proj and down_proj; all scales are folded into the "
            "weights, so these are ones.",
        ),
        notes=(
            "Weights are quantized to symmetric INT4; this format cannot store an asymmetric AWQ result.",
            "Supported group sizes: 64 and 128.",
        )
        if options.precision == "int4"
        else (),
    )


TARGET = ExportTarget(
    "tensorrt-llm",
    "VILA's three folders for TensorRT-LLM 1.x, INT4 in the format of ModelOpt",
    precisions={
        "int4": "symmetric 4-bit weights with group scales (W4A16_AWQ), 16 bits elsewhere",
        "16-bit": "bfloat16 for a bfloat16 model, else float16",
    },
    verification="bit-exact in an independent reader; not tested in TensorRT-LLM",
    problems=_problems,
    write=_write,
    readme=_readme,
    options=frozenset({"load_awq", "group_size"}),
)


# INT4 in the format of NVIDIA ModelOpt: the tensors of a Linear, and the two configs.

# N outputs  K inputs  G inputs of a group

QUANT_CONFIG = "hf_quant_config.json"
_PRODUCER = {"name": "modelopt", "version": f"vila {__version__}"}
"""Loaders recognise the format by this name."""


def quant_config(group_size: int, ignore: Sequence[str]) -> dict[str, Any]:
    """Return the content of hf_quant_config.json."""
    return {"producer": _PRODUCER, "quantization": w4a16_awq(group_size, ignore)}


def w4a16_awq(group_size: int, ignore: Sequence[str]) -> dict[str, Any]:
    """Return TensorRT-LLM's settings of symmetric INT4 weights. ignore: modules in full precision."""
    return {
        "quant_algo": "W4A16_AWQ",
        "kv_cache_quant_algo": None,
        "group_size": group_size,
        "has_zero_point": False,
        "pre_quant_scale": True,
        "exclude_modules": list(ignore),
    }


def quantization_config(group_size: int, ignore: Sequence[str]) -> dict[str, Any]:
    """Return `quantization_config` of config.json."""
    return {
        "quant_method": "modelopt",
        "quant_algo": "W4A16_AWQ",
        "group_size": group_size,
        "ignore": list(ignore),
        "producer": _PRODUCER,
    }


def _int4_linear(source: ExportSource, name: str, stem: str, group_size: int) -> StreamedTensors:
    """Return the tensors of a Linear, quantized.

    weight uint8 [N/2, K], weight_scale [N, K/G] and, for Linears that do not share their input, pre_quant_scale [K] of
    the activation, which is 1: AWQ scales are folded already.
    """
    outputs, inputs = source.shape(name)
    dtype = source.half_dtype
    specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        f"{stem}.weight": ((outputs // 2, inputs), torch.uint8),
        f"{stem}.weight_scale": ((outputs, inputs // group_size), dtype),
    }
    activation = f"{stem}.pre_quant_scale"
    if with_activation := stem.endswith(_UNFUSED):
        specs[activation] = ((inputs,), dtype)

    def chunks() -> Iterator[dict[str, Tensor]]:
        for weight in source.int4_rows(name, group_size, symmetric=True, scale_dtype=dtype):
            yield {f"{stem}.{leaf}": rows for leaf, rows in pack_modelopt(weight).items()}
        if with_activation:
            yield {activation: torch.ones(inputs, dtype=dtype)}

    return StreamedTensors(specs, chunks)


_UNFUSED = ("o_proj", "down_proj")
IGNORE = ("lm_head", "*vision_tower*", "*mm_projector*")


def _write_llm(source: ExportSource, folder: Path, group_size: int | None) -> None:
    folder.mkdir()
    llm = source.config.text_config
    facts = llm.to_dict()
    facts.pop("dtype", None)
    facts |= llava_v1.legacy_rope_settings(facts.get("rope_parameters") or {})
    facts |= {"torch_dtype": _name(source.half_dtype), "architectures": [source.family.causal_lm]}
    facts["model_max_length"] = source.config.context_length
    if group_size is not None:
        facts["quantization_config"] = quantization_config(group_size, IGNORE)
        write_json(folder / QUANT_CONFIG, quant_config(group_size, IGNORE), indent=2)
    write_json(folder / "config.json", facts, indent=2)
    GenerationConfig.from_dict(dict(source.generation)).save_pretrained(folder)
    write_tokenizer(source.processor.tokenizer, folder, source.processor.template)
    write_tensors(folder, _llm_tensors(source, group_size))


def _llm_tensors(source: ExportSource, group_size: int | None) -> Iterator[StreamedTensors]:
    linears = set() if group_size is None else {f"{name}.weight" for name in source.block_linears()}
    for name in source.names:
        if not name.startswith(LLM) or (source.is_tied and name == f"{LLM}lm_head.weight"):
            continue
        target = name.removeprefix(LLM)
        if group_size is not None and name in linears:
            yield _int4_linear(source, name, target.removesuffix(".weight"), group_size)
        else:
            yield source.copied(name, target, source.half_dtype)


def _write_tower(source: ExportSource, folder: Path) -> None:
    folder.mkdir()
    config = source.config.vision_config
    facts = {**config.to_dict(), "architectures": [tower_files.ARCHITECTURES[config.model_type]]}
    facts.pop("dtype", None)
    write_json(folder / "config.json", {**facts, "torch_dtype": _name(source.half_dtype)}, indent=2)
    preprocessor = tower_files.preprocessor_config(config.model_type, source.processor.spec)
    write_json(folder / "preprocessor_config.json", preprocessor, indent=2)
    write_tensors(folder, _renamed(source, "vision_tower.", "vision_model."))


def _write_projector(source: ExportSource, folder: Path) -> None:
    folder.mkdir()
    facts = {
        "architectures": ["MultimodalProjector"],
        "mm_projector_type": source.config.projector_type,
        "model_type": "v2l_projector",
        "producer": f"vila {__version__}",
    }
    write_json(folder / "config.json", facts, indent=2)
    write_tensors(folder, _renamed(source, "projector.", "layers."))


def _renamed(source: ExportSource, prefix: str, target_prefix: str) -> Iterator[StreamedTensors]:
    for name in source.tensors:
        if name.startswith(prefix):
            yield source.copied(name, target_prefix + name.removeprefix(prefix), source.half_dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
