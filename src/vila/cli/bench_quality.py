"""`vila bench quality`: what 4 bits cost, in full precision, rounded, and by AWQ in several ways."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vila.cli import options

if TYPE_CHECKING:
    from vila.bench.quality import Way
    from vila.quant.calibrate import Calibration

WAYS = ("full", "rtn", "awq", "awq-images", "best")


def quality(
    model: options.RequiredModel,
    out: Annotated[
        Path, typer.Option(help="Directory for quality.json and quality.html.", callback=options.output_directory)
    ],
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Inputs that share a scale; default: the largest of 128, 64 and 32 that divides the model's widths.",
            show_default=False,
        ),
    ] = None,
    ways: Annotated[
        str, typer.Option(help=f"What to compare, of {', '.join(WAYS)}; awq-images needs --image-calib.")
    ] = "full,rtn,awq,best",
    rows: Annotated[int, typer.Option(help="Rows of 512 tokens of text to calibrate awq with.", min=1)] = 2,
    best_rows: Annotated[int, typer.Option(help="Rows of 512 tokens of text to calibrate best with.", min=1)] = 16,
    image_calib: Annotated[
        str,
        typer.Option(metavar="RECIPE", help="Recipe whose mixture awq-images adds to the text.", show_default=False),
    ] = "",
    samples: Annotated[int, typer.Option(help="Conversations taken of it.", min=1)] = 32,
    blocks: Annotated[int, typer.Option(help="Blocks of 512 tokens to measure on; 0 takes all.", min=0)] = 0,
    easy_vqa: Annotated[
        Path | None, typer.Option(help="easy-VQA folder; without it no questions are asked.", show_default=False)
    ] = None,
    questions: Annotated[int, typer.Option(help="Take about this many questions; 0 takes all.", min=0)] = 1000,
    template: options.Template = "",
    base: options.Base = "",
    revision: options.Revision = "",
) -> None:
    """Compare [bold]MODEL[/bold] with its quantized selves, and write tables and plots."""
    from vila.bench.quality import measure_quality, quality_task
    from vila.bench.quality_report import markdown_table, write_quality_report
    from vila.cli.progress import Screen
    from vila.core.files import portable_path
    from vila.core.machine import machine_facts
    from vila.eval.benchmarks.easy_vqa import EasyVqa
    from vila.model.build import empty_model
    from vila.model.hub import local_folder
    from vila.model.load import load_model, open_checkpoint
    from vila.quant.blocks import check_layers
    from vila.quant.checkpoint import default_group_size

    folder = local_folder(model, revision or None)

    def load() -> tuple[Any, Any]:
        return load_model(folder, dtype="float32", template=template or None, base=base or None)

    checkpoint = open_checkpoint(folder, template=template or None, base=base or None)
    shapes, processor = empty_model(checkpoint), checkpoint.processor
    if easy_vqa is not None:
        EasyVqa(easy_vqa, questions)
    target = out.expanduser()
    with Screen() as screen:
        size = group_size or default_group_size(shapes)
        check_layers(shapes, size)
        asked = _ways(ways, processor, size, rows, best_rows, image_calib, samples, screen)
        what = quality_task(processor.tokenizer, max_blocks=blocks, easy_vqa=easy_vqa, questions=questions)
        result = measure_quality(load, asked, what, target, events=screen)
    write_quality_report(result, {"model": portable_path(model, target), **machine_facts()}, target / "quality.html")
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
    from vila.quant.calibrate import join_calibrations
    from vila.quant.checkpoint import BEST, Request, with_group

    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in WAYS:
            raise UnknownNameError("way of quantizing", name, WAYS)
    if chosen[:1] != ["full"]:
        raise ConfigError(f"--ways {names}: the first one is full, which the others are compared with")

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
                    "awq-images needs --image-calib RECIPE, whose mixture holds conversations on pictures"
                )
            pictures = calibration_of([image_calib], processor, rows, samples, screen)
            out.append(Way(name, awq, join_calibrations(text(rows), pictures)))
    return out
