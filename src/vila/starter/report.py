"""The starter's report: what was trained, how well it sees, what it cost, and what to do next."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from vila.core.files import resolve_path, write_json
from vila.report.html import Card, Figure, Page
from vila.report.numbers import write_number, write_percent, write_seconds
from vila.report.plots import Group, Series, bar_plot, line_plot

Result = Mapping[str, Any]


def write_report(result: dict[str, Any], folder: Path) -> None:
    """Write `report.html` and `report.json` into `folder`, each whole or not at all.

    result: what `quickstart` measured. Accuracies are fractions, times seconds, losses nats per token. A key that is
    absent or None leaves its section out. Images are named relative to `folder`, as `portable_path` does. The JSON file
    holds the same, without the bytes of images; a number that is not finite becomes null there.
    Raises MediaError naming an example's image that cannot be read.
    """
    render_report(with_images(result, folder)).save(folder / "report.html")
    write_json(folder / "report.json", plain(result))


def with_images(result: Result, folder: Path) -> dict[str, Any]:
    """Return the result with the paths of its images as they are opened from the working directory."""

    def located(value: Any, key: str = "") -> Any:
        if isinstance(value, Mapping):
            return {name: located(item, name) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [located(item, key) for item in value]
        is_path = key in ("image", "images") and isinstance(value, str)
        return os.path.normpath(resolve_path(value, folder)) if is_path else value

    return dict(located(result))


def render_report(result: Result) -> Page:
    """The page, section by section."""
    page = Page("A visual language model, trained from its parts", _subtitle(result), _footer(result))
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
    """`value` as JSON can hold it: paths as text, pictures left out, null for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items() if not _is_picture(item)}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value if not _is_picture(item)]
    if isinstance(value, PurePath):
        return value.as_posix()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _is_picture(value: Any) -> bool:
    return isinstance(value, bytes) or hasattr(value, "getbands")


def _subtitle(result: Result) -> str:
    machine = result.get("machine") or {}
    cores = machine.get("cores")
    parts = [
        f"on {machine['cpu']}" if machine.get("cpu") else "",
        f"with {cores} core{'s' * (cores != 1)}" if cores else "",
        f"on {machine['date']}" if machine.get("date") else "",
    ]
    return " ".join(["Trained and tested", *filter(None, parts)]) + "." if any(parts) else ""


def _footer(result: Result) -> str:
    seed = f" Seed {result['seed']}." if result.get("seed") is not None else ""
    return f"This file is complete in itself and loads nothing. Its numbers are in report.json.{seed}"


def _headline(page: Page, result: Result) -> None:
    accuracy, blind, swapped = (result.get(key) for key in ("accuracy", "blind_accuracy", "swapped_accuracy"))
    tiles: dict[str, Figure] = {}
    if accuracy is not None:
        notes = [f"on {result['questions']:,} questions" if result.get("questions") else ""]
        if result.get("validation_accuracy") is not None:
            notes.append(f"validation {write_percent(result['validation_accuracy'])}")
        tiles["test accuracy"] = Figure(write_percent(accuracy), ", ".join(filter(None, notes)))
    if blind is not None:
        tiles["best blind guess"] = Figure(write_percent(blind), "each question's commonest answer")
    if swapped is not None:
        tiles["with swapped pictures"] = Figure(write_percent(swapped), "the same questions about another picture")
    if seconds := result.get("seconds"):
        tiles["from parts to this page"] = Figure(write_seconds(_total(seconds)), "reading, training, testing")
    if tiles:
        page.figures(tiles)
    if accuracy is not None and blind is not None:
        gap = 100 * (accuracy - blind)
        sentence = (
            f"Answers that ignore the picture are right at most {write_percent(blind)} of the time; "
            f"the model is {abs(gap):.1f} points {'above' if gap >= 0 else 'below'} that."
        )
        if swapped is not None:
            falls = "falls to" if swapped < accuracy else "reaches"
            sentence += f" Shown the wrong picture it {falls} {write_percent(swapped)}."
        page.text(sentence)


def _accuracy(page: Page, result: Result) -> None:
    kinds: Mapping[str, Mapping[str, Any]] = result.get("accuracy_by_type") or {}
    if not kinds:
        return
    total = {"accuracy": "accuracy", "blind": "blind_accuracy", "majority": "majority_accuracy"}
    rows = {"all questions": {short: result.get(key) for short, key in total.items()}}
    rows |= {f"{kind} ({row['count']:,})" if row.get("count") else kind: dict(row) for kind, row in kinds.items()}
    groups = [
        Group(name, {"model": row.get("accuracy"), "blind guess": row.get("blind"), "majority": row.get("majority")})
        for name, row in rows.items()
    ]
    page.section(
        "Accuracy",
        "By type of question, beside two guessers that never see a picture: one knows the commonest answer to each "
        "question, the other the commonest answer to the type.",
    )
    page.plot(bar_plot(groups, title="Answers that are exactly right", write=write_percent, full=1.0))


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
        "Answers", f"Test pictures that took no part in training. Of these {len(cards)} answers {right} are right."
    )
    page.gallery(cards)


