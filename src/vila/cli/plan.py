"""`vila plan`: estimate memory, batch, time and disk space of a recipe on a machine, without running it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vila.core.errors import ConfigError

if TYPE_CHECKING:
    from vila.plan.planner import Plan

_DATA = "Data"
_NAMED = 3
_GIB = 2**30


def plan(
    recipe: Annotated[str, typer.Argument(help="Packaged recipe (vila_7b/3_sft, ...) or a .yaml file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Recipe fields to override: batch.micro=4 stage.lora.rank=64 ...")
    ] = None,
    gpus: Annotated[
        str, typer.Option(help="Number and type of GPUs: 8xA100-80G, 128xH100, RTX-4090, ...")
    ] = "8xA100-80G",
    mfu: Annotated[
        float | None,
        typer.Option(
            help="Model FLOPs utilization, 0.01 to 1. Default: the utilization of the original training.",
            min=0.01,
            max=1.0,
        ),
    ] = None,
    num_samples: Annotated[
        int | None,
        typer.Option(
            help="Samples per epoch, for data sets without published sizes.",
            min=1,
            rich_help_panel=_DATA,
        ),
    ] = None,
    text_tokens: Annotated[
        float, typer.Option(help="Mean number of text tokens per sample.", min=1, rich_help_panel=_DATA)
    ] = 200.0,
    images_per_sample: Annotated[
        float, typer.Option(help="Mean number of images per sample.", min=0, rich_help_panel=_DATA)
    ] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, sizes in bytes.")] = False,
) -> None:
    """Estimate memory, batch, time and disk space of [bold]RECIPE[/bold]. Exit code 2 if it does not fit."""
    from vila.config.load import load_recipe
    from vila.plan.devices import parse_machine
    from vila.plan.planner import make_plan
    from vila.plan.published_data import DataStats

    data = (
        None
        if num_samples is None
        else DataStats(num_samples, images_per_sample, text_tokens, text_tokens / 2, ("as given",))
    )
    made = make_plan(load_recipe(recipe, overrides or []), parse_machine(gpus), mfu=mfu, data=data)
    if as_json:
        typer.echo(json.dumps(as_plain(made), ensure_ascii=False))
    else:
        for name, value in lines(made):
            typer.echo(f"{name:<16}{value}")
    if not made.fits:
        raise _does_not_fit(made)


def as_plain(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain data."""
    from dataclasses import asdict

    facts = asdict(plan)
    facts["machine"] = {"text": plan.machine.text, **facts["machine"]}
    facts["memory"]["total"] = plan.memory.total
    if plan.duration:
        facts["duration"]["flops"]["total"] = plan.duration.flops.total
    return {**facts, "fits": plan.fits}


def lines(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield name and text of each printed line."""
    from vila.plan.planner import PUBLISHED_BATCH

    batch, machine = plan.batch, plan.machine
    yield "recipe", f"{plan.recipe} on {machine.text}, {machine.device.tflops:g} TFLOPS each"
    total, trained = sum(plan.parameters.values()), sum(plan.trainable.values())
    yield "parameters", f"{total:,}, {trained:,} trainable"
    yield "", f"{'GiB a GPU':<14}{'weights':>10}{'gradients':>11}{'optimizer':>11}{'activations':>13}"
    for name, part in plan.parts.items():
        cells = (
            f"{_gib(part.weights):>10}{_gib(part.gradients):>11}{_gib(part.optimizer):>11}{_gib(part.activations):>13}"
        )
        yield "", f"{name:<14}{cells}"
    yield "peak", _peak(plan)
    reduced = (
        "" if batch.micro == batch.asked_micro else f" (batch.micro={batch.asked_micro} exceeds the batch of one GPU)"
    )
    yield "micro-batch", f"{batch.micro} {batch.unit}{reduced}; largest that fits: {plan.largest_micro_batch or 'none'}"
    yield "step", f"{batch.size} {batch.unit} = {machine.gpus} GPUs x {batch.micro} x {batch.accumulation} accumulated"
    about = f"{batch.samples:,.0f} samples and " if batch.samples else ""
    published = f"; published: {PUBLISHED_BATCH[plan.stage]:,} samples" if plan.is_published else ""
    yield "", f"about {about}{batch.tokens:,.0f} tokens{published}"
    yield from _time(plan)
    traffic = plan.traffic
    if machine.gpus > 1:
        received = f"a GPU receives {(traffic.intra_node + traffic.inter_node) / 1e9:,.1f} GB a step"
        across = f"{traffic.inter_node / 1e9:,.1f} of it from other nodes"
        yield "traffic", f"{received}, {across}: about {traffic.total_seconds:,.2f} s, in addition to compute"
    disk = {name: f"{size / 1e9:,.1f} GB" for name, size in plan.disk.items()}
    yield (
        "disk",
        f"{disk['checkpoint']} a checkpoint, {disk['checkpoints']} while one is written; model {disk['model']}",
    )


def _peak(plan: Plan) -> str:
    memory = plan.memory
    named = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "gathered": memory.gathered,
        "activations": memory.activations,
        "working": memory.working,
    }
    parts = " + ".join(f"{name} {_gib(size)}" for name, size in named.items() if size >= 0.005 * _GIB)
    return f"{_gib(memory.total)} of {_gib(plan.usable)} GiB usable: {parts}"


def _time(plan: Plan) -> Iterator[tuple[str, str]]:
    duration = plan.duration
    if duration is None:
        names = ", ".join(plan.unknown[:_NAMED]) + (
            f" and {more} more" if (more := len(plan.unknown) - _NAMED) > 0 else ""
        )
        yield (
            "time",
            f"unknown: no published size of {names}; give --num-samples, --text-tokens and --images-per-sample",
        )
        return
    flops = duration.flops
    yield (
        "",
        f"{flops.total / 1e12:,.0f} TFLOP: blocks {flops.blocks / flops.total:.0%}, "
        f"attention {flops.attention / flops.total:.0%}, head {flops.head / flops.total:.0%}, "
        f"tower {flops.tower / flops.total:.0%}, projector {flops.projector / flops.total:.0%}",
    )
    days = f" ({duration.hours / 24:,.1f} days)" if duration.hours >= 48 else ""
    yield "time", f"{duration.hours:,.1f} hours{days}, {duration.gpu_hours:,.0f} GPU-hours at {duration.mfu:.0%} MFU"
    yield "", f"{duration.steps:,} steps of {duration.step_s:,.1f} s, {duration.tokens / 1e9:,.2f} billion tokens"
    for source in plan.data.sources if plan.data else ():
        yield "data", source


def _does_not_fit(plan: Plan) -> ConfigError:
    hint = "it fits on no number of these GPUs that divides the batch; choose a smaller model"
    if plan.remedies:
        hint = f"configurations that fit: {' | '.join(plan.remedies)}"
    problem = f"{plan.recipe} needs {_gib(plan.memory.total)} GiB per GPU, {_gib(plan.usable)} GiB are usable"
    return ConfigError(problem, field="--gpus", value=plan.machine.text, hint=hint)


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f}"
