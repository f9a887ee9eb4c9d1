"""Report of the quickstart: training, accuracy, use of the image, perplexity, INT4, time, and next commands."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vila.core.files import resolve_path, write_json
from vila.report.html import Card, Figure, Page
from vila.report.numbers import write_number, write_percent, write_seconds
from vila.report.plots import Group, Series, bar_plot, line_plot

Result = Mapping[str, Any]


def write_report(result: dict[str, Any], folder: Path) -> None:
    """Write `report.html` and `report.json` to `folder`, atomically.

    result: return value of `Quickstart.run`. Accuracies are fractions, times seconds, losses nats per token. Sections
            of absent keys are omitted. Image paths are relative to `folder`. In the JSON file, numbers that are not
            finite become null.
    Raises MediaError if an image cannot be read.
    """
    render_report(with_images(result, folder)).save(folder / "report.html")
    write_json(folder / "report.json", plain(result))


def with_images(result: Result, folder: Path) -> dict[str, Any]:
    """Return the result with image paths resolved against `folder`."""

    def located(value: Any, key: str = "") -> Any:
        if isinstance(value, Mapping):
            return {name: located(item, name) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [located(item, key) for item in value]
        is_path = key in ("image", "images") and isinstance(value, str)
        return os.path.normpath(resolve_path(value, folder)) if is_path else value

    return dict(located(result))


def render_report(result: Result) -> Page:
    """Build the page."""
    page = Page("A visual language model, trained from open components", _subtitle(result), _footer(result))
    _headline(page, result)
    _accuracy(page, result)
    _examples(page, result)
    _few_shot(page, result)
    _losses(page, result)
    _captions(page, result)
    _perplexity(page, result)
    _int4(page, result)
    _cost(page, result)
    _next_steps(page, result)
    return page


def plain(value: Any) -> Any:
    """Return `value` with null in place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _subtitle(result: Result) -> str:
    machine = result.get("machine") or {}
    cores = machine.get("cores")
    parts = [
        f"on {machine['cpu']}" if machine.get("cpu") else "",
        f"with {cores} core{'s' * (cores != 1)}" if cores else "",
        f"on {machine['date']}" if machine.get("date") else "",
    ]
    return " ".join(["Trained and evaluated", *filter(None, parts)]) + "." if any(parts) else ""


def _footer(result: Result) -> str:
    seed = f" Seed {result['seed']}." if result.get("seed") is not None else ""
    return f"This file is self-contained. Its numbers are also in report.json.{seed}"


def _headline(page: Page, result: Result) -> None:
    accuracy, blind, swapped = (result.get(key) for key in ("accuracy", "blind_accuracy", "swapped_accuracy"))
    tiles: dict[str, Figure] = {}
    if accuracy is not None:
        notes = [f"on {result['questions']:,} questions" if result.get("questions") else ""]
        if result.get("validation_accuracy") is not None:
            notes.append(f"validation {write_percent(result['validation_accuracy'])}")
        tiles["test accuracy"] = Figure(write_percent(accuracy), ", ".join(filter(None, notes)))
    if blind is not None:
        tiles["best blind baseline"] = Figure(write_percent(blind), "most frequent answer of each question")
    if swapped is not None:
        tiles["with swapped images"] = Figure(write_percent(swapped), "the same questions about another image")
    if seconds := result.get("seconds"):
        tiles["total time"] = Figure(write_seconds(sum(seconds.values())), "data, training, evaluation")
    if tiles:
        page.figures(tiles)
    if accuracy is not None and blind is not None:
        gap = 100 * (accuracy - blind)
        sentence = (
            f"Without the image, an accuracy of at most {write_percent(blind)} is possible; "
            f"the model is {abs(gap):.1f} points {'above' if gap >= 0 else 'below'} it."
        )
        if swapped is not None:
            sentence += f" With the wrong image its accuracy is {write_percent(swapped)}."
        page.text(sentence)


def _accuracy(page: Page, result: Result) -> None:
    kinds: Mapping[str, Mapping[str, Any]] = result.get("accuracy_by_type") or {}
    if not kinds:
        return
    total = {"accuracy": "accuracy", "blind": "blind_accuracy", "majority": "majority_accuracy"}
    rows = {"all questions": {short: result.get(key) for short, key in total.items()}}
    rows |= {f"{kind} ({row['count']:,})" if row.get("count") else kind: dict(row) for kind, row in kinds.items()}
    groups = [
        Group(name, {"model": row.get("accuracy"), "blind": row.get("blind"), "majority": row.get("majority")})
        for name, row in rows.items()
    ]
    page.section(
        "Accuracy",
        "By type of question, with two baselines that ignore the image: the most frequent answer of each question "
        "(blind) and of each type (majority).",
    )
    page.plot(bar_plot(groups, title="Exact-match accuracy", write=write_percent, full=1.0))


def _examples(page: Page, result: Result) -> None:
    examples = result.get("examples") or []
    if not examples:
        return
    cards = [
        Card(
            example.get("image"),
            [("", example["question"]), ("answer", example["answer"]), ("truth", example["truth"])],
            _same(example["answer"], example["truth"]),
        )
        for example in examples
    ]
    right = sum(card.good is True for card in cards)
    page.section(
        "Answers",
        f"Test images, not used in training. {right} of these {len(cards)} answers are right.",
    )
    page.gallery(cards)