def _few_shot(page: Page, result: Result) -> None:
    shot = result.get("few_shot")
    if not shot:
        return
    page.section(
        "In-context prompt", "Examples inside the prompt, and a last picture that the model is to treat alike."
    )
    images = shot.get("images") or []
    if images:
        page.gallery([Card(image, [("picture", f"{i} of {len(images)}")]) for i, image in enumerate(images, start=1)])
    page.code(shot["prompt"], "Prompt")
    page.table((), [(name, shot[name]) for name in ("answer", "truth") if shot.get(name) is not None])


def _losses(page: Page, result: Result) -> None:
    stages = result.get("stages") or []
    if not stages:
        return
    page.section("Training", "Stage by stage, each from the weights of the one before.")
    series: list[Series] = []
    end = 0.0
    for stage in stages:
        points = [(float(tokens), _number(loss)) for tokens, loss in stage.get("loss") or []]
        # Counts that begin anew with each stage are laid end to end.
        shift = end if points and points[0][0] < end else 0.0
        series.append(Series(_title(stage), [(x + shift, y) for x, y in points]))
        end = max([end, *(x for x, _ in series[-1].points)])
    if any(s.points for s in series):
        plot = line_plot(
            series, title="Training loss", x_label="tokens seen", y_label="nats per token", log_y=True, smoothing=0.9
        )
        page.plot(
            plot,
            "Faint: every step; strong: a moving average. Stages learn different texts, so levels do not compare.",
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
        "Does it look?",
        "Captions of held-back pictures, scored behind their own picture and behind another one. "
        "The wider apart, the more the text depends on the picture.",
    )
    groups = [
        Group(f"after {_title(stage)}", {"own picture": nll.get("right"), "another picture": nll.get("swapped")})
        for stage, nll in measured
    ]
    plot = bar_plot(groups, title="Negative log-likelihood of captions, nats per token", write=lambda v: f"{v:.2f}")
    page.plot(plot, "Lower is better with the own picture.")


def _perplexity(page: Page, result: Result) -> None:
    perplexity = result.get("perplexity")
    if not perplexity:
        return
    page.section("Language", "What training on pictures cost the language model of its text.")
    rise = f"{perplexity['rise_percent']:+.1f}".replace("-", "\N{MINUS SIGN}")
    before, after = f"{perplexity['before']:.2f}", f"{perplexity['after']:.2f}"
    page.figures({"perplexity before": before, "perplexity after": after, "rise": f"{rise}\N{NO-BREAK SPACE}%"})
    facts = {"tokens of plain text": perplexity.get("tokens"), "SHA-256 of the text": perplexity.get("text_sha256")}
    page.table((), [(name, value) for name, value in facts.items() if value is not None])


def _cost(page: Page, result: Result) -> None:
    seconds, machine, versions = (result.get(key) or {} for key in ("seconds", "machine", "versions"))
    speed = result.get("tokens_per_second") or {}
    if not (seconds or machine or versions or speed):
        return
    page.section("Time and machine")
    if seconds:
        steps = [Group(step, {"time": value}) for step, value in seconds.items() if step != "total"]
        page.plot(bar_plot(steps, title=f"Where {write_seconds(_total(seconds))} went", write=write_seconds))
    named = {stage["name"]: _title(stage) for stage in result.get("stages") or []}
    rest = {named.get(name, name): value for name, value in speed.items() if not named or name not in named}
    if rest:
        page.table(["stage", "tokens per second"], [[name, round(value)] for name, value in rest.items()])
    if machine:
        page.table((), [(name.replace("memory_gib", "memory, GiB"), _join(value)) for name, value in machine.items()])
    if versions:
        page.details("Versions").table((), [(name, _join(value)) for name, value in versions.items()])


def _int4(page: Page, result: Result) -> None:
    small = result.get("int4")
    if not small:
        return
    before, after = small["bytes_before"] / 2**20, small["bytes_after"] / 2**20
    page.section("The same model in 4 bits")
    page.figures(
        {
            "size": Figure(f"{after:.0f} MiB", f"{before:.0f} MiB before"),
            "right answers": Figure(
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
    commands = result.get("commands") or ()
    if not commands:
        return
    page.section("What to do next")
    pairs: Sequence[tuple[str, str]] = (
        list(commands.items()) if isinstance(commands, Mapping) else [("", command) for command in commands]
    )
    for purpose, command in pairs:
        page.code(command, purpose)


def _title(stage: Result) -> str:
    return str(stage.get("title") or stage["name"])


def _total(seconds: Mapping[str, float]) -> float:
    return seconds["total"] if "total" in seconds else sum(seconds.values())


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
