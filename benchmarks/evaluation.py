"""Questions a second of the evaluation runner against the original's way, on the same model and the same questions.

    python benchmarks/evaluation.py runs/starter/model --data DIR --questions 240 --rounds 3

The original asks one question at a time (batch 1, `transformers.generate`, nothing reused). Ours asks in batches of
like length, and computes a picture once for all its questions. float32, greedy, answers compared; they take turns.
Exit status 1 below 4 times on sets with several questions a picture, or below 1.5 times with one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from vila.core.system import system_info
from vila.core.types import Image
from vila.engine.engine import Engine
from vila.engine.request import SamplingParams
from vila.eval.benchmark import Item
from vila.eval.benchmarks.easy_vqa import EasyVqa
from vila.eval.runner import batches

BOUNDS = {"several questions a picture": 4.0, "one question a picture": 1.5}


def ours(engine: Engine, items: Sequence[Item], new: int) -> dict[str, str]:
    """Answers by item id, as the runner asks."""
    out: dict[str, str] = {}
    for batch in batches(items):
        answers = engine.generate_batch([item.messages for item in batch], SamplingParams(max_new_tokens=new))
        out |= {item.id: answer for item, answer in zip(batch, answers, strict=True)}
    return out


@torch.inference_mode()
def one_by_one(engine: Engine, items: Sequence[Item], new: int, stop: list[int]) -> dict[str, str]:
    """Answers by item id, one question at a time."""
    model, processor = engine.model, engine.processor
    out: dict[str, str] = {}
    for item in items:
        prompt = processor.prompt(item.messages, "")
        ids = torch.tensor([list(prompt.ids)])
        pixels = processor.pixels([part for part in item.messages[0].parts if isinstance(part, Image)])
        made = model.generate(
            input_ids=ids, pixel_values=pixels, max_new_tokens=new, do_sample=False, eos_token_id=stop,
            pad_token_id=stop[0],
        )  # fmt: skip
        out[item.id] = processor.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
    return out


def measure(engine: Engine, items: Sequence[Item], new: int, rounds: int) -> dict[str, float]:
    """Medians of questions a second, and the share of equal answers."""
    stop = sorted(engine._stop_ids)
    speeds: dict[str, list[float]] = {"ours": [], "one by one": []}
    equal = 0.0
    for _ in range(rounds):
        fresh = Engine(engine.model, engine.processor)  # knows no picture yet
        began = time.perf_counter()
        mine = ours(fresh, items, new)
        middle = time.perf_counter()
        theirs = one_by_one(engine, items, new, stop)
        speeds["ours"].append(len(items) / (middle - began))
        speeds["one by one"].append(len(items) / (time.perf_counter() - middle))
        equal = sum(mine[item.id] == theirs[item.id] for item in items) / len(items)
    ratios = [a / b for a, b in zip(speeds["ours"], speeds["one by one"], strict=True)]
    return {
        **{name: round(statistics.median(values), 2) for name, values in speeds.items()},
        "ratio": round(statistics.median(ratios), 2),
        "equal answers": equal,
    }


def main() -> int:
    """Measure both kinds of set and print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="easy-VQA folder")
    parser.add_argument("--questions", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    engine = Engine.load(asked.model, dtype="float32")
    benchmark = EasyVqa(asked.data, 0)
    items = benchmark.items()
    first = {item.group: item for item in reversed(items)}
    sets = {
        "several questions a picture": EasyVqa(asked.data, asked.questions).items(),
        "one question a picture": list(first.values())[: asked.questions // 3],
    }
    found = {name: measure(engine, some, benchmark.max_new_tokens, asked.rounds) for name, some in sets.items()}
    print(json.dumps({**found, "threads": torch.get_num_threads(), **system_info()}, indent=1))
    return int(any(found[name]["ratio"] < bound for name, bound in BOUNDS.items()))


if __name__ == "__main__":
    sys.exit(main())