def _few_shot(page: Page, result: Result) -> None:
    shot = result.get("few_shot")
    if not shot:
        return
    page.section("Few-shot prompt", "Examples with answers in the prompt, then a question about the last image.")
    images = shot.get("images") or []
    if images:
        page.gallery([Card(image, [("image", f"{i} of {len(images)}")]) for i, image in enumerate(images, start=1)])
    page.code(shot["prompt"], "Prompt")
    page.table((), [(name, shot[name]) for name in ("answer", "truth") if shot.get(name) is not None])


def _losses(page: Page, result: Result) -> None:
    stages = result.get("stages") or []
    if not stages:
        return
    page.section("Training", "Each stage starts from the weights of the previous one.")
    series: list[Series] = []
    end = 0.0
    for stage in stages:
        points = [(float(tokens), _number(loss)) for tokens, loss in stage.get("loss") or []]
        # Token counts that restart with each stage are concatenated.
        shift = end if points and points[0][0] < end else 0.0
        series.append(Series(_title(stage), [(x + shift, y) for x, y in points]))
        end = max([end, *(x for x, _ in series[-1].points)])
    if any(s.points for s in series):
        plot = line_plot(
            series, title="Training loss", x_label="tokens", y_label="nats per token", log_y=True, smoothing=0.9
        )
        page.plot(
            plot,
            "Faint: every step; strong: moving average. Losses of different stages are not comparable.",
        )
    speed = result.get("tokens_per_second") or {}
    rows = [
        [
            _title(stage),
            _join(stage.get("tune")),
            stage.get("tokens"),
            stage.get("steps"),
            None if stage.get("seconds") is None else write_seconds(stage["seconds"]),
            None if speed.get(stage["name"]) is None else round(speed[stage["name"]]),
        ]
        for stage in stages
    ]
    page.table(["stage", "trained", "tokens", "steps", "time", "tokens/s"], rows)


def _captions(page: Page, result: Result) -> None:
    measured = [(stage, stage["caption_nll"]) for stage in result.get("stages") or [] if stage.get("caption_nll")]
    if not measured:
        return
    page.section(
        "Use of the image",
        "Captions of held-out images, scored with their own image and with another one. "
        "The larger the difference, the more the text depends on the image.",
    )
    groups = [
        Group(f"after {_title(stage)}", {"own image": nll.get("right"), "another image": nll.get("swapped")})
        for stage, nll in measured
    ]
    plot = bar_plot(groups, title="Negative log-likelihood of captions, nats per token", write=lambda v: f"{v:.2f}")
    page.plot(plot, "With the own image, lower is better.")


def _perplexity(page: Page, result: Result) -> None:
    perplexity = result.get("perplexity")
    if not perplexity:
        return
    page.section("Language", "Perplexity of plain text before and after training on images.")
    rise = f"{perplexity['rise_percent']:+.1f}".replace("-", "\N{MINUS SIGN}")
    before, after = f"{perplexity['before']:.2f}", f"{perplexity['after']:.2f}"
    page.figures({"perplexity before": before, "perplexity after": after, "rise": f"{rise}\N{NO-BREAK SPACE}%"})
    details = {"tokens of plain text": perplexity.get("tokens"), "SHA-256 of the text": perplexity.get("text_sha256")}
    page.table((), [(name, value) for name, value in details.items() if value is not None])


def _cost(page: Page, result: Result) -> None:
    seconds, machine = (result.get(key) or {} for key in ("seconds", "machine"))
    if not (seconds or machine):
        return
    page.section("Time and machine")
    if seconds:
        steps = [Group(step, {"time": value}) for step, value in seconds.items()]
        title = f"Time by step ({write_seconds(sum(seconds.values()))})"
        page.plot(bar_plot(steps, title=title, write=write_seconds))
    if machine:
        page.table((), [(name.replace("memory_gib", "memory, GiB"), _join(value)) for name, value in machine.items()])


def _int4(page: Page, result: Result) -> None:
    small = result.get("int4")
    if not small:
        return
    before, after = small["bytes_before"] / 2**20, small["bytes_after"] / 2**20
    page.section("INT4 quantization")
    page.figures(
        {
            "size": Figure(f"{after:.0f} MiB", f"{before:.0f} MiB before"),
            "accuracy": Figure(
                write_percent(small["accuracy_after"]),
                f"{write_percent(small['accuracy_before'])} before, on the same {small['questions']:,} questions",
            ),
        }
    )
    example = small["example"]
    lines = [
        (example["question"], example["answer"]),
        ("before", example["answer_before"]),
        ("truth", example["truth"]),
    ]
    page.gallery([Card(example["image"], lines, _same(example["answer"], example["truth"]))])


def _next_steps(page: Page, result: Result) -> None:
    commands = result.get("commands") or {}
    if commands:
        page.section("Next steps")
    for purpose, command in commands.items():
        page.code(command, purpose)


def _title(stage: Result) -> str:
    return str(stage.get("title") or stage["name"])


def _same(answer: str, truth: str) -> bool:
    return answer.strip().casefold() == truth.strip().casefold()


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _join(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "nothing"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return write_number(value) if isinstance(value, (int, float)) else str(value)
