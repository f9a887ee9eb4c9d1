"""`vila eval`: benchmarks on a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[Path, typer.Argument(help="Model directory.")],
    benchmarks: Annotated[str, typer.Option(help="Names, separated by commas.")] = "easy_vqa",
    data: Annotated[
        Path | None, typer.Option(help="Directory of the benchmark's data; easy_vqa is fetched when not given.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where predictions and scores go; default: eval/ beside the model.")
    ] = None,
    questions: Annotated[int, typer.Option(help="Take about this many questions; 0 takes all.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Score [bold]MODEL[/bold] on benchmarks; an interrupted evaluation goes on where it was."""
    import json

    from rich.console import Console

    from vila.cli.progress import Screen
    from vila.cli.tables import score_table
    from vila.core.files import cache_dir
    from vila.engine.engine import Engine
    from vila.eval.benchmark import BENCHMARKS
    from vila.eval.runner import model_hash, result_dir, run
    from vila.starter.easy_vqa import obtain_easy_vqa

    names = [name.strip() for name in benchmarks.split(",") if name.strip()]
    opened = {name: BENCHMARKS[name] for name in names}
    root = out or model.parent / "eval"
    with Screen() as screen:
        engine = Engine.load(model, dtype=dtype)
        results = []
        for name, open_benchmark in opened.items():
            folder = data or obtain_easy_vqa(cache_dir(), screen)
            benchmark = open_benchmark(folder, questions)
            results.append(
                run(engine, benchmark, result_dir(root, name, questions), model=model_hash(model), events=screen)
            )
    for result in results:
        if as_json:
            typer.echo(json.dumps({"benchmark": result.benchmark, **result.scores}))
        else:
            Console(highlight=False).print(score_table(result))
