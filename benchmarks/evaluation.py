"""Compare questions per second of the evaluation runner with one question at a time, as in the original code.

    python benchmarks/evaluation.py runs/starter/model --data DIR --questions 240 --rounds 3

The original code runs batches of one question with `transformers.generate` and reuses nothing. The runner batches
prompts of similar length and encodes an image once for all its questions. float32, greedy; answers are compared and the
two alternate. Exits with status 1 if the speed-up is below 4 with several questions per image, or below 1.5 with one.
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
from vila.engine.sampling_params import SamplingParams
from vila.eval.benchmark import Item
from vila.eval.benchmarks.easy_vqa import EasyVqa
from vila.eval.runner import batches

BOUNDS = {"several questions per image": 4.0, "one question per image": 1.5}


def ours(engine: Engine, items: Sequence[Item], new: int) -> dict[str, str]:
    """Return the answers of the runner by item id."""
    out: dict[str, str] = {}
    for batch in batches(items):
        answers = engine.generate_batch([item.messages for item in batch], SamplingParams(max_new_tokens=new))
        out |= {item.id: answer for item, answer in zip(batch, answers, strict=True)}
    return out


@torch.inference_mode()
def one_by_one(engine: Engine, items: Sequence[Item], new: int, stop: list[int]) -> dict[str, str]:
    """Return the answers by item id, one question at a time."""
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
    """Return the median questions per second and the fraction of equal answers."""
    stop = sorted(engine._stop_ids)
    speeds: dict[str, list[float]] = {"ours": [], "one by one": []}
    equal = 0.0
    for _ in range(rounds):
        fresh = Engine(engine.model, engine.processor)  # with an empty image cache
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
    """Measure both types of question sets and print one JSON object."""
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
        "several questions per image": EasyVqa(asked.data, asked.questions).items(),
        "one question per image": list(first.values())[: asked.questions // 3],
    }
    found = {name: measure(engine, some, benchmark.max_new_tokens, asked.rounds) for name, some in sets.items()}
    print(json.dumps({**found, "threads": torch.get_num_threads(), **system_info()}, indent=1))
    return int(any(found[name]["ratio"] < bound for name, bound in BOUNDS.items()))


if __name__ == "__main__":
    sys.exit(main())
