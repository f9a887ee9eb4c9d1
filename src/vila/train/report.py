"""`report.html` of a run, self-contained: losses, evaluations, answers, throughput, data, skipped steps and samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from vila.config.load import tree_to_yaml
from vila.core.errors import DataError, MediaError
from vila.core.files import resolve_path, without_home
from vila.core.reading import Fields, file_errors
from vila.report.html import Card, Cell, Figure, Page, embed
from vila.report.numbers import write_number, write_percent, write_seconds
from vila.report.plots import Group, Series, bar_plot, line_plot
from vila.train.checkpoint import checkpoint_folders
from vila.train.report_data import (
    Curve,
    Row,
    StepCurves,
    ThinnedRecords,
    read_answers,
    read_evaluations,
    read_first_records,
)

_CARDS_SHOWN = 24
_LONGEST = 600
"""Maximum number of characters of a displayed answer or reason."""


def add_scores(page: Page, evaluations: Mapping[str, ThinnedRecords]) -> None:
    """Add the scores of evaluations over time."""
    drawn = {name: rows.shown for name, rows in evaluations.items()}
    if not drawn:
        return
    page.section("Evaluation", "Scores on a fixed set of questions during training.")
    series = [Series(name, [(row["step"], _score(row)) for row in rows]) for name, rows in drawn.items()]
    if any(len(rows) > 1 for rows in drawn.values()):
        page.plot(line_plot(series, title="Score", x_label="step"))
    table: list[list[Cell]] = [
        [name, row["step"], write_score(row), row.get("items"), _seconds(row.get("seconds"))]
        for name, rows in drawn.items()
        for row in rows
    ]
    page.table(["benchmark", "step", "score", "questions", "time"], table)
    problems = [
        (f"step {row['step']:,}", row["problem"]) for rows in drawn.values() for row in rows if "problem" in row
    ]
    if problems:
        page.table((), problems[-10:], "Evaluations without a score")


def add_answers(page: Page, answers: Mapping[tuple[str, str], ThinnedRecords], folder: Path) -> None:
    """Add the answers to each prompt by step. An image that cannot be read is replaced by its error.

    folder: directory of the run, which image paths are relative to.
    """
    if not answers:
        return
    page.section("Answers", "Fixed prompts, answered greedily during training.")
    shown = list(answers.items())[:_CARDS_SHOWN]
    page.gallery([_card(prompt, image, rows.shown[-1], folder) for (prompt, image), rows in shown], "Newest answers.")
    for (prompt, image), rows in shown:
        if rows.count > 1:
            about = f" ({Path(image).name})" if image else ""
            table = [[f"{row['step']:,}", _answer(row)] for row in rows.shown]
            page.details(_short(prompt, 120) + about).table(["step", "answer"], table)
    if len(answers) > len(shown):
        page.text(f"{len(answers) - len(shown)} more prompts are in answers.jsonl.")


def _card(prompt: str, image: str, row: Row, folder: Path) -> Card:
    path = str(resolve_path(image, folder)) if image else ""
    lines = [("", _short(prompt)), (f"step {row['step']:,}", _answer(row))]
    try:
        if path:
            embed(path)
    except MediaError as error:
        return Card(None, [*lines, ("image", without_home(str(error)))])
    return Card(path or None, lines)


def _answer(row: Row) -> str:
    return _short(row["answer"]) if not row.get("error") else f"no answer: {_short(without_home(row['error']))}"


def add_trouble(page: Page, folder: Path) -> None:
    """Add skipped steps, and samples that could not be read."""
    faults, fault_count = read_first_records(folder / "faults.jsonl", "position")
    bad, bad_count = read_first_records(folder / "bad_steps.jsonl")
    if not (fault_count or bad_count):
        return
    page.section("Skipped", "Skipped steps and samples, with reasons.")
    if bad_count:
        steps_of: list[list[Cell]] = [
            [f"{row['step']:,}", str(row.get("loss")), str(row.get("grad_norm")), _ids(row.get("ids", []))]
            for row in bad
        ]
        caption = _of(
            len(bad), bad_count, "skipped, because loss or gradient was not finite; the weights were not updated"
        )
        page.table(["step", "loss", "gradient", "samples"], steps_of, caption)
    if fault_count:
        reasons: list[list[Cell]] = [
            [f"{row['position']:,}", _short(without_home(str(row["reason"])))] for row in faults
        ]
        page.table(["position", "reason"], reasons, _of(len(faults), fault_count, "that could not be read"))


def _score(row: Row) -> float:
    return float("nan") if row.get("score") is None else float(row["score"])


def write_score(row: Row) -> str | None:
    """Return the score of an evaluation with its unit."""
    if row.get("score") is None:
        return None
    unit = str(row.get("unit", ""))
    return f"{row['score']:.1f}\N{NO-BREAK SPACE}%" if unit == "%" else f"{write_number(row['score'])} {unit}".strip()


def _seconds(value: float | None) -> str | None:
    return None if value is None else write_seconds(value)


def _short(text: str, limit: int = _LONGEST) -> str:
    return text if len(text) <= limit else f"{text[:limit].rstrip()}\N{HORIZONTAL ELLIPSIS}"


def _ids(ids: Sequence[str]) -> str:
    return ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")


def _of(shown: int, count: int, what: str) -> str:
    return f"All {count:,} {what}." if shown == count else f"The first {shown} of {count:,} {what}."


_LINES_DRAWN = 12


def write_report(folder: Path) -> Path:
    """Write `report.html` of a run, finished or not, from the files in its directory; return its path.

    Size and memory are bounded: curves of long runs are downsampled, keeping extremes. Sections of missing files are
    omitted.
    Raises DataError naming file and line of invalid JSON.
    """
    return RunReport(folder).write()


class RunReport:
    """Report of a run in progress: each `write` reads only the steps since the last one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._steps = StepCurves(folder / "metrics.jsonl")

    def write(self) -> Path:
        """Write the report as `write_report` does."""
        self._steps.read()
        path = self.folder / "report.html"
        _page(self.folder, self._steps).save(path)
        return path


