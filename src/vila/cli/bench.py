"""`vila bench`: measurements that users run on their own machine."""

from __future__ import annotations

import os
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vila.cli import options
from vila.cli.options import CheckpointOptions, with_option_groups
from vila.core.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from vila.bench.decode import Load, Result
    from vila.bench.quality import Way
    from vila.quant.calibration import Calibration


# --- bench_decode
# `vila bench decode`: tokens a second of a checkpoint or of a known shape, by backend and number type.


SHAPE_NAMES = ("vila-7b", "vila-13b", "tinyllama", "smollm", "tiny")
"""Shapes that are measured with random weights; written here because help loads no torch."""


class Precision(StrEnum):
    """What the weights of the LLM's blocks are."""

    INT4 = "int4"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


def decode(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="A checkpoint; its weights stay as they are.", show_default=False)
    ] = "",
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"A known size, random weights: {', '.join(SHAPE_NAMES)}. May be given several times.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        list[Precision] | None,
        typer.Option(
            parser=options.one_of(Precision, "precision"),
            metavar=options.names_in(Precision),
            help="Weights of a shape. May be given several times; default: int4.",
            show_default=False,
        ),
    ] = None,
    group_size: Annotated[
        int, typer.Option(help="Inputs of a group of 4-bit weights; 0: 128, or 64 where 128 does not fit.", min=0)
    ] = 0,
    backend: options.BackendFlag = options.Backend.AUTO,
    lm_head_bits: options.LMHeadBits = 0,
    activation_bits: options.ActivationBits = 0,
    threads: options.Threads = None,
    device: options.DeviceFlag = options.Device.AUTO,
    input_len: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of a prompt. May be given several times; default: 16.", min=1, show_default=False),
    ] = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(help="Prompts at a time. May be given several times; default: 1.", min=1, show_default=False),
    ] = None,
    output_len: Annotated[int, typer.Option(help="New tokens of each answer.", min=2)] = 128,
    num_iters: Annotated[int, typer.Option(help="Measured runs, after one that warms up.", min=1)] = 5,
    check_tokens: Annotated[
        int, typer.Option(help="Tokens on which the choice is compared with the reference's; 0 is off.", min=0)
    ] = 512,
    out: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="JSON file of all figures.", show_default=False, callback=options.output_file
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON instead of tables.")] = False,
) -> None:
    """Measure prompts and steps: vila bench decode --shape tinyllama, or vila bench decode MODEL"""
    import json

    from vila.cli.options import LoadOptions, check_backend_flags, choose_device, set_num_threads
    from vila.cli.progress import Screen
    from vila.core.files import write_json
    from vila.core.system import system_info, version

    if bool(model) == bool(shape):
        raise ConfigError("what to measure? Give a MODEL, or one or several --shape, and not both")
    if model and (precision or group_size):
        raise ConfigError("--precision and --group-size are of a --shape; a checkpoint has its own")
    where = choose_device(device.value)
    chosen: dict[str, Any] = {"backend": backend, "head_bits": lm_head_bits, "activation_bits": activation_bits}
    check_backend_flags(LoadOptions(backend=backend, lm_head_bits=lm_head_bits, activation_bits=activation_bits), where)
    _check_shapes(shape or [], precision or [Precision.INT4], group_size)
    set_num_threads(threads)
    loads = _loads(input_len or [16], batch_size or [1], output_len, num_iters, check_tokens)
    results: list[Result] = []
    with Screen() as screen:
        for opened in _models(model, shape or [], precision or [Precision.INT4], group_size, where, loads):
            results += _measured(opened, chosen, loads, screen)
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
    from vila.bench.decode import device_table, result_table

    typer.echo(json.dumps(facts))
    typer.echo(result_table(results) + "\n")
    if any(name in ("vila-7b", "vila-13b") for name in shape or ()):
        typer.echo(device_table(results, _device_name(where)))


def _check_shapes(shapes: list[str], precisions: list[Precision], group_size: int) -> None:
    """Raise UnknownNameError for a shape that is not known, ConfigError for groups that do not fill one."""
    for name in shapes:
        if name not in SHAPE_NAMES:
            raise UnknownNameError("shape", name, SHAPE_NAMES, field="--shape")
    if shapes and Precision.INT4 in precisions:
        from vila.bench.model_shapes import SHAPES, check_groups

        for name in shapes:
            check_groups(SHAPES[name], group_size)


