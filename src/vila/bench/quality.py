"""`vila bench quality`: perplexity and accuracy of a model in full precision and after several quantizations.

Every method starts from the same weights and is evaluated with its rounded values in float32. The evaluation text is
disjoint from the calibration text. Results are saved per method, so an interrupted run resumes with the next one.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from vila.core.errors import ConfigError, DataError
from vila.core.files import write_json
from vila.core.progress import SILENT, Events, task
from vila.core.reading import read_json_object
from vila.engine.engine import Engine
from vila.eval.benchmarks.easy_vqa import EasyVqa
from vila.eval.runner import run_benchmark
from vila.model.int4_weights import dequantize_model, use_int4
from vila.quant.awq_cache import AwqSearch, load_search, save_search
from vila.quant.blocks import check_weights
from vila.quant.calibration import SEQUENCE_LENGTH, Calibration
from vila.quant.quant_config import QuantConfig
from vila.quant.quantize import check_calibration, check_quantization, make_search, round_blocks
from vila.report.html import Figure, Page
from vila.report.plots import Group, bar_plot

_MEASURED = frozenset({"seconds", "bytes", "losses", "divergences"})
TEXT = "starter/text/english_eval.txt"
"""Evaluation text in the package `vila`; it has no 8-gram in common with the calibration text."""


@dataclass(frozen=True, slots=True)
class Way:
    """One variant of the model. Without a config it is in full precision."""

    name: str
    config: QuantConfig | None = None
    calibration: Calibration | None = None

    def facts(self) -> dict[str, Any]:
        """Return the settings that determine its results."""
        if self.config is None:
            return {"name": self.name}
        return {
            "name": self.name,
            "method": self.config.method,
            "rounding": self.config.rounding,
            "search_rows": self.config.search_sequences,
            **self.config.search_settings(),
            "calibration": None if self.calibration is None else self.calibration.metadata(),
        }


@dataclass(frozen=True, slots=True)
class Task:
    """The evaluation: blocks of text [N, S] of token ids, and easy-VQA questions if a folder is given."""

    blocks: tuple[tuple[int, ...], ...]
    text_sha256: str
    easy_vqa: Path | None = None
    questions: int = 0

    def facts(self) -> dict[str, Any]:
        """Return the settings that determine the results."""
        return {
            "text_sha256": self.text_sha256,
            "blocks": len(self.blocks),
            "tokens_a_block": len(self.blocks[0]),
            "questions": None if self.easy_vqa is None else self.questions,
        }


def quality_task(
    tokenizer: Any,
    *,
    max_blocks: int = 0,
    easy_vqa: Path | None = None,
    questions: int = 0,
    block: int = SEQUENCE_LENGTH,
) -> Task:
    """Return the packaged text in blocks without the rest; max_blocks 0: all. Raises DataError if there is no block."""
    raw = files("vila").joinpath(TEXT).read_bytes()
    ids = tokenizer(raw.decode("utf-8"))["input_ids"]
    cut = tuple(tuple(ids[at : at + block]) for at in range(0, len(ids) - block + 1, block))
    if not cut:
        raise DataError(f"{len(ids)} tokens do not fill a block of {block}", file=TEXT, hint="use shorter blocks")
    return Task(cut[: max_blocks or None], hashlib.sha256(raw).hexdigest(), easy_vqa, questions)


@torch.no_grad()
def block_losses(model: Any, blocks: Sequence[Sequence[int]]) -> list[float]:
    """Return the mean negative log-likelihood per token of each block, in nats."""
    out = []
    for block in blocks:
        ids_S = torch.tensor(block, device=model.get_input_embeddings().weight.device)
        logits_SV = model(input_ids=ids_S[None]).logits[0].float()
        out.append(float(torch.nn.functional.cross_entropy(logits_SV[:-1], ids_S[1:])))
    return out


@torch.no_grad()
def block_divergences(model: Any, full: Any, blocks: Sequence[Sequence[int]]) -> list[float]:
    """Return the mean KL divergence per token of the model from the full-precision one for each block, in nats.

    The loss alone can mislead: rounding may undo fine-tuning and thereby improve the loss on general text.
    """
    out = []
    for block in blocks:
        ids_1S = torch.tensor([block], device=model.get_input_embeddings().weight.device)
        own_SV = torch.log_softmax(model(input_ids=ids_1S).logits[0].float(), -1)
        full_SV = torch.log_softmax(full(input_ids=ids_1S).logits[0].float(), -1)
        # Ids masked in both models have log-probability -inf in both.
        divergence_SV = torch.where(full_SV.isfinite(), full_SV.exp() * (full_SV - own_SV), 0)
        out.append(float(divergence_SV.sum(-1).mean()))
    return out


def measure_quality(
    load: Callable[[], tuple[Any, Any]], ways: Sequence[Way], what: Task, out: Path, *, events: Events = SILENT
) -> dict[str, Any]:
    """Measure every variant, save each below `out/ways`, and compare them with the first, full precision.

    load: returns a new float32 model and its processor.
    Raises ConfigError if the first variant is not full precision, or `out` holds results of other settings.
    """
    if not ways or ways[0].config is not None:
        raise ConfigError("the first variant must be full precision, with which the others are compared")
    (out / "ways").mkdir(parents=True, exist_ok=True)
    rows = [_measured(load, way, what, out, events) for way in ways]
    result = {"task": what.facts(), "ways": compare(rows)}
    write_json(out / "quality.json", result)
    return result


def _measured(load: Callable[[], tuple[Any, Any]], way: Way, what: Task, out: Path, events: Events) -> dict[str, Any]:
    path = out / "ways" / f"{way.name}.json"
    asked = {**way.facts(), "task": what.facts()}
    if path.is_file():
        row = read_json_object(path, ConfigError)
        hint = "give another directory, or delete this file"
        if row.get("asked") != asked:
            raise ConfigError("measured with different settings", file=path, field="asked", hint=hint)
        if absent := sorted(_MEASURED - row.keys()):
            raise ConfigError("missing", file=path, field=absent[0], hint=hint)
        return row
    model, processor = load()
    began = time.monotonic()
    with task(events, way.name):
        bytes_before = sum(parameter.numel() for parameter in model.parameters()) * 2
        bytes_after = bytes_before if way.config is None else _quantize(model, processor, way, out, events)
        seconds = time.monotonic() - began
        row = {
            "asked": asked,
            "seconds": round(seconds, 1),
            "bytes": bytes_after,
            "losses": block_losses(model, what.blocks),
            "divergences": [] if way.config is None else block_divergences(model, load()[0], what.blocks),
            **_answers(model, processor, way, what, out, events),
        }
    write_json(path, row)
    return row


def _search(model: Any, processor: Any, way: Way, folder: Path, events: Events) -> AwqSearch | None:
    """Return the AWQ search of a variant; variants with the same settings and calibration data share it."""
    config, calibration = way.config, way.calibration
    if config is None or calibration is None:
        return None
    sequences = [
        [row.ids, [image.key() for image in row.media]]
        for row in calibration.sequences[: config.search_sequences or None]
    ]
    asked = json.dumps([config.method, config.search_settings(), sequences])
    path = folder / f"{hashlib.sha256(asked.encode()).hexdigest()[:16]}.safetensors"
    if path.is_file():
        return load_search(path)
    search = make_search(model, processor, config, calibration, events=events)
    if search is not None:
        save_search(search, path)
    return search


def _quantize(model: Any, processor: Any, way: Way, out: Path, events: Events) -> int:
    """Quantize the model in place; return the bytes of its weights with all others in 16 bits."""
    config = way.config
    assert config is not None
    check_quantization(model, config)
    check_calibration(model, config, way.calibration)
    check_weights(model)
    search = _search(model, processor, way, out / "searches", events)
    weights = round_blocks(
        model, search, config, way.calibration, processor=processor, release=True, events=events
    ).weights
    use_int4(model, weights)
    rest = sum(parameter.numel() for parameter in model.parameters()) * 2
    dequantize_model(model, torch.float32)
    return rest + sum(weight.num_bytes for weight in weights.values())


def _answers(model: Any, processor: Any, way: Way, what: Task, out: Path, events: Events) -> dict[str, Any]:
    if what.easy_vqa is None:
        return {}
    benchmark = EasyVqa(what.easy_vqa, what.questions)
    result = run_benchmark(
        Engine(model, processor), benchmark, out / "answers" / way.name, model_id=way.name, events=events
    )
    assert result is not None
    assert result.result is not None
    marks = result.result.question_scores
    return {"accuracy": result.scores["accuracy"], "right": {mark.id: mark.value for mark in marks}}


def compare(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compare each result with the first: differences of the loss with standard error over blocks, and of accuracy.

    If there is a result named `rtn`, `removed` and `divergence_removed` are the fractions of its damage, in loss and
    divergence, that a variant avoids.
    """
    whole = rows[0]["losses"]
    damage = {row["asked"]["name"]: fmean(row["losses"]) - fmean(whole) for row in rows}
    apart = {row["asked"]["name"]: fmean(row["divergences"] or [0.0]) for row in rows}
    out = []
    for row in rows:
        losses = row["losses"]
        differences = [own - full for own, full in zip(losses, whole, strict=True)]
        name = row["asked"]["name"]
        shown = {
            **row["asked"],
            "seconds": row["seconds"],
            "bytes": row["bytes"],
            "nll": fmean(losses),
            "perplexity": math.exp(fmean(losses)),
            "difference": damage[name],
            "standard_error": stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None,
            "divergence": apart[name],
            "divergence_removed": 1 - apart[name] / apart["rtn"] if apart.get("rtn") and row is not rows[0] else None,
            "removed": 1 - damage[name] / damage["rtn"] if damage.get("rtn") and row is not rows[0] else None,
        }
        shown.pop("task")
        if "accuracy" in row:
            pairs = [(row["right"][key], value) for key, value in rows[0]["right"].items() if key in row["right"]]
            shown["accuracy"] = row["accuracy"]
            shown["accuracy_drop"] = 100 * (rows[0]["accuracy"] - row["accuracy"])
            shown["answers_lost"] = sum(own < full for own, full in pairs)
            shown["answers_won"] = sum(own > full for own, full in pairs)
        out.append(shown)
    return out


