"""`metrics.jsonl` and other logs of a run: one line a step, cut back to the checkpoint when the run resumes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from vila.config.schema import Recipe
from vila.core.errors import DataError
from vila.core.files import write_text
from vila.core.reading import read_jsonl
from vila.model.config import VilaConfig
from vila.plan.devices import peak_tflops
from vila.plan.flops import Learning, step_flops
from vila.plan.model_shape import shape_of
from vila.train.fsdp import World

_HINT = "delete the line, or the file to go on without it"


class MetricsLog:
    """Appends one JSON object a step."""

    def __init__(self, path: Path, step: int) -> None:
        """step: lines of later steps are dropped, as is a half-written last line. Raises as `read_metrics`."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row for row in read_metrics(path) if row["step"] <= step]
        self.last_step: int = max((row["step"] for row in rows), default=0)
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))

    def write(self, **facts: Any) -> None:
        """Append a line and flush it."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(facts) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a metrics file; empty if there is none. A last line that a kill cut short is left out.

    Raises DataError naming file, line and field for a line that is not an object with a `step`.
    """
    return [row for _, row in read_rows(path)] if path.is_file() else []


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `read_metrics`, one by one, with their line numbers."""
    for number, row in read_jsonl(path, DataError, appended=True):
        check_row(row, path, number)
        yield number, row


def check_row(row: Any, path: Path, line: int, key: str = "step") -> None:
    """Raise DataError unless a line of a run's log is an object with a count at `key`."""
    count = row.get(key) if isinstance(row, dict) else None
    if type(count) is not int or not 0 <= count < 2**62:
        raise DataError(
            file=path,
            record=f"line {line}",
            field=key if isinstance(row, dict) else None,
            value=count if isinstance(row, dict) else row,
            expected="an integer >= 0" if isinstance(row, dict) else "an object ({...})",
            hint=_HINT,
        )


# --- utilisation
# Model FLOPs utilisation of a step: what the mathematics asks for, over what the devices could do meanwhile.


def utilisation_of(recipe: Recipe, config: VilaConfig, world: World) -> Callable[[dict[str, Any], float], float | None]:
    """MFU (0..1) of a step from its facts and seconds, as PaLM defines it (arXiv 2204.02311, appendix B).

    The peak is `monitor.peak_tflops`, or the dense bfloat16 peak of a known GPU; without either there is no MFU.
    """
    peak = recipe.monitor.peak_tflops or _known_peak(world)
    if not peak:
        return lambda facts, seconds: None
    shape, learning = shape_of(config), Learning.of(recipe.stage)
    cached = recipe.compute.feature_cache

    def utilisation(facts: dict[str, Any], seconds: float) -> float:
        images = 0 if cached else facts["images"]
        needed = step_flops(
            shape,
            learning,
            tokens=facts["tokens"],
            pairs=facts["pairs"],
            supervised=facts["supervised"],
            images=images,
        )
        return needed.total / (seconds * world.process.world_size * peak * 1e12)

    return utilisation


def _known_peak(world: World) -> float | None:
    return peak_tflops(torch.cuda.get_device_name(world.device)) if world.device.type == "cuda" else None
