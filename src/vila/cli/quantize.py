"""`vila quantize`: quantize the LLM of a model to INT4 (AWQ, round-to-nearest, GPTQ rounding)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from vila.cli import options
from vila.cli.options import CheckpointOptions, with_option_groups

if TYPE_CHECKING:
    from rich.console import Console

    from vila.quant.calibration import Calibration
    from vila.quant.quant_config import QuantConfig


class Method(StrEnum):
    """Quantization methods."""

    AWQ = "awq"
    RTN = "rtn"
    BEST = "best"


class Scaling(StrEnum):
    """Candidate scales of the AWQ search."""

    ACTIVATION = "activation"
    DUO = "duo"
    BOTH = "both"


class Clipping(StrEnum):
    """Linear layers whose weights are clipped."""

    PUBLISHED = "published"
    ALL = "all"
    NONE = "none"


class Rounding(StrEnum):
    """Rounding of weights to INT4 codes."""

    NEAREST = "nearest"
    GPTQ = "gptq"


@dataclass(frozen=True)
class CalibrationOptions:
    """Flags of the calibration data."""

    panel: ClassVar = "Calibration"

    calib_data: Annotated[list[str] | None, typer.Option(metavar="FILE")] = None
    """Calibration data: text (.txt, .jsonl), or a recipe (.yaml or name) for image-text samples. Repeatable. Default:
    packaged English text."""
    num_calib_sequences: Annotated[int, typer.Option(min=1)] = 16
    """Maximum number of 512-token sequences per text."""
    num_calib_samples: Annotated[int, typer.Option(min=1)] = 64
    """Number of samples per recipe."""
    image_token_weight: float = 1.0
    """Weight of an image token relative to a text token."""


@dataclass(frozen=True)
class SearchOptions:
    """Flags of the search for scales and clipping limits. None is a flag that was not given."""

    panel: ClassVar = "Search"

    scaling: Annotated[Scaling | None, options.choice(Scaling, "scaling")] = None
    """Scale search: activation-based, duo (activation and weight), or both. Default: the method's."""
    clipping: Annotated[Clipping | None, options.choice(Clipping, "clipping")] = None
    """Linear layers whose weights are clipped. Default: the method's."""
    rounding: Annotated[Rounding | None, options.choice(Rounding, "rounding")] = None
    """Rounding of weights to INT4: nearest or gptq. Default: nearest."""
    load_awq: Annotated[Path | None, typer.Option(metavar="FILE")] = None
    """Apply an AWQ search result: search.safetensors of vila quantize, or an awq_cache .pt of llm-awq."""
    dump_awq: Annotated[Path | None, typer.Option(metavar="FILE", callback=options.output_file)] = None
    """Also write the search result as an awq_cache .pt for --load_awq of llm-awq."""


CALIBRATION, SEARCH = CalibrationOptions(), SearchOptions()


