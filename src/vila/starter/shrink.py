"""The starter model in 4 bits: quantized in about a minute, and asked again what the whole model was asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vila.core.events import Events
from vila.engine.engine import Engine
from vila.eval.benchmarks.easy_vqa import EasyVqa
from vila.eval.predictions import read_texts
from vila.eval.runner import model_hash, run
from vila.model.load import load_model
from vila.quant.blocks import fitting_sizes
from vila.quant.calibrate import packaged_documents, text_calibration
from vila.quant.checkpoint import Request, quantize_checkpoint, with_group

QUESTIONS = 300
"""Test questions that both models answer, about."""
_ROWS = 1
"""Rows of 512 tokens to calibrate with: `vila quantize` takes 16, and minutes for them."""


def shrink(model: Path, target: Path, events: Events) -> bool:
    """Quantize a model to `target`, which is left alone when it is there. False when no group size fits it."""
    if target.is_dir():
        return True
    network, processor = load_model(model)
    sizes = fitting_sizes(network)
    if not sizes:
        events.said("the model is not quantized: no group size divides the inputs of its Linears")
        return False
    calibration = text_calibration(packaged_documents(), processor.tokenizer, max_rows=_ROWS)
    quantize_checkpoint(network, processor, target, with_group(Request(), max(sizes)), calibration, events=events)
    return True


def compare_answers(
    whole: Path, small: Path, easy_vqa: Path, answered: Path, out: Path, questions: int, events: Events
) -> dict[str, Any]:
    """Sizes of both models, and the share of the same test questions that each answers right.

    answered: the whole model's predictions, of at least these questions. out: where the small model's are kept.
    Raises DataError naming the line of `answered` that is no prediction, or the question that it lacks.
    """
    benchmark = EasyVqa(easy_vqa, min(questions or QUESTIONS, QUESTIONS))
    items = benchmark.items()
    before = read_texts(answered, [item.id for item in items])
    benchmark.name = "easy_vqa_int4"
    engine = Engine.load(small, backend="torch")
    result = run(engine, benchmark, out, model=model_hash(small), events=events)
    assert result is not None
    right = {item.id: (before[item.id] == item.truth, result.predictions[item.id] == item.truth) for item in items}
    return {
        "bytes_before": _bytes(whole),
        "bytes_after": _bytes(small),
        "questions": len(items),
        "accuracy_before": sum(own for own, _ in right.values()) / len(right),
        "accuracy_after": sum(other for _, other in right.values()) / len(right),
        "example": _example(items[0], before, result.predictions),
    }


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("model*.safetensors"))


def _example(item: Any, before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str]:
    return {
        "image": str(item.messages[0].parts[0].source),
        "question": item.messages[-1].text,
        "answer": after[item.id],
        "answer_before": before[item.id],
        "truth": item.truth,
    }
