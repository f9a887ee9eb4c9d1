"""Quantize a model to INT4, block by block, and write it; interrupted runs resume and give the same bytes.

Results of finished blocks are stored in a hidden directory next to the output until it is complete.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vila.core.errors import ConfigError, DataError
from vila.core.files import DirectoryLock, atomic_path, remove_partials, write_json, write_text
from vila.core.progress import SILENT, Events, task
from vila.families import ScaleGroup
from vila.kernels.int4 import Int4Weight, dequantize, quantize
from vila.model.int4_weights import use_int4
from vila.model.loading import save_model
from vila.quant.apply import check_same_rounding, check_search, clip_weight, fold_scale
from vila.quant.awq_cache import AwqSearch, save_search
from vila.quant.awq_search import (
    BlockArguments,
    block_arguments,
    check_ids,
    embed_sequences,
    run_block,
    search_model,
    working_copy,
)
from vila.quant.blocks import (
    block_linears,
    block_name,
    check_layers,
    check_weights,
    decoder_blocks,
    family_of,
    fitting_group_sizes,
    module_prefix,
)
from vila.quant.calibration import Calibration
from vila.quant.gptq import gptq_round, refit_scales, second_moment
from vila.quant.quant_config import QuantConfig
from vila.quant.resume_state import BlockResumeState, read_int4_block, write_int4_block

# N sequences  S sequence length  D model width  T tokens  O output channels  I input channels  G groups

VERSION = 1
"""Increased when the same settings give other codes; resume state of another version is rejected."""
LAYOUT = "awq-hf"
PUBLISHED_GROUP_SIZE = QuantConfig().group_size
SEARCH_FILE = "search.safetensors"
SUMMARY_FILE = "quantization.json"


def check_quantization(model: nn.Module, config: QuantConfig, search: AwqSearch | None = None) -> None:
    """Check a configuration, and an existing search, against the shapes of a model, which may be on the meta device.

    Raises the errors of `check_layers` and `check_search`; ConfigError for a search with another group size or
    mode, and for a search that the method does not use.
    """
    check_layers(model, config.group_size)
    if search is not None:
        if config.method == "rtn":
            raise ConfigError(
                "does not use an AWQ search, and one is given", field="method", value="rtn", hint="omit one of them"
            )
        check_same_rounding(search, config.group_size, config.symmetric)
        check_search(model, search)


def check_calibration(
    model: nn.Module, config: QuantConfig, calibration: Calibration | None, search: AwqSearch | None = None
) -> None:
    """Raise ConfigError for missing calibration, and as `check_ids`. The model may be on the meta device."""
    if calibration is not None:
        check_ids(model, calibration)
    if needs_calibration(config, search) and (calibration is None or not calibration.sequences):
        raise ConfigError("required for the AWQ search and for GPTQ", field="calibration", value=None)


def needs_calibration(config: QuantConfig, search: AwqSearch | None = None) -> bool:
    """Return whether quantizing needs calibration. search: an existing search, instead of making one."""
    return config.rounding == "gptq" or (config.method == "awq" and search is None)


def default_group_size(model: nn.Module, search: AwqSearch | None = None) -> int:
    """Return the group size of an existing search, else the largest of 128, 64 and 32 that fits the model.

    128, the published size, if none fits. The model may be on the meta device.
    """
    size = None if search is None else search.settings.get("group_size")
    return int(size) if size else max(fitting_group_sizes(model), default=PUBLISHED_GROUP_SIZE)


def required_disk_bytes(model: nn.Module, group_size: int) -> int:
    """Return the approximate disk space for quantizing: resume state and output."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    packed = sum(linear.weight.numel() for block in decoder_blocks(model) for linear in block_linears(block).values())
    # A code takes half a byte, a group's scale two and its zero point half a byte; other weights have 16 bits.
    return 2 * (packed // 2 + packed * 5 // (2 * group_size)) + 2 * (parameters - packed)


def quantize_checkpoint(
    model: Any,
    processor: Any,
    out: Path,
    config: QuantConfig,
    calibration: Calibration | None = None,
    search: AwqSearch | None = None,
    *,
    layout: str = LAYOUT,
    texts: Mapping[str, str] | None = None,
    events: Events = SILENT,
) -> dict[str, Any]:
    """Quantize a model in place, write it to `out` with the search and a summary, and return the summary.

    search: AWQ search result to apply; None: search with `calibration`, if there is one.
    texts:  additional text files to write: content by file name.
    After an interruption, the same call resumes after the last finished block.
    Raises, before anything is written, the errors of `check_quantization`, `check_calibration` and `check_weights`;
    CheckpointError if the resume state belongs to another run, and DirectoryInUseError if another process writes `out`.
    """
    check_quantization(model, config, search)
    check_calibration(model, config, calibration, search)
    check_weights(model)
    before = sum(parameter.nbytes for parameter in model.parameters())
    work = work_folder(out)
    with DirectoryLock(work).acquire(events=events):
        remove_partials(out.parent, out.name)
        if search is None and calibration is not None:
            search = make_search(model, processor, config, calibration, resume_dir=work / "search", events=events)
        rounded = round_blocks(
            model, search, config, calibration,
            processor=processor, resume_dir=work / "rounded", release=True, events=events,
        )  # fmt: skip
        use_int4(model, rounded.weights)
        with atomic_path(out) as part:
            save_model(model, processor, part, layout=layout)
            after = sum(path.stat().st_size for path in part.rglob("*.safetensors"))
            if search is not None:
                save_search(search, part / SEARCH_FILE)
            summary = {
                "method": config.method,
                "rounding": config.rounding,
                **config.search_settings(),
                "bytes_before": before,
                "bytes_after": after,
                "linears": len(rounded.weights),
                "calibration": None if calibration is None else calibration.metadata(),
                "search": None if search is None else {k: v for k, v in search.settings.items() if k != "version"},
                "blocks": _block_errors(search, rounded),
            }
            write_json(part / SUMMARY_FILE, summary)
            for name, text in (texts or {}).items():
                write_text(part / name, text)
        shutil.rmtree(work, ignore_errors=True)
    return summary


def work_folder(out: Path) -> Path:
    """Return the directory of the resume state for an output directory."""
    return out.with_name(f".{out.name}.unfinished")


def make_search(
    model: Any,
    processor: Any,
    config: QuantConfig,
    calibration: Calibration,
    *,
    resume_dir: Path | None = None,
    events: Events = SILENT,
) -> AwqSearch | None:
    """Run the AWQ search of a checked configuration; None for the method `rtn`.

    Without `config.dtype` the search runs in float32 on a CPU, and elsewhere in the dtype of the weights.
    """
    if config.method == "rtn":
        return None
    device = config.device or next(model.parameters()).device
    dtype = config.dtype or (torch.float32 if device.type == "cpu" else None)
    # Name and hash stay those of the whole calibration; the number of sequences is recorded separately.
    used = replace(calibration, sequences=calibration.sequences[: config.search_sequences or None])
    config = replace(config, dtype=dtype)
    return search_model(model, used, config, processor=processor, resume_dir=resume_dir, events=events)


def _block_errors(search: AwqSearch | None, rounded: RoundedModel) -> list[dict[str, float]]:
    """Return per block `weights_off`, and `error_left`: the output error after scaling relative to plain rounding."""
    left: dict[int, list[float]] = {}
    for scale in () if search is None else search.scales:
        if losses := scale.metadata.get("losses"):
            left.setdefault(int(scale.fold.split(".")[2]), []).append(min(losses) / max(losses[0], 1e-30))
    means = {index: round(sum(values) / len(values), 4) for index, values in left.items()}
    return [
        {"weights_off": round(error, 5), **({"error_left": means[index]} if index in means else {})}
        for index, error in enumerate(rounded.errors)
    ]


@dataclass(frozen=True, slots=True)
class RoundedModel:
    """INT4 weights of a model.

    weights: by the names of the Linears in the model.
    errors:  per block, the relative RMS error of its weights.
    """

    weights: dict[str, Int4Weight]
    errors: tuple[float, ...]


@torch.no_grad()
def round_blocks(
    model: nn.Module,
    search: AwqSearch | None,
    config: QuantConfig,
    calibration: Calibration | None = None,
    *,
    processor: Any = None,
    resume_dir: Path | None = None,
    release: bool = False,
    events: Events = SILENT,
) -> RoundedModel:
    """Fold the search into the model and round the Linears of its blocks, each block in float32. Nothing is checked.

    Norms and biases are changed in place. The Linears keep their weights, which no longer match the norms, until
    `model.int4_weights.use_int4` replaces them.

    calibration: used by GPTQ.
    resume_dir:  directory for the results of finished blocks, with GPTQ.
    release:     free each block's weights after rounding (move them to the meta device).
    Raises CheckpointError if `resume_dir` is of another run.
    """
    gptq = None
    if config.rounding == "gptq":
        assert calibration is not None
        gptq = _GptqRounder(model, search, config, calibration, processor, resume_dir)
    weights: dict[str, Int4Weight] = {}
    errors = []
    prefix, blocks = module_prefix(model), decoder_blocks(model)
    with task(events, "round", len(blocks), "blocks"):
        for index, block in enumerate(blocks):
            device = config.device or next(block.parameters()).device
            work = working_copy(block, torch.empty(0, device=device))
            limits = _fold_scales(work, block_name(index), search)
            originals = {name: linear.weight for name, linear in block_linears(work).items()}
            if gptq is None:
                rounded = {name: _round_nearest(originals[name], limits.get(name), config) for name in originals}
            else:
                rounded = gptq.round_block(index, block, work, limits)
            errors.append(_relative_error(originals, rounded))
            weights |= {f"{prefix}{block_name(index)}.{name}": rounded[name].to("cpu") for name in originals}
            _write_back(block, work, release)
            events.advanced("round", 1, weights_off=f"{errors[-1]:.1%}")
    return RoundedModel(weights, tuple(errors))


class _GptqRounder:
    """Rounds blocks with GPTQ, each on the activations that the quantized blocks before it produce."""

    def __init__(
        self,
        model: nn.Module,
        search: AwqSearch | None,
        config: QuantConfig,
        calibration: Calibration,
        processor: Any,
        resume_dir: Path | None,
    ) -> None:
        self.config: QuantConfig = config
        self.groups: Sequence[ScaleGroup] = family_of(model).scale_groups
        states_NSD, weights_NS = embed_sequences(model, calibration, processor, config.image_weight)
        device = config.device or states_NSD.device
        self.states_NSD = states_NSD.to(device=device, dtype=torch.float32)
        self.weights_T = None if weights_NS is None else weights_NS.flatten().to(device)
        self.arguments = block_arguments(model, states_NSD.shape[1], torch.float32, device)
        self.batch = config.batch_sequences(states_NSD.shape[1])
        settings = {
            "version": VERSION,
            "calibration": calibration.metadata(),
            "search": _digest(search),
            **config.rounding_settings(),
        }
        self.resume_state = BlockResumeState(resume_dir, settings, self.states_NSD, read_int4_block, write_int4_block)

    def round_block(
        self, index: int, block: nn.Module, work: nn.Module, limits: Mapping[str, Tensor]
    ) -> dict[str, Int4Weight]:
        """Return the rounded Linears of a block, from the resume state if it has them; `work` then uses them."""
        rounded = self.resume_state.enter(index, block)
        arguments = self.arguments[index]
        if rounded is None:
            rounded = {}
            for group in self.groups:
                rounded |= self._round_group(work, group, arguments, limits)
            self.resume_state.save(index, rounded)
        else:
            for name, weight in rounded.items():
                _replace_weight(work, name, weight)
        self.states_NSD = run_block(work, (), self.states_NSD, arguments, self.batch)[0]
        if not torch.isfinite(self.states_NSD).all():
            raise DataError(
                "the activations after rounding are not finite", field=block_name(index), hint="use rounding=nearest"
            )
        return rounded

    def _round_group(
        self, work: nn.Module, group: ScaleGroup, arguments: BlockArguments, limits: Mapping[str, Tensor]
    ) -> dict[str, Int4Weight]:
        inputs = run_block(work, (group,), self.states_NSD, arguments, self.batch)[1][group.linears[0]]
        moment_II = second_moment(inputs.flatten(0, 1), self.weights_T)
        out = {}
        for name in group.linears:
            weight_OI: Tensor = work.get_submodule(name).weight  # type: ignore[assignment]
            nearest = _round_nearest(weight_OI, limits.get(name), self.config)
            out[name] = refit_scales(weight_OI, gptq_round(weight_OI, nearest, moment_II), moment_II)
        for name, weight in out.items():
            _replace_weight(work, name, weight)
        return out


def _fold_scales(work: nn.Module, name: str, search: AwqSearch | None) -> dict[str, Tensor]:
    """Fold the block's scales into its copy; return its clip limits by the names of the Linears in the block."""
    if search is None:
        return {}
    start = len(name) + 1
    for scale in search.scales:
        if scale.fold.startswith(f"{name}."):
            linears = [work.get_submodule(one[start:]) for one in scale.linears]
            fold_scale(work.get_submodule(scale.fold[start:]), linears, scale.scale_I.to(_device(work)))
    return {clip.linear[start:]: clip.limit_OG for clip in search.clips if clip.linear.startswith(f"{name}.")}


def _round_nearest(weight_OI: Tensor, limit_OG: Tensor | None, config: QuantConfig) -> Int4Weight:
    """Clip a weight to its limits and round it to nearest."""
    clipped_OI = weight_OI if limit_OG is None else clip_weight(weight_OI, limit_OG)
    return quantize(clipped_OI, config.group_size, symmetric=config.symmetric)


def _replace_weight(work: nn.Module, name: str, weight: Int4Weight) -> None:
    linear = work.get_submodule(name)
    linear.weight = nn.Parameter(dequantize(weight.to(_device(work))), requires_grad=False)


def _write_back(block: nn.Module, work: nn.Module, release: bool) -> None:
    """Copy norms and biases of the working copy into the model's block. release: free the weights of its Linears."""
    linears = {f"{name}.weight" for name in block_linears(work)}
    with torch.no_grad():
        for name, parameter in list(block.named_parameters()):
            if name not in linears:
                # Not in place: the parameter may be memory-mapped.
                value = work.get_parameter(name).to(parameter)
            elif release:
                value = parameter.detach().to("meta")
            else:
                continue
            owner, _, own = name.rpartition(".")
            setattr(block.get_submodule(owner), own, nn.Parameter(value, requires_grad=parameter.requires_grad))


def _relative_error(originals: Mapping[str, Tensor], rounded: Mapping[str, Int4Weight]) -> float:
    changed = total = 0.0
    for name, weight_OI in originals.items():
        values_OI = dequantize(rounded[name].to(weight_OI.device))
        changed += float((values_OI - weight_OI).square().sum(dtype=torch.float64))
        total += float(weight_OI.square().sum(dtype=torch.float64))
    return float((changed / max(total, 1e-30)) ** 0.5)


def _digest(search: AwqSearch | None) -> str:
    out = hashlib.sha256()
    for name, tensor in [] if search is None else [
        *((scale.fold, scale.scale_I) for scale in search.scales),
        *((clip.linear, clip.limit_OG) for clip in search.clips),
    ]:  # fmt: skip
        out.update(name.encode())
        out.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return out.hexdigest()


def _device(work: nn.Module) -> torch.device:
    return next(work.parameters()).device
