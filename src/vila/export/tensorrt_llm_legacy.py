"""Export `tensorrt-llm-legacy`: the LLM as a checkpoint for `trtllm-build`, one file per tensor-parallel rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vila import __version__
from vila.core.files import write_json
from vila.export.base import ExportOptions, ExportTarget, Readme, choose_group_size, group_size_problems, int4_problems
from vila.export.source import LLM, ExportSource, SafetensorsWriter
from vila.export.tensorrt_llm import GROUPS, w4a16_awq
from vila.families import FAMILIES, head_width, rope_parameters
from vila.kernels.packings import pack_modelopt


def _problems(source: ExportSource, options: ExportOptions) -> list[str]:
    out = list(_family_reasons(source))
    if options.precision != "int4":
        out += group_size_problems(options)
    elif not out:
        out += int4_problems(source, options, symmetric=True, outputs=2, groups=GROUPS)
    return out or rank_problems(source, options)


def _write(source: ExportSource, part: Path, options: ExportOptions) -> None:
    group_size = choose_group_size(source, options) if options.precision == "int4" else None
    config = checkpoint_config(source, group_size, options.tp_size)
    write_json(part / "config.json", config, indent=2)
    write_ranks(source, part, group_size, options.tp_size)


def _readme(source: ExportSource, options: ExportOptions) -> Readme:
    tokens, ranks = source.processor.spec.tokens_per_image, options.tp_size
    mpi = "" if ranks == 1 else f"mpirun -n {ranks} "
    build = (
        "trtllm-build --checkpoint_dir {out} --output_dir engines/llm \\\n"
        "    --gemm_plugin float16 --max_batch_size 1 --max_input_len 2048 --max_seq_len 2560 \\\n"
        f"    --max_multimodal_len {tokens}{'' if ranks == 1 else f' --workers {ranks}'}"
    )
    vision = (
        '# MODEL-vila: `vila convert MODEL MODEL-vila --layout vila-v15`; its name must contain "vila".\n'
        "python examples/multimodal/build_multimodal_engine.py --model_type vila \\\n"
        "    --model_path MODEL-vila --vila_path VILA --output_dir engines/vision"
    )
    ask = (
        f"{mpi}python examples/multimodal/run.py --max_new_tokens 100 --hf_model_dir MODEL-vila \\\n"
        "    --visual_engine_dir engines/vision --llm_engine_dir engines/llm \\\n"
        '    --image_path a.jpg,b.jpg --input_text "<image>\\n<image>\\n What differs?"'
    )
    return Readme(
        commands=(
            ("Build the engine of the LLM", build),
            ("Build the engine of tower and projector (VILA is a checkout of the original code)", vision),
            ("Run a prompt", ask),
        ),
        versions=("TensorRT-LLM 0.9 to 0.2x with trtllm-build: not tested",),
        defects=(
            "INT4 engines cannot be built with `--use_fused_mlp=enable`.",
            'The multimodal example recognises VILA by the directory name, which must contain "vila" or "VILA".',
        ),
        notes=(
            f"--max_multimodal_len is the batch size times {tokens} tokens per image; raise it for several images.",
            "These files do not contain tower and projector.",
        ),
    )


def _family_reasons(source: ExportSource) -> list[str]:
    llm, out = source.config.text_config, []
    supported = [family.model_type for family in FAMILIES.values() if family.tensorrt_llm_legacy]
    if llm.model_type not in supported:
        names = ", ".join(supported)
        out.append(f"LLM type {llm.model_type!r} is not supported; supported: {names} (or --format tensorrt-llm)")
    rope = rope_parameters(llm)
    if rope.get("rope_type", "default") not in ("default", "linear"):
        out.append(
            f"rope_type {rope['rope_type']!r} is not supported; supported: default, linear (or --format tensorrt-llm)"
        )
    window = getattr(llm, "sliding_window", None)
    if window and window < llm.max_position_embeddings:
        out.append(f"a sliding window of {window} tokens is not supported (use --format tensorrt-llm)")
    return out


TARGET = ExportTarget(
    "tensorrt-llm-legacy",
    "The LLM for TensorRT-LLM's trtllm-build, as in VILA's demo, one file per rank",
    precisions={
        "int4": "symmetric 4-bit weights with group scales (W4A16_AWQ), float16 elsewhere",
        "float16": "float16",
    },
    verification="bit-exact in an independent reader that joins the ranks; not tested in TensorRT-LLM",
    problems=_problems,
    write=_write,
    readme=_readme,
    options=frozenset({"load_awq", "group_size", "tp_size"}),
)


def checkpoint_config(source: ExportSource, group_size: int | None, ranks: int) -> dict[str, Any]:
    """Return config.json of a `trtllm-build` checkpoint. group_size: of INT4 weights, None for float16."""
    llm = source.config.text_config
    rope = rope_parameters(llm)
    scaled = rope.get("rope_type", "default") == "linear"
    return {
        "producer": {"name": "vila", "version": __version__},
        "architecture": source.family.tensorrt_llm_legacy,
        "dtype": "float16",
        "logits_dtype": "float32",
        "num_hidden_layers": llm.num_hidden_layers,
        "num_attention_heads": llm.num_attention_heads,
        "num_key_value_heads": llm.num_key_value_heads,
        "hidden_size": llm.hidden_size,
        "head_size": head_width(llm),
        "intermediate_size": llm.intermediate_size,
        "norm_epsilon": llm.rms_norm_eps,
        "vocab_size": llm.vocab_size,
        "max_position_embeddings": llm.max_position_embeddings,
        "hidden_act": llm.hidden_act,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": float(rope.get("rope_theta", 10000.0)),
        "rotary_scaling": {"type": "linear", "factor": float(rope["factor"])} if scaled else None,
        # A tied LM head is written again, so that it can be sharded.
        "share_embedding_table": False,
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": ranks, "tp_size": ranks, "pp_size": 1},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None}
        if group_size is None
        else w4a16_awq(group_size, ["lm_head"]),
    }


# N outputs  K inputs  G inputs of a group  R ranks

_TILE = 64
"""Tile size of its INT4 kernel, unless the group size is larger."""
_HALF = torch.float16
_EMBEDDINGS, _HEAD, _NORM = (f"{LLM}{name}.weight" for name in ("model.embed_tokens", "lm_head", "model.norm"))


@dataclass(frozen=True)
class _Linear:
    """A Linear of the checkpoint: concatenated source Linears. by_rows: ranks shard the outputs, else the inputs."""

    stem: str
    source_names: tuple[str, ...]
    by_rows: bool


def rank_problems(source: ExportSource, options: ExportOptions) -> list[str]:
    """Return unsupported weights, or that the number of ranks does not divide the model."""
    known = {name for index in _blocks(source) for one in _linears(index) for name in one.source_names}
    known |= {name for index in _blocks(source) for name in _norms(index).values()}
    unknown = sorted(
        name
        for name in source.names
        if name.startswith(LLM)
        and name.removesuffix(".weight") not in known
        and name not in (_EMBEDDINGS, _HEAD, _NORM)
    )
    if unknown:
        return [
            f"{len(unknown)} weights of the LLM are not supported ({', '.join(unknown[:3])}); use --format tensorrt-llm"
        ]
    if _divides(source, options, options.tp_size):
        return []
    working = [str(ranks) for ranks in range(1, 65) if _divides(source, options, ranks)]
    remedy = f"use --tp-size {' or '.join(working)}" if working else "use --precision float16"
    return [f"{options.tp_size} ranks do not divide the heads or the INT4 tiles of the Linears; {remedy}"]


def write_ranks(source: ExportSource, part: Path, group_size: int | None, ranks: int) -> None:
    """Write rank0.safetensors and so on. group_size: None for float16."""
    declared = _declared(source, group_size, ranks)
    with ExitStack() as stack:
        files = [
            stack.enter_context(SafetensorsWriter(part, declared, single=f"rank{rank}.safetensors"))
            for rank in range(ranks)
        ]
        _write_vocabulary(source, files, "transformer.vocab_embedding.weight", _EMBEDDINGS)
        for index in _blocks(source):
            for target, name in _norms(index).items():
                _write_same(files, f"{target}.weight", source.read(f"{name}.weight", _HALF))
            for one in _linears(index):
                _write_linear(source, files, one, group_size)
        _write_same(files, "transformer.ln_f.weight", source.read(_NORM, _HALF))
        _write_vocabulary(source, files, "lm_head.weight", _EMBEDDINGS if source.is_tied else _HEAD)


def _blocks(source: ExportSource) -> range:
    return range(source.config.text_config.num_hidden_layers)


def _norms(index: int) -> dict[str, str]:
    source_prefix, target_prefix = f"{LLM}model.layers.{index}", f"transformer.layers.{index}"
    return {
        f"{target_prefix}.input_layernorm": f"{source_prefix}.input_layernorm",
        f"{target_prefix}.post_layernorm": f"{source_prefix}.post_attention_layernorm",
    }


def _linears(index: int) -> list[_Linear]:
    source_prefix, target_prefix = f"{LLM}model.layers.{index}", f"transformer.layers.{index}"
    heads = tuple(f"{source_prefix}.self_attn.{part}_proj" for part in "qkv")
    return [
        _Linear(f"{target_prefix}.attention.qkv", heads, True),
        _Linear(f"{target_prefix}.attention.dense", (f"{source_prefix}.self_attn.o_proj",), False),
        # TensorRT-LLM names the gate projection fc, and the up projection gate.
        _Linear(f"{target_prefix}.mlp.fc", (f"{source_prefix}.mlp.gate_proj",), True),
        _Linear(f"{target_prefix}.mlp.gate", (f"{source_prefix}.mlp.up_proj",), True),
        _Linear(f"{target_prefix}.mlp.proj", (f"{source_prefix}.mlp.down_proj",), False),
    ]


def _divides(source: ExportSource, options: ExportOptions, ranks: int) -> bool:
    llm = source.config.text_config
    if llm.num_attention_heads % ranks or llm.num_key_value_heads % ranks or llm.intermediate_size % ranks:
        return False
    if options.precision != "int4":
        return True
    tile = max(_TILE, choose_group_size(source, options))
    for one in (linear for index in _blocks(source) for linear in _linears(index)):
        for name in one.source_names:
            outputs, inputs = source.shape(f"{name}.weight")
            cut, whole = (outputs, inputs) if one.by_rows else (inputs, outputs)
            if cut % (tile * ranks) or whole % tile:
                return False
    return True


def _declared(
    source: ExportSource, group_size: int | None, ranks: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    width = source.config.text_config.hidden_size
    rows = _padded(source.config.text_config.vocab_size, ranks) // ranks
    out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "transformer.vocab_embedding.weight": ((rows, width), _HALF),
        "transformer.ln_f.weight": ((width,), _HALF),
        "lm_head.weight": ((rows, width), _HALF),
    }
    for index in _blocks(source):
        out |= {f"{target}.weight": ((width,), _HALF) for target in _norms(index)}
        for one in _linears(index):
            outputs = sum(source.shape(f"{name}.weight")[0] for name in one.source_names)
            inputs = source.shape(f"{one.source_names[0]}.weight")[1]
            shape = (outputs // ranks, inputs) if one.by_rows else (outputs, inputs // ranks)
            out |= _linear_entries(one.stem, shape, group_size)
    return out


def _linear_entries(
    stem: str, shape: tuple[int, int], group_size: int | None
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    if group_size is None:
        return {f"{stem}.weight": (shape, _HALF)}
    outputs, inputs = shape
    return {
        f"{stem}.weight": ((outputs // 2, inputs), torch.int8),
        f"{stem}.weights_scaling_factor": ((outputs, inputs // group_size), _HALF),
        f"{stem}.prequant_scaling_factor": ((inputs,), _HALF),
    }


def _write_same(files: Sequence[SafetensorsWriter], name: str, tensor: Tensor) -> None:
    for file in files:
        file.append(name, tensor)


def _write_vocabulary(source: ExportSource, files: Sequence[SafetensorsWriter], target: str, name: str) -> None:
    """Write rows to the ranks in order; the last rank is padded with zeros."""
    count, width = source.shape(name)
    per_rank = _padded(count, len(files)) // len(files)
    row = 0
    for chunk in source.rows(name, _HALF):
        _append_rows(files, target, chunk, row, per_rank)
        row += len(chunk)
    # Only the last rank lacks rows: fewer than the number of ranks are missing.
    _append_rows(files, target, torch.zeros(per_rank * len(files) - count, width, dtype=_HALF), row, per_rank)


def _padded(count: int, ranks: int) -> int:
    return -(-count // ranks) * ranks


def _append_rows(files: Sequence[SafetensorsWriter], name: str, rows: Tensor, start: int, per_rank: int) -> None:
    """Append rows `start` and following of a tensor to the files of their ranks; a rank has `per_rank` rows."""
    while len(rows):
        rank, filled = divmod(start, per_rank)
        part, rows = rows[: per_rank - filled], rows[per_rank - filled :]
        files[rank].append(name, part)
        start += len(part)


def _write_linear(
    source: ExportSource, files: Sequence[SafetensorsWriter], one: _Linear, group_size: int | None
) -> None:
    for name in one.source_names:
        outputs, row = source.shape(f"{name}.weight")[0], 0
        for num_rows, tensors in _chunks(source, f"{name}.weight", group_size):
            for suffix, tensor in tensors.items():
                if one.by_rows:
                    # A row of packed codes has two outputs.
                    per_row = num_rows // len(tensor)
                    _append_rows(
                        files, f"{one.stem}.{suffix}", tensor, row // per_row, outputs // per_row // len(files)
                    )
                else:
                    for file, part in zip(files, tensor.chunk(len(files), 1), strict=True):
                        file.append(f"{one.stem}.{suffix}", part)
            row += num_rows
    if group_size is not None:
        # All AWQ scales are folded into weights and norms.
        inputs = source.shape(f"{one.source_names[0]}.weight")[1] // (1 if one.by_rows else len(files))
        _write_same(files, f"{one.stem}.prequant_scaling_factor", torch.ones(inputs, dtype=_HALF))


def _chunks(source: ExportSource, name: str, group_size: int | None) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield the number of rows of each chunk of a weight, and its tensors by suffix."""
    if group_size is None:
        yield from ((len(chunk), {"weight": chunk}) for chunk in source.rows(name, _HALF))
        return
    for weight in source.int4_rows(name, group_size, symmetric=True, scale_dtype=_HALF):
        packed = pack_modelopt(weight)
        yield (
            weight.num_outputs,
            {"weight": packed["weight"].view(torch.int8), "weights_scaling_factor": packed["weight_scale"]},
        )
