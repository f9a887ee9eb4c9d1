"""The LLM as a checkpoint of TensorRT-LLM's `trtllm-build`, a file for each process of tensor parallelism."""

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
from vila.export.base import ExportOptions, Guide, group_of
from vila.export.source import LLM, SafetensorsWriter, Source
from vila.families import FAMILIES
from vila.kernels.int4 import Int4Weight
from vila.kernels.packings import pack_modelopt

GROUPS = (64, 128)
_PRECISIONS = {
    "int4": "symmetric 4-bit weights in groups (W4A16_AWQ), float16 elsewhere",
    "float16": "float16 throughout",
}


class TensorRtLlmLegacyTarget:
    """config.json and rank0.safetensors, rank1.safetensors ..."""

    name = "tensorrt-llm-legacy"
    summary = "The LLM for TensorRT-LLM's trtllm-build, as VILA's own demo used it, a file per rank"
    precisions = _PRECISIONS
    takes = frozenset({"load_awq", "group_size", "tp_size"})
    holds_llm = True
    verified = "bit by bit with an independent reader that joins the ranks; TensorRT-LLM was not run"

    def refusals(self, source: Source, options: ExportOptions) -> list[str]:
        """Families, positions and sizes that the checkpoint cannot express, with those that would."""
        from vila.export.base import int4_refusals, no_group_refusals

        out = list(_family_reasons(source))
        if options.precision != "int4":
            out += no_group_refusals(options)
        elif not out:
            out += int4_refusals(source, options, symmetric=True, outputs=2, groups=GROUPS)
        return out or rank_refusals(source, options)

    def write(self, source: Source, part: Path, options: ExportOptions) -> None:
        """config.json, then every weight once, cut for all ranks."""
        from vila.export.base import group_of

        group_size = group_of(source, options) if options.precision == "int4" else None
        write_config(source, part, source.family.tensorrt_llm_legacy, group_size, options.tp_size)
        write_ranks(source, part, group_size, options.tp_size)

    def guide(self, source: Source, options: ExportOptions) -> Guide:
        """The engines that have to be built, and how the multimodal example runs them."""
        tokens, ranks = source.processor.spec.tokens_per_image, options.tp_size
        mpi = "" if ranks == 1 else f"mpirun -n {ranks} "
        build = (
            "trtllm-build --checkpoint_dir {out} --output_dir engines/llm \\\n"
            "    --gemm_plugin float16 --max_batch_size 1 --max_input_len 2048 --max_seq_len 2560 \\\n"
            f"    --max_multimodal_len {tokens}{'' if ranks == 1 else f' --workers {ranks}'}"
        )
        vision = (
            '# MODEL-vila: `vila convert MODEL MODEL-vila --layout vila-v15`; its name has to contain "vila".\n'
            "python examples/multimodal/build_multimodal_engine.py --model_type vila \\\n"
            "    --model_path MODEL-vila --vila_path VILA --output_dir engines/vision"
        )
        ask = (
            f"{mpi}python examples/multimodal/run.py --max_new_tokens 100 --hf_model_dir MODEL-vila \\\n"
            "    --visual_engine_dir engines/vision --llm_engine_dir engines/llm \\\n"
            '    --image_path a.jpg,b.jpg --input_text "<image>\\n<image>\\n What differs?"'
        )
        return Guide(
            commands=(
                ("Build the engine of the LLM", build),
                ("Build the engine of the tower and the projector (VILA is a checkout of the original code)", vision),
                ("Ask it", ask),
            ),
            versions=("TensorRT-LLM 0.9 to 0.2x with trtllm-build: made for it, not run",),
            defects=(
                "INT4 engines cannot be built with `--use_fused_mlp=enable`.",
                'The multimodal example knows VILA by its directory\'s name, which has to contain "vila" or "VILA".',
            ),
            notes=(
                f"--max_multimodal_len is the batch times {tokens} tokens a picture; raise it for several pictures.",
                "Tower and projector are not in these files.",
            ),
        )