@with_option_groups
def quantize(
    model: options.Model,
    out: Annotated[Path, typer.Option("--output", "-o", help="Output directory.")],
    calib: CalibrationOptions = CALIBRATION,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Input channels per scale. Default: the largest of 128, 64 and 32 that divides the layer widths."
        ),
    ] = None,
    method: Annotated[
        Method,
        options.choice(
            Method,
            "method",
            help="awq: published AWQ; rtn: round to nearest; best: AWQ with all options that lower the error.",
        ),
    ] = Method.AWQ,
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="Symmetric quantization without zero points, as for TensorRT-LLM.")
    ] = False,
    search: SearchOptions = SEARCH,
    device: options.DeviceFlag = options.Device.AUTO,
    checkpoint_options: CheckpointOptions = options.CHECKPOINT,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing model in --output.")] = False,
) -> None:
    """Quantize the LLM of [bold]MODEL[/bold] to INT4. Resumes after an interruption."""
    from dataclasses import replace

    from rich.console import Console

    from vila import __version__
    from vila.cli.convert import check_apart, check_target, stop_cleanly
    from vila.cli.progress import Screen
    from vila.model.hub import local_folder
    from vila.model.layouts.readme import README, layout_readme
    from vila.model.loading import build_model, empty_model, open_checkpoint
    from vila.quant.awq_cache import load_search, read_search, write_awq_cache
    from vila.quant.quantize import (
        PUBLISHED_GROUP_SIZE,
        SEARCH_FILE,
        check_calibration,
        check_quantization,
        default_group_size,
        needs_calibration,
        quantize_checkpoint,
        required_disk_bytes,
    )

    config = _config(method, search, symmetric, calib.image_token_weight, device.value)
    target = out.expanduser()
    check_target(target, "--output", overwrite)
    if search.dump_awq is not None:
        _check_dump(search.dump_awq, target, method, overwrite)
    unused = _unused(method, search)
    found = None if search.load_awq is None else read_search(search.load_awq.expanduser())
    stop_cleanly()
    folder = local_folder(model, checkpoint_options.revision or None)
    check_apart(folder, target)
    with Screen() as screen:
        # Shapes and files are checked before weights are read.
        checkpoint = open_checkpoint(folder, **checkpoint_options.overrides)
        shapes = empty_model(checkpoint)
        size = group_size or default_group_size(shapes, found)
        if group_size is None and size != PUBLISHED_GROUP_SIZE:
            screen.log(f"group size: {size}, the largest of 128, 64 and 32 that divides the layer widths")
        config = replace(config, group_size=size)
        check_quantization(shapes, config, found)
        check_target(target, "--output", overwrite, num_bytes=required_disk_bytes(shapes, size))
        calibration = None
        if needs_calibration(config, found):
            names, counts = calib.calib_data or ["packaged"], (calib.num_calib_sequences, calib.num_calib_samples)
            calibration = load_calibration(names, checkpoint.processor, *counts, screen)
            check_calibration(shapes, config, calibration, found)
            screen.log(
                f"calibration: {calibration.name}, {len(calibration.sequences)} sequences, "
                f"{calibration.num_tokens:,} tokens, sha256 {calibration.sha256[:16]}"
            )
        elif calib.calib_data:
            screen.log(f"note: --calib-data is ignored: {unused} needs no calibration")
        network, processor = build_model(checkpoint), checkpoint.processor
        texts = {README: layout_readme("awq-hf", network, processor, __version__)}
        summary = quantize_checkpoint(
            network, processor, target, config, calibration, found, texts=texts, events=screen
        )
    if search.dump_awq is not None:
        write_awq_cache(load_search(target / SEARCH_FILE), search.dump_awq)
    show_summary(Console(highlight=False, soft_wrap=True), target, summary)


def _config(
    method: Method, search: SearchOptions, symmetric: bool, image_token_weight: float, device: str
) -> QuantConfig:
    """Return the config of the method with the given options; the group size is set later."""
    from dataclasses import replace

    import torch

    from vila.cli.options import choose_device
    from vila.quant.quant_config import BEST, QuantConfig

    start = BEST if method is Method.BEST else QuantConfig("rtn" if method is Method.RTN else "awq")
    changes: dict[str, Any] = {
        "symmetric": symmetric,
        "image_weight": image_token_weight,
        "device": torch.device(choose_device(device)),
    }
    chosen = {name: getattr(search, name) for name in ("scaling", "clipping", "rounding")}
    changes |= {name: option.value for name, option in chosen.items() if option is not None}
    return replace(start, **changes)


def _unused(method: Method, search: SearchOptions) -> str:
    """Return the flag that replaces the search, or "". Raises ConfigError for search flags without effect."""
    from vila.core.errors import ConfigError

    why = "--method rtn" if method is Method.RTN else "--load-awq" if search.load_awq else ""
    values = {"--scaling": search.scaling, "--clipping": search.clipping}
    given = [name for name, value in values.items() if value is not None]
    if why and given:
        raise ConfigError(f"no effect with {why}, which does not search", field=given[0], hint="leave one of them out")
    return why


