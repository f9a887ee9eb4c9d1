"""`vila bench`: measure decode speed, quantization quality and server throughput."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vila.cli import options
from vila.cli.options import (
    BackendOptions,
    CheckpointOptions,
    check_backend_flags,
    choose_device,
    open_model,
    set_num_threads,
    with_option_groups,
)
from vila.core.errors import ConfigError, UnknownNameError, VilaError

if TYPE_CHECKING:
    from vila.bench.decode import Load, Result
    from vila.bench.quality import Way
    from vila.quant.calibration import Calibration


app = typer.Typer(
    help="Measure speed and quantization quality on this machine.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
)

# --- vila bench decode


SHAPE_NAMES = ("vila-7b", "vila-13b", "tinyllama", "smollm", "tiny")
"""Model sizes with random weights. Listed here because `--help` must not import torch."""


class Precision(StrEnum):
    """Weight precision of the decoder blocks."""

    INT4 = "int4"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


@dataclass(frozen=True)
class ShapeOptions:
    """Flags of models with random weights."""

    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"Model size with random weights: {', '.join(SHAPE_NAMES)}. Repeatable."),
    ] = None
    precision: Annotated[list[Precision] | None, options.choice(Precision, "precision")] = None
    """Weight precision of --shape. Repeatable. Default: int4."""
    group_size: Annotated[int, typer.Option(min=0)] = 0
    """Input channels per INT4 scale; 0: 128, or 64 if 128 does not fit."""

    @property
    def precisions(self) -> Sequence[Precision]:
        """Precisions to measure."""
        return self.precision or [Precision.INT4]

    def check(self) -> None:
        """Raise UnknownNameError for an unknown shape, ConfigError for a group size that does not divide its widths."""
        for name in self.shape or ():
            if name not in SHAPE_NAMES:
                raise UnknownNameError("shape", name, SHAPE_NAMES, field="--shape")
        if self.shape and Precision.INT4 in self.precisions:
            from vila.bench.model_shapes import SHAPES, check_groups

            for name in self.shape:
                check_groups(SHAPES[name], self.group_size)


@dataclass(frozen=True)
class LoadFlags:
    """Flags of the measured loads."""

    input_len: Annotated[list[int] | None, typer.Option(min=1)] = None
    """Prompt length in tokens. Repeatable. Default: 16."""
    batch_size: Annotated[list[int] | None, typer.Option(min=1)] = None
    """Batch size. Repeatable. Default: 1."""
    output_len: Annotated[int, typer.Option(min=2)] = 128
    """Number of generated tokens per answer."""
    num_iters: Annotated[int, typer.Option(min=1)] = 5
    """Number of measured iterations after one warm-up iteration."""
    check_tokens: Annotated[int, typer.Option(min=0)] = 512
    """Number of tokens for the top-1 agreement with the reference; 0 skips the comparison."""

    def loads(self) -> list[Load]:
        """Return the loads to measure."""
        from vila.bench.decode import Load

        pairs = [(context, batch) for context in self.input_len or [16] for batch in self.batch_size or [1]]
        return [
            # The comparison with the reference is the same for every load, so only the first load runs it.
            Load(context, batch, self.output_len, self.num_iters, 0 if number else self.check_tokens)
            for number, (context, batch) in enumerate(pairs)
        ]


SHAPE, LOADS = ShapeOptions(), LoadFlags()


@app.command()
@with_option_groups
def decode(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="Model directory; measured with its own weights.")
    ] = "",
    shapes: ShapeOptions = SHAPE,
    backend: BackendOptions = options.BACKEND,
    device: options.DeviceFlag = options.Device.AUTO,
    load: LoadFlags = LOADS,
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="JSON file for all results.", callback=options.output_file),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure prefill and decode throughput of [bold]MODEL[/bold] or of a --shape with random weights."""
    import json

    from vila.bench.decode import device_table, result_table
    from vila.cli.progress import Screen
    from vila.core.files import write_json
    from vila.core.system import system_info, version

    if bool(model) == bool(shapes.shape):
        raise ConfigError("give MODEL or --shape, not both", field="MODEL")
    if model and (shapes.precision or shapes.group_size):
        raise ConfigError("require --shape; a checkpoint has its own", field="--precision and --group-size")
    where = choose_device(device.value)
    check_backend_flags(backend, where)
    shapes.check()
    set_num_threads(backend.threads)
    loads = load.loads()
    results: list[Result] = []
    with Screen() as screen:
        for opened in _models(model, shapes, where, loads):
            results += _measured(opened, backend.engine_arguments, loads, screen)
    facts = {
        **system_info(),
        "onnxruntime": version("onnxruntime"),
        "device": _device_name(where),
        "threads": _threads(),
    }
    whole = {"machine": facts, "results": [result.facts() for result in results]}
    if out is not None:
        write_json(out, whole)
    if as_json:
        typer.echo(json.dumps(whole))
        return
    typer.echo(json.dumps(facts))
    typer.echo(result_table(results) + "\n")
    if any(name in ("vila-7b", "vila-13b") for name in shapes.shape or ()):
        typer.echo(device_table(results, _device_name(where)))