def _family_reasons(source: Source) -> list[str]:
    llm, out = source.config.text_config, []
    supported = [family.model_type for family in FAMILIES.values() if family.tensorrt_llm_legacy]
    if llm.model_type not in supported:
        names = ", ".join(supported)
        out.append(f"an LLM of type {llm.model_type!r} cannot be written; {names} can; --format tensorrt-llm takes it")
    rope = getattr(llm, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ("default", "linear"):
        out.append(
            f"rotary positions of type {rope['rope_type']}: written are default and linear; --format tensorrt-llm "
            "takes others"
        )
    window = getattr(llm, "sliding_window", None)
    if window and window < llm.max_position_embeddings:
        out.append(f"a sliding window of {window} tokens, which the checkpoint has no word for; --format tensorrt-llm")
    return out


TARGET = TensorRtLlmLegacyTarget()


# --- legacy_config
# config.json of a `trtllm-build` checkpoint.


def write_config(source: Source, part: Path, architecture: str, group_size: int | None, ranks: int) -> None:
    """Write it. group_size: of INT4 weights, None for float16."""
    write_json(part / "config.json", checkpoint_config(source, architecture, group_size, ranks), indent=2)


def checkpoint_config(source: Source, architecture: str, group_size: int | None, ranks: int) -> dict[str, Any]:
    """What the builder has to know of the LLM."""
    llm = source.config.text_config
    rope = getattr(llm, "rope_parameters", None) or {}
    scaled = rope.get("rope_type", "default") == "linear"
    return {
        "producer": {"name": "vila", "version": __version__},
        "architecture": architecture,
        "dtype": "float16",
        "logits_dtype": "float32",
        "num_hidden_layers": llm.num_hidden_layers,
        "num_attention_heads": llm.num_attention_heads,
        "num_key_value_heads": llm.num_key_value_heads,
        "hidden_size": llm.hidden_size,
        "head_size": head_size(source),
        "intermediate_size": llm.intermediate_size,
        "norm_epsilon": llm.rms_norm_eps,
        "vocab_size": llm.vocab_size,
        "max_position_embeddings": llm.max_position_embeddings,
        "hidden_act": llm.hidden_act,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": float(rope.get("rope_theta", 10000.0)),
        "rotary_scaling": {"type": "linear", "factor": float(rope["factor"])} if scaled else None,
        # A tied head is written a second time, so that ranks may cut it.
        "share_embedding_table": False,
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": ranks, "tp_size": ranks, "pp_size": 1},
        "quantization": _quantization(group_size),
    }


def head_size(source: Source) -> int:
    """Channels of an attention head."""
    llm = source.config.text_config
    return int(getattr(llm, "head_dim", None) or llm.hidden_size // llm.num_attention_heads)


def _quantization(group_size: int | None) -> dict[str, Any]:
    if group_size is None:
        return {"quant_algo": None, "kv_cache_quant_algo": None}
    return {
        "quant_algo": "W4A16_AWQ",
        "kv_cache_quant_algo": None,
        "group_size": group_size,
        "has_zero_point": False,
        "pre_quant_scale": True,
        "exclude_modules": ["lm_head"],
    }


# --- legacy_ranks
# The weights of a `trtllm-build` checkpoint: each is read once and cut for all ranks.


# N outputs  K inputs  G inputs of a group  R ranks

_TILE = 64
"""Rows and columns of its INT4 kernel's tiles, or the group size where that is greater."""
_HALF = torch.float16
_EMBEDDINGS, _HEAD, _NORM = (f"{LLM}{name}.weight" for name in ("model.embed_tokens", "lm_head", "model.norm"))


@dataclass(frozen=True)
class _Linear:
    """A Linear of the checkpoint, ours one below the other. `by_rows`: ranks cut its outputs, not its inputs."""

    stem: str
    ours: tuple[str, ...]
    by_rows: bool


def rank_refusals(source: Source, options: ExportOptions) -> list[str]:
    """Weights that the checkpoint has no place for, and a number of ranks that does not divide the model."""
    known = {name for index in _blocks(source) for one in _linears(index) for name in one.ours}
    known |= {name for index in _blocks(source) for name in _norms(index).values()}
    lost = sorted(
        name
        for name in source.names
        if name.startswith(LLM)
        and name.removesuffix(".weight") not in known
        and name not in (_EMBEDDINGS, _HEAD, _NORM)
    )
    if lost:
        return [
            f"no place for {len(lost)} weights of the LLM ({', '.join(lost[:3])}); --format tensorrt-llm takes them"
        ]
    if _divides(source, options, options.tp_size):
        return []
    working = [str(ranks) for ranks in range(1, 65) if _divides(source, options, ranks)]
    remedy = f"--tp-size {' or '.join(working)} would" if working else "--precision float16 has no such rule"
    return [f"{options.tp_size} ranks do not divide its heads or the tiles of its Linears; {remedy}"]


def write_ranks(source: Source, part: Path, group_size: int | None, ranks: int) -> None:
    """rank0.safetensors and so on. group_size None writes float16."""
    declared = _declared(source, group_size, ranks)
    with ExitStack() as stack:
        files = [
            stack.enter_context(SafetensorsWriter(part, declared, single=f"rank{rank}.safetensors"))
            for rank in range(ranks)
        ]
        _write_vocabulary(source, files, "transformer.vocab_embedding.weight", _EMBEDDINGS)
        for index in _blocks(source):
            for theirs, ours in _norms(index).items():
                _write_same(files, f"{theirs}.weight", source.read(f"{ours}.weight", _HALF))
            for one in _linears(index):
                _write_linear(source, files, one, group_size)
        _write_same(files, "transformer.ln_f.weight", source.read(_NORM, _HALF))
        _write_vocabulary(source, files, "lm_head.weight", _EMBEDDINGS if source.is_tied else _HEAD)


def _blocks(source: Source) -> range:
    return range(source.config.text_config.num_hidden_layers)


def _norms(index: int) -> dict[str, str]:
    ours, theirs = f"{LLM}model.layers.{index}", f"transformer.layers.{index}"
    return {
        f"{theirs}.input_layernorm": f"{ours}.input_layernorm",
        f"{theirs}.post_layernorm": f"{ours}.post_attention_layernorm",
    }


def _linears(index: int) -> list[_Linear]:
    ours, theirs = f"{LLM}model.layers.{index}", f"transformer.layers.{index}"
    heads = tuple(f"{ours}.self_attn.{part}_proj" for part in "qkv")
    return [
        _Linear(f"{theirs}.attention.qkv", heads, True),
        _Linear(f"{theirs}.attention.dense", (f"{ours}.self_attn.o_proj",), False),
        # Its names are not ours: fc is the gate, and gate is up.
        _Linear(f"{theirs}.mlp.fc", (f"{ours}.mlp.gate_proj",), True),
        _Linear(f"{theirs}.mlp.gate", (f"{ours}.mlp.up_proj",), True),
        _Linear(f"{theirs}.mlp.proj", (f"{ours}.mlp.down_proj",), False),
    ]


def _divides(source: Source, options: ExportOptions, ranks: int) -> bool:
    llm = source.config.text_config
    if llm.num_attention_heads % ranks or llm.num_key_value_heads % ranks or llm.intermediate_size % ranks:
        return False
    if options.precision != "int4":
        return True
    tile = max(_TILE, group_of(source, options))
    for one in (linear for index in _blocks(source) for linear in _linears(index)):
        for name in one.ours:
            outputs, inputs = source.shape(f"{name}.weight")
            cut, whole = (outputs, inputs) if one.by_rows else (inputs, outputs)
            if cut % (tile * ranks) or whole % tile:
                return False
    return True


def _declared(source: Source, group_size: int | None, ranks: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    width = source.config.text_config.hidden_size
    rows = _padded(source.config.text_config.vocab_size, ranks) // ranks
    out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "transformer.vocab_embedding.weight": ((rows, width), _HALF),
        "transformer.ln_f.weight": ((width,), _HALF),
        "lm_head.weight": ((rows, width), _HALF),
    }
    for index in _blocks(source):
        out |= {f"{theirs}.weight": ((width,), _HALF) for theirs in _norms(index)}
        for one in _linears(index):
            outputs = sum(source.shape(f"{name}.weight")[0] for name in one.ours)
            inputs = source.shape(f"{one.ours[0]}.weight")[1]
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


def _write_vocabulary(source: Source, files: Sequence[SafetensorsWriter], theirs: str, ours: str) -> None:
    """Rows go to the ranks in turn; zeros fill up the last one."""
    count = source.shape(ours)[0]
    each = _padded(count, len(files)) // len(files)
    for part, rank in _by_rank(source.rows(ours, _HALF), each):
        files[rank].append(theirs, part)
    if missing := each * len(files) - count:
        # Only the last rank lacks rows: fewer are missing than there are ranks, and a rank holds that many.
        files[-1].append(theirs, torch.zeros(missing, source.shape(ours)[1], dtype=_HALF))


def _padded(count: int, ranks: int) -> int:
    return -(-count // ranks) * ranks


def _by_rank(runs: Iterator[Tensor], each: int) -> Iterator[tuple[Tensor, int]]:
    """Runs of rows cut where a rank has its `each` rows, with the rank's number."""
    row = 0
    for run in runs:
        while len(run):
            rank, filled = divmod(row, each)
            part, run = run[: each - filled], run[each - filled :]
            row += len(part)
            yield part, rank


def _write_linear(source: Source, files: Sequence[SafetensorsWriter], one: _Linear, group_size: int | None) -> None:
    for name in one.ours:
        weight = f"{name}.weight"
        if group_size is None:
            for rank, part in _cut(source.rows(weight, _HALF), source.shape(weight), one.by_rows, len(files)):
                files[rank].append(f"{one.stem}.weight", part)
            continue
        runs = source.int4_rows(weight, group_size, symmetric=True, scale_dtype=_HALF)
        for rank, part4 in _cut_int4(runs, source.shape(weight), one.by_rows, len(files)):
            packed = pack_modelopt(part4)
            files[rank].append(f"{one.stem}.weight", packed["weight"].view(torch.int8))
            files[rank].append(f"{one.stem}.weights_scaling_factor", packed["weight_scale"])
    if group_size is not None:
        # All AWQ scales are folded into the weights and norms before them.
        inputs = source.shape(f"{one.ours[0]}.weight")[1] // (1 if one.by_rows else len(files))
        _write_same(files, f"{one.stem}.prequant_scaling_factor", torch.ones(inputs, dtype=_HALF))


def _cut(runs: Iterator[Tensor], shape: tuple[int, ...], by_rows: bool, ranks: int) -> Iterator[tuple[int, Tensor]]:
    if by_rows:
        yield from ((rank, part) for part, rank in _by_rank(runs, shape[0] // ranks))
        return
    for run in runs:
        yield from enumerate(run.chunk(ranks, 1))


def _cut_int4(
    runs: Iterator[Int4Weight], shape: tuple[int, ...], by_rows: bool, ranks: int
) -> Iterator[tuple[int, Int4Weight]]:
    each, row = shape[0] // ranks, 0
    for run in runs:
        if not by_rows:
            yield from enumerate(_columns(run, ranks))
            continue
        start = 0
        while start < run.num_outputs:
            rank, filled = divmod(row, each)
            end = min(run.num_outputs, start + each - filled)
            yield rank, run.rows(start, end)
            row += end - start
            start = end


def _columns(weight: Int4Weight, ranks: int) -> Iterator[Int4Weight]:
    parts = (tensor.chunk(ranks, 1) for tensor in (weight.codes, weight.scales, weight.zeros))
    for codes, scales, zeros in zip(*parts, strict=True):
        yield Int4Weight(codes, scales, zeros, weight.group_size)