_HEADER = (
    "method", "perplexity", "NLL above full", "s.e.", "NLL removed", "KL from full", "KL removed", "accuracy", "MiB",
    "seconds",
)  # fmt: skip


def quality_rows(ways: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the table's cells, one row per variant; missing values are empty."""
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
    """Return the table as markdown."""
    lines = ["| " + " | ".join(_HEADER) + " |", "|" + "|".join(["---"] + ["---:"] * (len(_HEADER) - 1)) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in quality_rows(ways))]) + "\n"


def write_quality_report(result: Mapping[str, Any], facts: Mapping[str, Any], path: Path) -> None:
    """Write a self-contained HTML report. facts: machine and model, shown at the end."""
    ways = result["ways"]
    quantized = ways[1:]
    page = Page("Cost of INT4 quantization", str(facts.get("model", "")))
    if quantized:
        best = min(quantized, key=lambda way: way["divergence"])
        page.figures(
            {
                f"KL divergence, {best['name']}": Figure(f"{best['divergence']:.4f}", "nats per token"),
                "NLL above full precision": Figure(f"{best['difference']:+.4f}", f"nats per token, {best['name']}"),
            }
        )
    page.section("Results")
    page.table(_HEADER, quality_rows(ways))
    page.section("Language modelling")
    page.plot(
        bar_plot([_damage(way) for way in quantized], title="NLL above full precision, nats per token"),
        "lines are +- one standard error of the paired differences over blocks of text",
    )
    page.plot(
        bar_plot(
            [Group(way["name"], {"divergence": way["divergence"]}) for way in quantized],
            title="KL divergence from full precision, nats per token",
        ),
        "unlike the loss, the divergence cannot improve by undoing fine-tuning",
    )
    if "accuracy" in ways[0]:
        page.section("Answers about images")
        groups = [Group(way["name"], {"accuracy": way["accuracy"]}) for way in ways]
        page.plot(bar_plot(groups, title="easy-VQA, exact match", write=lambda value: f"{value:.2%}", full=1.0))
        header = ("method", "accuracy", "points lost", "answers lost", "answers gained")
        page.table(
            header,
            [
                [w["name"], f"{w['accuracy']:.2%}", f"{w['accuracy_drop']:.2f}", w["answers_lost"], w["answers_won"]]
                for w in ways
            ],
        )
    page.section("Settings")
    page.table(("", ""), [[key, str(value)] for key, value in {**result["task"], **facts}.items()])
    page.table(("method", "settings"), [[way["name"], _settings(way)] for way in ways])
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