def _loads(contexts: list[int], batches: list[int], tokens: int, runs: int, check: int) -> list[Load]:
    from vila.bench.decode import Load

    # The text that is compared is the same under every load, so it is compared once.
    pairs = [(context, batch) for context in contexts for batch in batches]
    return [Load(context, batch, tokens, runs, 0 if number else check) for number, (context, batch) in enumerate(pairs)]


def _models(
    model: str, shapes: list[str], precisions: list[Precision], group_size: int, device: str, loads: list[Load]
) -> Any:
    """Titles and models, one in memory at a time."""
    import torch

    if model:
        from vila.cli.options import open_model
        from vila.model.loading import build_model, choose_dtype

        checkpoint = open_model(model)
        yield Path(model).name, build_model(checkpoint, choose_dtype("auto", device), device)
        return
    from vila.bench.model_shapes import SHAPES, random_model

    context = max(512, *(load.context + load.tokens for load in loads), *(load.check + 1 for load in loads))
    for name in shapes:
        for kind in precisions:
            four_bit = kind is Precision.INT4
            size = (group_size or (64 if SHAPES[name].width % 128 else 128)) if four_bit else 0
            # Beside 4-bit weights stand embeddings and a head in what the device computes in.
            dtype = ("float32" if device == "cpu" else "float16") if four_bit else kind.value
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


# --- bench_quality
# `vila bench quality`: what 4 bits cost, in full precision, rounded, and by AWQ in several ways.


WAYS = ("full", "rtn", "awq", "awq-images", "best")


