"""`vila bench decode`: tokens a second of a checkpoint or of a known shape, by backend and number type."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vila.cli import options
from vila.core.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from vila.bench.decode import Load, Result


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
    head_bits: options.HeadBits = None,
    activation_bits: options.ActivationBits = None,
    threads: options.Threads = None,
    device: options.DeviceFlag = options.Device.AUTO,
    context: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of a prompt. May be given several times; default: 16.", min=1, show_default=False),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Prompts at a time. May be given several times; default: 1.", min=1, show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option(help="New tokens of each answer.", min=2)] = 128,
    runs: Annotated[int, typer.Option(help="Measured runs, after one that warms up.", min=1)] = 5,
    check: Annotated[
        int, typer.Option(help="Tokens on which the choice is compared with the reference's; 0 is off.", min=0)
    ] = 512,
    out: Annotated[
        Path | None, typer.Option(help="JSON file of all figures.", show_default=False, callback=options.output_file)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON instead of tables.")] = False,
) -> None:
    """Measure prompts and steps: vila bench decode --shape tinyllama, or vila bench decode MODEL"""
    import json

    from vila.cli.loading import Loading, check_backend_flags, choose_device, take_threads
    from vila.cli.progress import Screen
    from vila.core.files import write_json
    from vila.core.machine import machine_facts, version

    if bool(model) == bool(shape):
        raise ConfigError("what to measure? Give a MODEL, or one or several --shape, and not both")
    if model and (precision or group_size):
        raise ConfigError("--precision and --group-size are of a --shape; a checkpoint has its own")
    where = choose_device(device.value)
    chosen: dict[str, Any] = {"backend": backend.value, "head_bits": head_bits or 0}
    chosen["activation_bits"] = activation_bits or 0
    check_backend_flags(Loading(model, **chosen), where)
    _check_shapes(shape or [], precision or [Precision.INT4], group_size)
    take_threads(threads or 0)
    loads = _loads(context or [16], batch or [1], tokens, runs, check)
    results: list[Result] = []
    with Screen() as screen:
        for opened in _models(model, shape or [], precision or [Precision.INT4], group_size, where, loads):
            results += _measured(opened, chosen, loads, screen)
    facts = {
        **machine_facts(),
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
    from vila.bench.decode_table import device_table, result_table

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
        from vila.bench.shapes import SHAPES, check_groups

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
        from vila.cli.loading import Loading, open_model
        from vila.model.build import build_model
        from vila.model.precision import choose_dtype

        checkpoint = open_model(Loading(model))
        yield Path(model).name, build_model(checkpoint, choose_dtype("auto", device), device)
        return
    from vila.bench.shapes import SHAPES, random_model

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

    from vila.core.machine import processor_name

    return processor_name() if device == "cpu" else torch.cuda.get_device_name()


def _threads() -> int:
    import torch

    return torch.get_num_threads()
