"""Compare questions per second of the evaluation runner with `transformers.generate`, one by one and in batches.

    python benchmarks/evaluation.py runs/starter/model --data DIR --questions 240 --rounds 3

The original code asks one question at a time and reuses nothing. `batched` is `generate` at its best: left-padded
batches of `--batch` prompts sorted by length, each image of a batch encoded once per question. The runner batches
prompts of similar length and encodes an image once for all its questions. float32, greedy; answers are compared and the
three alternate. Exits with status 1 if the speed-up over one by one is below 4 with several questions per image, or
below 1.5 with one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
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


@torch.inference_mode()
def batched(engine: Engine, items: Sequence[Item], new: int, stop: list[int], size: int) -> dict[str, str]:
    """Return the answers by item id, in left-padded batches of prompts of similar length."""
    model, processor = engine.model, engine.processor
    by_length = sorted(items, key=lambda item: len(processor.prompt(item.messages, "").ids))
    out: dict[str, str] = {}
    for start in range(0, len(items), size):
        batch = by_length[start : start + size]
        inputs = processor.apply_chat_template(
            [item.messages for item in batch], tokenize=True, return_dict=True, return_tensors="pt", padding_side="left"
        )
        made = model.generate(**inputs, max_new_tokens=new, do_sample=False, eos_token_id=stop, pad_token_id=stop[0])[
            :, inputs["input_ids"].shape[1] :
        ]
        texts = processor.tokenizer.batch_decode(made, skip_special_tokens=True)
        out |= {item.id: text.strip() for item, text in zip(batch, texts, strict=True)}
    return out


def measure(engine: Engine, items: Sequence[Item], new: int, rounds: int, size: int) -> dict[str, float]:
    """Return the median questions per second, their ratios, and the fractions of equal answers."""
    stop = sorted(engine._stop_ids)
    peers: dict[str, Callable[[], dict[str, str]]] = {
        "one by one": lambda: one_by_one(engine, items, new, stop),
        "batched": lambda: batched(engine, items, new, stop, size),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
    equal: dict[str, float] = {}
    for _ in range(rounds):
        fresh = Engine(engine.model, engine.processor)  # with an empty image cache
        began = time.perf_counter()
        mine = ours(fresh, items, new)
        speeds["ours"].append(len(items) / (time.perf_counter() - began))
        for name, run in peers.items():
            began = time.perf_counter()
            theirs = run()
            speeds[name].append(len(items) / (time.perf_counter() - began))
            equal[name] = sum(mine[item.id] == theirs[item.id] for item in items) / len(items)

    def ratio(name: str) -> float:
        return round(statistics.median(a / b for a, b in zip(speeds["ours"], speeds[name], strict=True)), 2)

    return {
        **{name: round(statistics.median(values), 2) for name, values in speeds.items()},
        "ratio": ratio("one by one"),
        "ratio to batched": ratio("batched"),
        "equal answers": min(equal.values()),
    }


def main() -> int:
    """Measure both types of question sets and print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="easy-VQA folder")
    parser.add_argument("--questions", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16, help="batch size of the batched peer")
    asked = parser.parse_args()
    engine = Engine.load(asked.model, dtype="float32")
    benchmark = EasyVqa(asked.data, 0)
    items = benchmark.items()
    first = {item.group: item for item in reversed(items)}
    sets = {
        "several questions per image": EasyVqa(asked.data, asked.questions).items(),
        "one question per image": list(first.values())[: asked.questions // 3],
    }
    found = {
        name: measure(engine, some, benchmark.max_new_tokens, asked.rounds, asked.batch) for name, some in sets.items()
    }
    print(json.dumps({**found, "threads": torch.get_num_threads(), **system_info()}, indent=1))
    return int(any(found[name]["ratio"] < bound for name, bound in BOUNDS.items()))


if __name__ == "__main__":
    sys.exit(main())