def _page(folder: Path, steps: StepCurves) -> Page:
    recipe_file, finished_file = folder / "recipe.yaml", folder / "finished.json"
    recipe, tree = _recipe(recipe_file) if recipe_file.is_file() else ("", Fields({}, recipe_file))
    finished = Fields.of_file(finished_file) if finished_file.is_file() else Fields({}, finished_file)
    evaluations = read_evaluations(folder / "evaluations.jsonl")
    page = Page(tree.text("name", "") or folder.name, _subtitle(tree, steps, bool(finished)), _footer(folder))
    _headline(page, steps, evaluations)
    _losses(page, steps)
    add_scores(page, evaluations)
    add_answers(page, read_answers(folder / "answers.jsonl"), folder)
    _optimizer(page, steps)
    _speed(page, steps)
    _packing(page, steps)
    _data(page, steps, _planned(folder))
    add_trouble(page, folder)
    _origin(page, tree_to_yaml(dict(tree), folder) if recipe else "", _versions(folder, finished))
    return page


def _recipe(file: Path) -> tuple[str, Fields]:
    """Return the text of a recipe and its values. Raises DataError naming the file if it is not valid."""
    with file_errors(file):
        text = file.read_text(encoding="utf-8")
        tree = yaml.safe_load(text)
    if not isinstance(tree, dict):
        raise DataError("not a recipe", file=file, value=tree, expected="a mapping")
    return text, Fields(tree, file)


def _subtitle(recipe: Fields, steps: StepCurves, finished: bool) -> str:
    parts = ", ".join(recipe.section("stage").texts("tune", []))
    learns = f"Trained modules: {parts}. " if parts else ""
    if not steps.last:
        return f"{learns}No step is finished yet."
    count = f"{steps.last['step']:,} step{'s' * (steps.last['step'] != 1)}"
    return f"{learns}{'Finished after' if finished else 'In progress, after'} {count}."