def _models(model: str, shapes: ShapeOptions, device: str, loads: list[Load]) -> Any:
    """Yield titles and models; one model is in memory at a time."""
    import torch

    if model:
        from vila.model.loading import build_model, choose_dtype

        checkpoint = open_model(model)
        yield Path(model).name, build_model(checkpoint, choose_dtype("auto", device), device)
        return
    from vila.bench.model_shapes import SHAPES, random_model

    context = max(512, *(load.context + load.tokens for load in loads), *(load.check + 1 for load in loads))
    for name in shapes.shape or ():
        for kind in shapes.precisions:
            is_int4 = kind is Precision.INT4
            size = (shapes.group_size or (64 if SHAPES[name].width % 128 else 128)) if is_int4 else 0
            # Embeddings and LM head of an INT4 model have the compute dtype of the device.
            dtype = ("float32" if device == "cpu" else "float16") if is_int4 else kind.value
            yield (
                SHAPES[name].title,
                random_model(SHAPES[name], getattr(torch, dtype), device, group_size=size, context=context),
            )


def _measured(opened: Any, chosen: dict[str, Any], loads: list[Load], events: Any) -> list[Result]:
    from vila.bench.decode import measure, subject_of

    title, model = opened
    subject = subject_of(model, title, events=events, **chosen)
    return [measure(subject, load, events) for load in loads]


def _device_name(device: str) -> str:
    import torch

    from vila.core.system import cpu_name

    return cpu_name() if device == "cpu" else torch.cuda.get_device_name()


def _threads() -> int:
    import torch

    return torch.get_num_threads()


# --- vila bench quality


WAYS = ("full", "rtn", "awq", "awq-images", "best")


@dataclass(frozen=True)
class MethodOptions:
    """Flags of the compared quantizations."""

    methods: Annotated[
        str,
        typer.Option(
            help=f"Comma-separated methods to compare, first full (not quantized): {', '.join(WAYS)}. "
            "awq-images requires --image-calib-data."
        ),
    ] = "full,rtn,awq,best"
    num_calib_sequences: Annotated[int, typer.Option(min=1)] = 2
    """Number of 512-token calibration sequences of awq."""
    num_calib_sequences_best: Annotated[int, typer.Option(min=1)] = 16
    """Number of 512-token calibration sequences of best."""
    image_calib_data: Annotated[str, typer.Option(metavar="RECIPE")] = ""
    """Recipe with image-text calibration data of awq-images."""
    num_calib_samples: Annotated[int, typer.Option(min=1)] = 32
    """Number of samples of --image-calib-data."""


METHODS = MethodOptions()


