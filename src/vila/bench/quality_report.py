"""What a quality measurement shows: one table, plots of what each way costs, and how it was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vila.report.bars import Group, bar_plot
from vila.report.page import Figure, Page

_HEADER = (
    "way", "perplexity", "NLL above full", "s.e.", "NLL removed", "KL from full", "KL removed", "accuracy", "MiB",
    "seconds",
)  # fmt: skip


def quality_rows(ways: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table's cells, a row for each way; what was not measured is empty."""
    return [
        [
            str(way["name"]),
            f"{way['perplexity']:.3f}",
            "" if way is ways[0] else f"{way['difference']:+.4f}",
            "" if way is ways[0] or way["standard_error"] is None else f"{way['standard_error']:.4f}",
            "" if way.get("removed") is None else f"{way['removed']:.1%}",
            "" if way is ways[0] else f"{way['divergence']:.4f}",
            "" if way.get("divergence_removed") is None else f"{way['divergence_removed']:.1%}",
            f"{way['accuracy']:.2%}" if "accuracy" in way else "",
            f"{way['bytes'] / 2**20:.1f}",
            "" if way is ways[0] else f"{way['seconds']:.0f}",
        ]
        for way in ways
    ]


def markdown_table(ways: Sequence[Mapping[str, Any]]) -> str:
    """The same table as markdown."""
    lines = ["| " + " | ".join(_HEADER) + " |", "|" + "|".join(["---"] + ["---:"] * (len(_HEADER) - 1)) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in quality_rows(ways))]) + "\n"


def write_quality_report(result: Mapping[str, Any], facts: Mapping[str, Any], path: Path) -> None:
    """One HTML file that loads nothing. facts: of the machine and the model, shown at the end."""
    ways = result["ways"]
    quantized = ways[1:]
    page = Page("What 4 bits cost", str(facts.get("model", "")))
    if quantized:
        best = min(quantized, key=lambda way: way["divergence"])
        page.figures(
            {
                f"divergence from full precision, {best['name']}": Figure(f"{best['divergence']:.4f}", "nats a token"),
                "NLL above full precision": Figure(f"{best['difference']:+.4f}", "of the same"),
            }
        )
    page.section("Every way")
    page.table(_HEADER, quality_rows(ways))
    page.section("Damage to the language model")
    page.plot(
        bar_plot([_damage(way) for way in quantized], title="NLL above full precision, nats a token"),
        "lines are one standard error each way, over blocks of text, each compared with itself",
    )
    page.plot(
        bar_plot(
            [Group(way["name"], {"divergence": way["divergence"]}) for way in quantized],
            title="Divergence from full precision, nats a token",
        ),
        "the loss alone can fall where rounding undoes what training changed; this cannot",
    )
    if "accuracy" in ways[0]:
        page.section("Answers about pictures")
        groups = [Group(way["name"], {"accuracy": way["accuracy"]}) for way in ways]
        page.plot(bar_plot(groups, title="easy-VQA, exact match", write=lambda value: f"{value:.2%}", full=1.0))
        header = ("way", "accuracy", "points lost", "answers lost", "answers won")
        page.table(
            header,
            [
                [w["name"], f"{w['accuracy']:.2%}", f"{w['accuracy_drop']:.2f}", w["answers_lost"], w["answers_won"]]
                for w in ways
            ],
        )
    page.section("How it was measured")
    page.table(("", ""), [[key, str(value)] for key, value in {**result["task"], **facts}.items()])
    page.table(("way", "settings"), [[way["name"], _settings(way)] for way in ways])
    page.save(path)


def _damage(way: Mapping[str, Any]) -> Group:
    middle, error = way["difference"], way["standard_error"]
    spread = {} if error is None else {"damage": (middle - error, middle + error)}
    return Group(way["name"], {"damage": middle}, spread)


def _settings(way: Mapping[str, Any]) -> str:
    if "method" not in way:
        return "full precision"
    names = ("method", "rounding", "group_size", "symmetric", "scaling", "clipping", "image_weight")
    words = [f"{name} {way[name]}" for name in names]
    if (calibration := way["calibration"]) is not None:
        words.append(f"{calibration['name']}, {calibration['tokens']} tokens, sha256 {calibration['sha256']}")
    return "; ".join(words)