@with_option_groups
def quality(
    model: options.RequiredModel,
    out: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Directory for quality.json and quality.html.", callback=options.output_directory
        ),
    ],
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Inputs that share a scale; default: the largest of 128, 64 and 32 that divides the model's widths.",
            show_default=False,
        ),
    ] = None,
    methods: Annotated[
        str, typer.Option(help=f"What to compare, of {', '.join(WAYS)}; awq-images needs --image-calib-data.")
    ] = "full,rtn,awq,best",
    num_calib_sequences: Annotated[
        int, typer.Option(help="Rows of 512 tokens of text to calibrate awq with.", min=1)
    ] = 2,
    num_calib_sequences_best: Annotated[
        int, typer.Option(help="Rows of 512 tokens of text to calibrate best with.", min=1)
    ] = 16,
    image_calib_data: Annotated[
        str,
        typer.Option(metavar="RECIPE", help="Recipe whose mixture awq-images adds to the text.", show_default=False),
    ] = "",
    num_calib_samples: Annotated[int, typer.Option(help="Conversations taken of it.", min=1)] = 32,
    num_eval_sequences: Annotated[
        int, typer.Option(help="Blocks of 512 tokens to measure on; 0 takes all.", min=0)
    ] = 0,
    easy_vqa: Annotated[
        Path | None, typer.Option(help="easy-VQA folder; without it no questions are asked.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option(help="Take about this many questions; 0 takes all.", min=0)] = 1000,
    checkpoint_options: CheckpointOptions = options.CHECKPOINT,
) -> None:
    """Compare [bold]MODEL[/bold] with its quantized selves, and write tables and plots."""
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
        asked = _ways(
            methods,
            processor,
            size,
            num_calib_sequences,
            num_calib_sequences_best,
            image_calib_data,
            num_calib_samples,
            screen,
        )
        what = quality_task(processor.tokenizer, max_blocks=num_eval_sequences, easy_vqa=easy_vqa, questions=limit)
        result = measure_quality(load, asked, what, target, events=screen)
    write_quality_report(result, {"model": portable_path(model, target), **system_info()}, target / "quality.html")
    typer.echo(markdown_table(result["ways"]), nl=False)
    typer.echo(f"{target / 'quality.html'}")


def _ways(
    names: str,
    processor: Any,
    group_size: int,
    rows: int,
    best_rows: int,
    image_calib: str,
    samples: int,
    screen: Any,
) -> list[Way]:
    from vila.bench.quality import Way
    from vila.cli.quantize import calibration_of
    from vila.core.errors import ConfigError, UnknownNameError
    from vila.quant.calibration import join_calibrations
    from vila.quant.quantize import BEST, Request, with_group

    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in WAYS:
            raise UnknownNameError("way of quantizing", name, WAYS)
    if chosen[:1] != ["full"]:
        raise ConfigError(f"--methods {names}: the first one is full, which the others are compared with")

    def text(count: int) -> Calibration:
        return calibration_of(["packaged"], processor, count, samples, screen)

    awq = with_group(Request(), group_size)
    out = []
    for name in chosen:
        if name == "full":
            out.append(Way(name))
        elif name == "rtn":
            out.append(Way(name, with_group(Request("rtn"), group_size)))
        elif name == "awq":
            out.append(Way(name, awq, text(rows)))
        elif name == "best":
            out.append(Way(name, with_group(BEST, group_size), text(best_rows)))
        else:
            if not image_calib:
                raise ConfigError(
                    "awq-images needs --image-calib-data RECIPE, whose mixture holds conversations on pictures"
                )
            pictures = calibration_of([image_calib], processor, rows, samples, screen)
            out.append(Way(name, awq, join_calibrations(text(rows), pictures)))
    return out


# --- bench_serve
# `vila bench serve`: load on a server, its own or anybody's.


def serve(
    target: Annotated[
        str,
        typer.Argument(metavar="MODEL|URL", help="A directory, served for the time of the run; or a server's address."),
    ],
    served_model_name: Annotated[
        str, typer.Option(help="Name of the model at the server; default: its first.", show_default=False)
    ] = "",
    max_concurrency: Annotated[
        str, typer.Option(metavar="N,N", help="Closed loops: so many clients that wait for their answers.")
    ] = "1,4,8",
    request_rate: Annotated[
        str, typer.Option(metavar="R,R", help="Open loops: so many arrivals a second, Poisson.", show_default=False)
    ] = "",
    num_prompts: Annotated[int, typer.Option(help="Questions of each load.", min=1)] = 32,
    input_len: Annotated[int, typer.Option(help="Length of a question's text, about.", min=1)] = 64,
    output_len: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 128,
    images_per_prompt: Annotated[int, typer.Option(help="Pictures in each question.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Of questions and arrivals.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Directory for load.json and load.html.",
            show_default=False,
            callback=options.output_directory,
        ),
    ] = None,
    key: Annotated[
        str, typer.Option("--api-key-env", help="Environment variable that holds the key.")
    ] = "VILA_API_KEY",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Ask many questions at once; print throughput, time to the first token and between tokens."""
    import json

    from rich.console import Console
    from rich.table import Table

    from vila.core.optional import require_extra

    require_extra("serve", "vila bench serve")
    from vila.bench.serve import Server, measure, questions, save, served_model, table
    from vila.cli.progress import Screen
    from vila.core.errors import VilaError
    from vila.core.files import portable_path
    from vila.serve.server import server_process

    clients = [int(number) for number in _numbers("--max-concurrency", max_concurrency, whole=True)]
    rates = _numbers("--request-rate", request_rate)
    asked = questions(num_prompts, prompt_tokens=input_len, max_tokens=output_len, images=images_per_prompt, seed=seed)
    secret = os.environ.get(key, "")
    web = target.startswith(("http://", "https://"))
    base = target.rstrip("/") if target.rstrip("/").endswith("/v1") else f"{target.rstrip('/')}/v1"
    with ExitStack() as stack:
        if not web:
            started = stack.enter_context(server_process([target]))
            started.await_ready()
            base = started.base
        name = served_model_name or served_model(base, secret)
        screen = stack.enter_context(Screen())
        done = measure(Server(base, name, secret), asked, clients=clients, rates=rates, seed=seed, events=screen)
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
        typer.echo(json.dumps({"facts": facts, "loads": [one.as_json() for one in done]}))
    else:
        header, rows = table(done)
        shown = Table(title=f"{name}: {num_prompts} questions a load", title_justify="left")
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
        raise VilaError("no question was answered")


def _numbers(option: str, text: str, *, whole: bool = False) -> list[float]:
    from vila.core.errors import ConfigError

    try:
        found = [int(part) if whole else float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [0]
    if any(number <= 0 for number in found):
        raise ConfigError(f"{option} {text}: numbers above 0, with commas between them")
    return found


app = typer.Typer(help="Measure speed and quality on this machine.", no_args_is_help=True, rich_markup_mode="rich")
app.command()(decode)
app.command()(quality)
app.command()(serve)