@app.command()
@with_option_groups
def quality(
    model: options.Model,
    out: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Output directory for quality.json and quality.html.",
            callback=options.output_directory,
        ),
    ],
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Input channels per scale. Default: the largest of 128, 64 and 32 that divides the layer widths."
        ),
    ] = None,
    methods: MethodOptions = METHODS,
    num_eval_sequences: Annotated[
        int, typer.Option(help="Number of 512-token evaluation sequences; 0 uses all.", min=0)
    ] = 0,
    easy_vqa: Annotated[Path | None, typer.Option(help="easy-VQA directory. Default: no accuracy is measured.")] = None,
    limit: Annotated[int, typer.Option(help="Approximate number of easy-VQA questions; 0 uses all.", min=0)] = 1000,
    checkpoint_options: CheckpointOptions = options.CHECKPOINT,
) -> None:
    """Compare [bold]MODEL[/bold] with its INT4 versions: NLL, KL divergence, accuracy."""
    from vila.bench.quality import markdown_table, measure_quality, quality_task, write_quality_report
    from vila.cli.progress import Screen
    from vila.core.files import portable_path
    from vila.core.system import system_info
    from vila.eval.benchmarks.easy_vqa import EasyVqa
    from vila.model.hub import local_folder
    from vila.model.loading import empty_model, load_model, open_checkpoint
    from vila.quant.blocks import check_layers
    from vila.quant.quantize import default_group_size

    folder = local_folder(model, checkpoint_options.revision or None)

    def load() -> tuple[Any, Any]:
        return load_model(folder, dtype="float32", **checkpoint_options.overrides)

    checkpoint = open_checkpoint(folder, **checkpoint_options.overrides)
    shapes, processor = empty_model(checkpoint), checkpoint.processor
    if easy_vqa is not None:
        EasyVqa(easy_vqa, limit)
    target = out.expanduser()
    with Screen() as screen:
        size = group_size or default_group_size(shapes)
        check_layers(shapes, size)
        asked = _ways(methods, processor, size, screen)
        what = quality_task(processor.tokenizer, max_blocks=num_eval_sequences, easy_vqa=easy_vqa, questions=limit)
        result = measure_quality(load, asked, what, target, events=screen)
    write_quality_report(result, {"model": portable_path(model, target), **system_info()}, target / "quality.html")
    typer.echo(markdown_table(result["ways"]), nl=False)
    typer.echo(f"{target / 'quality.html'}")


def _ways(flags: MethodOptions, processor: Any, group_size: int, screen: Any) -> list[Way]:
    from vila.bench.quality import Way
    from vila.cli.quantize import load_calibration
    from vila.quant.calibration import join_calibrations
    from vila.quant.quant_config import BEST, QuantConfig

    chosen = [name.strip() for name in flags.methods.split(",") if name.strip()]
    for name in chosen:
        if name not in WAYS:
            raise UnknownNameError("method", name, WAYS, field="--methods")
    if chosen[:1] != ["full"]:
        raise ConfigError(
            field="--methods", value=flags.methods, expected="full first; the others are compared with it"
        )

    def calibration(data: str, count: int) -> Calibration:
        return load_calibration([data], processor, count, flags.num_calib_samples, screen)

    awq = QuantConfig(group_size=group_size)
    out = []
    for name in chosen:
        if name == "full":
            out.append(Way(name))
        elif name == "rtn":
            out.append(Way(name, QuantConfig("rtn", group_size=group_size)))
        elif name == "awq":
            out.append(Way(name, awq, calibration("packaged", flags.num_calib_sequences)))
        elif name == "best":
            out.append(
                Way(name, replace(BEST, group_size=group_size), calibration("packaged", flags.num_calib_sequences_best))
            )
        else:
            if not flags.image_calib_data:
                hint = "give a recipe with image-text samples"
                raise ConfigError("required by awq-images", field="--image-calib-data", hint=hint)
            data = [calibration(source, flags.num_calib_sequences) for source in ("packaged", flags.image_calib_data)]
            out.append(Way(name, awq, join_calibrations(*data)))
    return out