def _footer(folder: Path) -> str:
    return f"All steps are in {folder.name}/metrics.jsonl. This file is self-contained."


def _headline(page: Page, steps: StepCurves, evaluations: Mapping[str, ThinnedRecords]) -> None:
    last = steps.last
    if not last:
        return
    tiles: dict[str, Figure] = {}
    if loss := steps.curves.get("loss"):
        newest = loss.means[-max(1, min(10, len(loss.means) // 10)) :]
        mean = sum(y for _, y in newest) / len(newest)
        tiles["loss"] = Figure(f"{mean:.3f}", f"nats per token, from step {newest[0][0]:,.0f} on")
    for name, rows in evaluations.items():
        if rows.best is not None:
            tiles[name] = Figure(write_score(rows.best), f"best of {rows.count}, at step {rows.best['step']:,}")
    seen, seconds = last.get("tokens_seen"), last.get("seconds")
    tiles["tokens"] = Figure(_rounded(seen), f"{steps.totals['images']:,} images")
    if seen and seconds:
        tiles["tokens per second"] = Figure(round(seen / seconds), f"over {write_seconds(seconds)} of training")
    if mfu := steps.curves.get("mfu"):
        means = mfu.means
        tiles["MFU"] = Figure(
            write_percent(sum(y for _, y in means) / len(means) / 100), "model FLOPs utilisation, mean"
        )
    page.figures(tiles)


def _losses(page: Page, steps: StepCurves) -> None:
    loss = steps.curves.get("loss")
    if loss is None:
        return
    page.section("Loss", "Nats per supervised token of the global batch. Faint: every step; solid: smoothed.")
    page.plot(_drawing({"loss": loss}, "All data", log_y=True))
    named = sorted(steps.data_sets.items(), key=lambda item: -item[1].seen)
    if len(named) > 1:
        drawn = {name: one.loss for name, one in named[:_LINES_DRAWN]}
        rest = len(named) - len(drawn)
        caption = f"The {len(drawn)} data sets with most tokens; {rest} more are in metrics.jsonl." if rest else ""
        page.plot(_drawing(drawn, "By data set", log_y=True, faint=False), caption)


def _optimizer(page: Page, steps: StepCurves) -> None:
    rate, norm = steps.curves.get("lr"), steps.curves.get("grad_norm")
    if rate is None and norm is None:
        return
    page.section("Optimizer")
    if rate is not None:
        page.plot(line_plot([Series("lr", rate.means)], title="Learning rate", x_label="step"))
    if norm is not None:
        page.plot(_drawing({"norm": norm}, "Gradient norm before clipping", log_y=True))


def _speed(page: Page, steps: StepCurves) -> None:
    speed, mfu, memory = (steps.curves.get(name) for name in ("tokens_per_second", "mfu", "memory_gib"))
    if speed is None:
        return
    page.section("Speed", "Of all ranks together, without padding and without time for checkpoints.")
    page.plot(_drawing({"tokens per second": speed}, "Tokens per second"))
    if mfu is not None:
        page.plot(_drawing({"MFU": mfu}, "Model FLOPs utilisation, percent of the peak"))
    if memory is not None:
        title = "Peak memory of one device, GiB"
        page.plot(line_plot([Series("memory", memory.means)], title=title, x_label="step"))


def _packing(page: Page, steps: StepCurves) -> None:
    drawn = {name: curve for name, curve in steps.curves.items() if name in ("padding", "supervised")}
    if not drawn:
        return
    page.section(
        "Packing",
        "Padding: fraction of a step's positions without a token. Supervised: fraction of its tokens with a label.",
    )
    page.plot(_drawing(drawn, "Percent of a step"))


def _data(page: Page, steps: StepCurves, planned: Mapping[str, float]) -> None:
    seen = {name: one.seen for name, one in steps.data_sets.items() if one.seen}
    total = sum(seen.values())
    if not total:
        return
    page.section("Data", "Tokens by data set" + (", and the estimated fractions of an epoch." if planned else "."))
    rows: list[list[Cell]] = []
    groups = []
    for name, count in sorted(seen.items(), key=lambda item: -item[1]):
        losses = steps.data_sets[name].loss.means
        shares: dict[str, float | None] = {"seen": count / total}
        if planned:
            shares["planned"] = planned.get(name)
        groups.append(Group(name, shares))
        want = [] if not planned else [_percent(planned.get(name))]
        rows.append([name, count, write_percent(count / total), *want, losses[-1][1] if losses else None])
    if len(groups) > 1:
        page.plot(bar_plot(groups[:_LINES_DRAWN], title="Fraction of tokens", write=write_percent, full=1.0))
    page.table(["data set", "tokens", "fraction", *(["planned"] if planned else []), "loss, last"], rows)
    totals = steps.totals
    page.table(
        (),
        [
            ("supervised tokens", f"{totals['supervised']:,} ({write_percent(totals['supervised'] / total)})"),
            ("images", f"{totals['images']:,}"),
            ("dropped as too long", f"{totals['dropped']:,}"),
            ("truncated as too long", f"{totals['truncated']:,}"),
            ("not readable", f"{totals['faults']:,}"),
        ],
    )


def _origin(page: Page, recipe: str, versions: Mapping[str, Any]) -> None:
    if not (recipe or versions):
        return
    page.section("Recipe", "Resolved recipe of this run, with defaults.")
    if recipe:
        page.details("recipe.yaml").code(recipe)
    if versions:
        page.table((), [(name, str(value)) for name, value in versions.items()], "Versions")


def _drawing(curves: Mapping[str, Curve], title: str, *, log_y: bool = False, faint: bool = True) -> Markup:
    """Plot curves over steps, smoothed if there are many points. faint: also draw the unsmoothed points."""
    points = max(len(curve.means) for curve in curves.values())
    # In short runs, smoothing would hide the actual values.
    smoothing = 0.9 if points > 100 else 0.7 if points > 30 else 0.0
    series = [Series(name, curve.means, curve.extremes if smoothing else ()) for name, curve in curves.items()]
    return line_plot(series, title=title, x_label="step", log_y=log_y, smoothing=smoothing, faint=faint)


def _planned(folder: Path) -> dict[str, float]:
    """Return the estimated fraction of an epoch's tokens of each data set, from `shares.json`; empty without it."""
    path = folder / "shares.json"
    fields = Fields.of_file(path) if path.is_file() else Fields({}, path)
    tokens = {name: fields.number(name, maximum=1e18) for name in fields}
    total = sum(tokens.values())
    return {name: count / total for name, count in tokens.items()} if total else {}


def _versions(folder: Path, finished: Fields) -> Mapping[str, Any]:
    if finished:
        return {**finished.section("versions"), "processes": finished.integer("ranks", 1)}
    for checkpoint in reversed(checkpoint_folders(folder / "checkpoint")):
        path = checkpoint / "state.json"
        try:
            state = Fields.of_file(path)
        except DataError:
            if path.exists():
                raise
            continue  # the checkpoint thread deleted this one meanwhile
        return {**state.section("versions"), "processes": state.integer("world", 1)}
    return {}


def _rounded(count: int | None) -> str | None:
    """Return a short form of a count: 12,345, 307 M, 3.07 G."""
    if count is None or count < 10**6:
        return None if count is None else f"{count:,}"
    scale, unit = (10**9, "G") if count >= 10**9 else (10**6, "M")
    value = count / scale
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f}\N{NO-BREAK SPACE}{unit}"


def _percent(share: float | None) -> str | None:
    return None if share is None else write_percent(share)