def _check_dump(path: Path, target: Path, method: Method, overwrite: bool) -> None:
    """Raise ConfigError if the awq_cache file of `--dump-awq` cannot be written at the end."""
    from vila.core.errors import ConfigError

    if method is Method.RTN:
        raise ConfigError("--method rtn has no search result", field="--dump-awq", hint="use --method awq")
    if path.suffix != ".pt":
        raise ConfigError(field="--dump-awq", value=str(path), expected="a name that ends in .pt")
    if target.resolve() in path.resolve().parents:
        raise ConfigError("inside --output", field="--dump-awq", value=str(path), hint="give a path outside of it")
    if path.is_file() and not overwrite:
        hint = "give another name, or --overwrite to replace it"
        raise ConfigError("already exists", field="--dump-awq", value=str(path), hint=hint)


def load_calibration(
    names: list[str], processor: Any, num_calib_sequences: int, num_calib_samples: int, screen: Any
) -> Calibration:
    """Load and join the calibration data of `--calib-data`: `packaged`, text files and recipes."""
    from vila.quant.calibration import join_calibrations, packaged_documents, read_documents, text_calibration

    parts = []
    for name in names:
        path = Path(name).expanduser()
        if name == "packaged":
            parts.append(text_calibration(packaged_documents(), processor.tokenizer, max_sequences=num_calib_sequences))
        elif path.suffix in (".txt", ".jsonl"):
            documents = read_documents(path, len(processor.tokenizer))
            parts.append(
                text_calibration(documents, processor.tokenizer, name=path.name, max_sequences=num_calib_sequences)
            )
        else:
            parts.append(_recipe_calibration(name, processor, num_calib_samples, screen))
    return parts[0] if len(parts) == 1 else join_calibrations(*parts)


def _recipe_calibration(name: str, processor: Any, num_calib_samples: int, screen: Any) -> Calibration:
    from vila.config.load import load_recipe
    from vila.data.dataset import DatasetEntry, open_mixture
    from vila.quant.calibration import mixture_calibration

    recipe = load_recipe(name)
    mixture = open_mixture([DatasetEntry(**entry.model_dump()) for entry in recipe.data.mixture], recipe.seed, screen)
    return mixture_calibration(mixture, processor, samples=num_calib_samples, name=Path(name).name)


# --- summary


def show_summary(console: Console, target: Path, summary: dict[str, Any]) -> None:
    """Print block errors, sizes, calibration data and peak memory of a quantization."""
    from rich.table import Table

    from vila.cli.info import human_bytes

    table = Table(title="quantization error per block", title_justify="left")
    for column in ("block", "weight error", "output error with AWQ"):
        table.add_column(column, justify="right")
    for index, block in enumerate(summary["blocks"]):
        left = block.get("error_left")
        table.add_row(str(index), f"{block['weights_off']:.2%}", "" if left is None else f"{left:.0%} of RTN")
    console.print(table)
    shrunk = summary["bytes_before"] / max(1, summary["bytes_after"])
    console.print(
        f"{target}: {summary['linears']} linear layers of {len(summary['blocks'])} blocks in INT4, group size "
        f"{summary['group_size']}, {summary['method']}; {human_bytes(summary['bytes_before'])} in memory, "
        f"{human_bytes(summary['bytes_after'])} in files ({shrunk:.2f} times smaller)",
        markup=False,
    )
    if (calibration := summary["calibration"]) is not None:
        console.print(
            f"calibration: {calibration['name']}, {calibration['tokens']:,} tokens, sha256 {calibration['sha256']}",
            markup=False,
        )
    console.print(f"peak memory: {_peak()}")


def _peak() -> str:
    import resource
    import sys

    from vila.cli.info import human_bytes

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return human_bytes(peak if sys.platform == "darwin" else peak * 1024)
