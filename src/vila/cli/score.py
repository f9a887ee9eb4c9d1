"""`vila score`: score a file of predictions from any source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vila.cli.eval import DEFAULT_JUDGE, JudgeModelOption, JudgeOption

if TYPE_CHECKING:
    from vila.eval.benchmark import BenchmarkResult


def score(
    benchmark: Annotated[str, typer.Argument(help="Name of the benchmark.")],
    data: Annotated[
        Path, typer.Option(help="Benchmark data: playground/data/eval, or the benchmark's directory in it.")
    ],
    predictions: Annotated[
        Path,
        typer.Option(
            help="predictions.jsonl of vila eval, an answer file of the original scripts, or a directory of its chunks."
        ),
    ],
    protocol: Annotated[
        str, typer.Option(help="Scoring protocol: upstream (the original scripts) or lmms-eval.")
    ] = "upstream",
    compare: Annotated[
        Path | None, typer.Option(help="Second predictions file for a paired significance test.")
    ] = None,
    judge: JudgeOption = "",
    judge_model: JudgeModelOption = DEFAULT_JUDGE,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score predictions with the published metric of a benchmark: percent, points for MME."""
    import json

    from vila.cli.eval import parse_protocol
    from vila.cli.progress import Screen
    from vila.core.errors import ConfigError
    from vila.eval.benchmark import BENCHMARKS, parse_benchmark_names
    from vila.eval.judge import NotJudgedError, attach_judge, check_judge
    from vila.eval.significance import compare_paired as compared
    from vila.eval.significance import score_interval

    check_judge(judge)
    names = parse_benchmark_names(benchmark)
    if len(names) != 1:
        raise ConfigError(field="BENCHMARK", value=benchmark, expected="one benchmark")
    opened = BENCHMARKS[names[0]](data, 0)
    rules = parse_protocol(protocol)
    with Screen() as screen:
        attach_judge(opened, judge, judge_model, predictions.parent, screen)
        try:
            result = score_file(opened, predictions, rules)
            other = score_file(opened, compare, rules) if compare else None
        except NotJudgedError as waiting:
            row = {"benchmark": names[0], "protocol": rules, "score": None, "problem": str(waiting)}
            typer.echo(json.dumps(row, ensure_ascii=False) if as_json else f"{names[0]}: {waiting}")
            return
    sure = score_interval(result)
    facts: dict[str, Any] = {
        "benchmark": names[0],
        "protocol": rules,
        "score": result.score,
        "unit": result.unit,
        "interval": sure.as_json() if sure else None,
        "notes": list(result.notes),
        **result.metrics,
    }
    if other:
        facts["compared"] = {"score": other.score, **compared(other.question_scores, result.question_scores).as_json()}
        alone = len(other.question_scores) + len(result.question_scores) - 2 * facts["compared"]["questions"]
        if alone:
            facts["notes"].append(f"{alone} questions are in one of the files only and are not compared")
    if as_json:
        typer.echo(json.dumps(facts, ensure_ascii=False))
        return
    typer.echo(f"{names[0]}: {result.score:.2f} {result.unit}  ({rules} protocol)")
    for name, value in _lines(result.metrics):
        typer.echo(f"  {name}: {value}")
    for note in facts["notes"]:
        typer.echo(f"  note: {note}")
    if compare:
        found = facts["compared"]
        typer.echo(
            f"  against {compare}: {found['difference']:+.2f} points, 95 % from {found['low']:+.2f} to "
            f"{found['high']:+.2f}, p = {found['p']:.3f}; {found['better']} better, {found['worse']} worse"
        )


def score_file(benchmark: Any, path: Path, rules: Any) -> BenchmarkResult:
    """Score a predictions file. Raises DataError for invalid lines, unless the benchmark skips them."""
    from dataclasses import replace

    from vila.eval.predictions import bad_line_notes, read_answers

    answers = read_answers(path)
    notes = bad_line_notes(answers.bad, skipped=benchmark.skips_bad_lines)
    if answers.failed:
        notes.append(f"{len(answers.failed)} questions have no answer because of errors, first {answers.failed[0]}")
    result: BenchmarkResult = benchmark.score(answers.answers, rules)
    return replace(result, notes=(*notes, *result.notes))


def _lines(metrics: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in metrics.items():
        if isinstance(value, dict):
            rows += _lines(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", f"{value:.6g}" if isinstance(value, float) else value))
    return rows