# --- vila bench serve


@app.command()
def serve(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|URL", help="Model directory, which is served during the run, or URL of a server."
        ),
    ],
    served_model_name: Annotated[str, typer.Option(help="Model name at the server. Default: the first model.")] = "",
    max_concurrency: Annotated[
        str, typer.Option(metavar="N,N", help="Closed loop: numbers of concurrent requests, comma-separated.")
    ] = "1,4,8",
    request_rate: Annotated[
        str,
        typer.Option(
            metavar="R,R",
            help="Open loop: request rates per second with Poisson arrivals, comma-separated.",
        ),
    ] = "",
    num_prompts: Annotated[int, typer.Option(help="Number of prompts per load.", min=1)] = 32,
    input_len: Annotated[int, typer.Option(help="Approximate prompt length in tokens.", min=1)] = 64,
    output_len: Annotated[int, typer.Option(help="Maximum number of generated tokens per answer.", min=1)] = 128,
    images_per_prompt: Annotated[int, typer.Option(help="Number of images per prompt.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Random seed of prompts and arrivals.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Output directory for load.json and load.html.",
            callback=options.output_directory,
        ),
    ] = None,
    key: Annotated[str, typer.Option("--api-key-env", help="Environment variable with the API key.")] = "VILA_API_KEY",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Load-test a server: throughput, time to first token (TTFT) and inter-token latency (ITL)."""
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from vila.bench.serve import Server, make_requests, measure, save, served_model, table
    from vila.cli.progress import Screen
    from vila.core.files import portable_path
    from vila.core.optional import require_extra

    clients = [int(number) for number in _numbers("--max-concurrency", max_concurrency, whole=True)]
    rates = _numbers("--request-rate", request_rate)
    requests = make_requests(
        num_prompts, prompt_tokens=input_len, max_tokens=output_len, images=images_per_prompt, seed=seed
    )
    secret = os.environ.get(key, "")
    web = target.startswith(("http://", "https://"))
    base = target.rstrip("/") if target.rstrip("/").endswith("/v1") else f"{target.rstrip('/')}/v1"
    with ExitStack() as stack:
        if not web:
            require_extra("serve", "vila bench serve MODEL")
            from vila.serve.server import server_process

            started = stack.enter_context(server_process([target]))
            started.await_ready()
            base = started.base
        name = served_model_name or served_model(base, secret)
        screen = stack.enter_context(Screen())
        done = measure(Server(base, name, secret), requests, clients=clients, rates=rates, seed=seed, events=screen)
    facts = {
        "model": name,
        "requests": num_prompts,
        "prompt_tokens": input_len,
        "max_tokens": output_len,
        "images": images_per_prompt,
        "seed": seed,
        "server": target if web or out is None else portable_path(target, out),
    }
    paths = save(done, facts, out) if out else []
    if as_json:
        typer.echo(json.dumps({"facts": facts, "loads": [asdict(one) for one in done]}))
    else:
        header, rows = table(done)
        shown = Table(title=f"{name}: {num_prompts} prompts per load", title_justify="left")
        for column in header:
            shown.add_column(column, justify="left" if column == "load" else "right")
        for row in rows:
            shown.add_row(*row)
        console = Console(highlight=False)
        console.print(shown)
        for one in done:
            for words, count in one.problems:
                console.print(f"{one.load}: {count} x {words}", markup=False)
        for path in paths:
            console.print(str(path), markup=False)
    if not any(one.answered for one in done):
        raise VilaError("no prompt was answered")


def _numbers(option: str, text: str, *, whole: bool = False) -> list[float]:
    try:
        found = [int(part) if whole else float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [0]
    if any(number <= 0 for number in found):
        raise ConfigError(field=option, value=text, expected="comma-separated numbers above 0")
    return found
