"""`vila submit`: write submission files for benchmarks with an evaluation server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vila.cli import options


def submit(
    run: Annotated[Path, typer.Argument(help="Output directory of vila eval.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Output directory. Default: playground/data/predictions_upload/NAME.",
            callback=options.output_directory,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Benchmark data, such as playground/data/eval. Default: --data of the run."),
    ] = None,
) -> None:
    """Write and check submission files for the VQAv2, VizWiz and MMBench servers, and print the upload pages."""
    from vila.core.errors import DataError
    from vila.core.files import check_writable
    from vila.eval.report_data import read_run
    from vila.eval.submit import format_submissions, submit_run

    seen = read_run(run)
    run = run.resolve()
    where = data or Path(seen.data or "playground/data/eval")
    target = out or Path("playground/data/predictions_upload") / run.name
    check_writable(target, field="--output")
    folders = {name: folder.name for name, folder in seen.folders.items()}
    written, left_out = submit_run(run, target, where, folders, seen.left_out)
    for line in format_submissions(written, left_out):
        typer.echo(line)
    if not written:
        raise DataError("nothing to submit", file=run)
