"""Compare concurrent requests with the same requests one after another, on one engine in one process.

    python benchmarks/serving_engine.py MODEL --images FOLDER --threads 2 --rounds 5 --out serving_engine.json

All variants generate the same number of tokens from the same prompts, greedily, and alternate; each round has new
prompts and another order of variants. `text` has prompts of `--prompt` tokens and answers of `--tokens` tokens
without stop tokens; `image` one image with a question and a short answer. `single` calls `Engine.generate` for one
request after another; `batcher, 1 at a time` submits them to the batcher one by one, which shows its overhead. Last,
the longest pause of a running stream during the prefill of a prompt of four chunks, next to two decode steps and one
chunk alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vila.core.system import system_info
from vila.core.types import Image, Message
from vila.engine.backend import BACKENDS
from vila.engine.batcher import Batcher
from vila.engine.engine import Engine
from vila.engine.sampling_params import SamplingParams

WORDS = (
    "the",
    "red",
    "blue",
    "small",
    "round",
    "shape",
    "stands",
    "near",
    "a",
    "table",
    "and",
    "three",
    "birds",
    "look",
)
Requests = Sequence[Sequence[Message]]


def text_requests(engine: Engine, count: int, tokens: int, draw: random.Random) -> Requests:
    """Return prompts of about `tokens` tokens without a common prefix."""

    def one() -> list[Message]:
        words: list[str] = []
        while True:
            words.append(draw.choice(WORDS))
            message = [Message.of("user", " ".join(words))]
            if len(engine.processor.prompt(message).ids) >= tokens:
                return message

    return [one() for _ in range(count)]


def image_requests(paths: Sequence[Path], count: int, draw: random.Random) -> Requests:
    """Return questions about images, without a common prefix."""
    return [[Message.of("user", Image(path), "what shape is in the image?")] for path in draw.sample(paths, count)]


def single(engine: Engine, requests: Requests, sampling: SamplingParams) -> list[tuple[int, ...]]:
    """Run requests one after another, without the batcher."""
    return [engine.complete([messages], sampling)[0].ids for messages in requests]


def together(batcher: Batcher, requests: Requests, sampling: SamplingParams) -> list[tuple[int, ...]]:
    """Run all requests concurrently."""
    handles = [batcher.submit(messages, sampling) for messages in requests]
    return [handle.generation().ids for handle in handles]


def in_turn(batcher: Batcher, requests: Requests, sampling: SamplingParams) -> list[tuple[int, ...]]:
    """Run requests one after another through the batcher."""
    return [batcher.submit(messages, sampling).generation().ids for messages in requests]


def measure(
    engine: Engine,
    batcher: Batcher,
    make: Callable[[], Requests],
    sampling: SamplingParams,
    rounds: int,
) -> Iterator[dict[str, Any]]:
    """Return one record for each variant."""
    variants: dict[str, Callable[[Requests], list[tuple[int, ...]]]] = {
        "single": lambda some: single(engine, some, sampling),
        "batcher, 1 at a time": lambda some: in_turn(batcher, some, sampling),
        "batcher, together": lambda some: together(batcher, some, sampling),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    tokens, same, answers = 0, 0, 0
    for number in range(rounds + 1):
        requests = make()
        order = list(variants)
        order = order[number % 3 :] + order[: number % 3]
        found = {}
        for name in order:
            forget(engine, batcher)
            begin = time.perf_counter()
            found[name] = variants[name](requests)
            seconds[name].append(time.perf_counter() - begin)
        tokens = sum(map(len, found["single"]))
        same += sum(a == b for a, b in zip(found["single"], found["batcher, together"], strict=True))
        answers += len(requests)
    for name, times in seconds.items():
        # The first round warms up.
        pairs = zip(seconds["single"][1:], times[1:], strict=True)
        yield {
            "variant": name,
            "requests_per_s": len(requests) / statistics.median(times[1:]),
            "tokens_per_s": tokens / statistics.median(times[1:]),
            "times_single": statistics.median(alone / own for alone, own in pairs),
            "same_answers": same / answers,
        }


def prefill_delay(engine: Engine, batcher: Batcher, draw: random.Random, rounds: int) -> dict[str, float]:
    """Return the longest wait of a running stream for its next token, in ms, during the prefill of a four-chunk prompt.

    `chunk` is the longest of the four chunks when that prompt is prefilled alone.
    """
    chunk, take, took = batcher._scheduler.prefill_chunk, batcher._scheduler.step, [0.0]

    def timed() -> None:
        begin = time.perf_counter()
        take()
        took.append(time.perf_counter() - begin)

    batcher._scheduler.step = timed  # type: ignore[method-assign]
    steps, waits, chunks = [], [], []
    for _ in range(rounds):
        forget(engine, batcher)
        (running,), (late,) = text_requests(engine, 1, 64, draw), text_requests(engine, 1, 4 * chunk, draw)
        took.clear()
        batcher.submit(late, SamplingParams(max_new_tokens=1)).generation()
        chunks.append(max(took))
        forget(engine, batcher)
        times: list[float] = []
        stream = batcher.submit(
            running,
            SamplingParams(max_new_tokens=200),
            on_event=lambda event, times=times: times.append(time.perf_counter()),
        )
        while len(times) < 60:
            time.sleep(0.001)
        asked = time.perf_counter()
        batcher.submit(late, SamplingParams(max_new_tokens=1)).generation()
        stream.cancel()
        while not stream.done:
            time.sleep(0.001)
        gaps = [(later, later - sooner) for sooner, later in itertools.pairwise(times)]
        steps.append(statistics.median(gap for at, gap in gaps if at < asked))
        waits.append(max(gap for at, gap in gaps if at >= asked))
    step, wait, one = (1000 * statistics.median(some) for some in (steps, waits, chunks))
    return {"step": step, "chunk": one, "longest_wait": wait, "bound": 2 * step + one}


def forget(engine: Engine, batcher: Batcher) -> None:
    """Clear the caches, so that a variant reuses nothing of earlier ones."""
    for scheduler in (engine._offline.scheduler, batcher._scheduler):
        scheduler.runner.features._features.clear()
        scheduler.pool.forget_all()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--images", type=Path, help="directory of images; without it only text is measured")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto", choices=BACKENDS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--delay", action="store_true", help="measure only the delay by a prefill")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    draw = random.Random(0)
    rows = []
    engine = Engine.load(options.model, options.dtype, options.device, backend=options.backend, prefix_caching=False)
    endless = Engine(engine.model, engine.processor, engine._program, fast_decoder=engine._fast_decoder)
    endless._stop_ids = frozenset()
    with Batcher(endless, max_num_seqs=options.requests) as batcher:
        make = lambda: text_requests(endless, options.requests, options.prompt, draw)  # noqa: E731
        sampling = SamplingParams(max_new_tokens=options.tokens)
        for row in measure(endless, batcher, make, sampling, options.rounds) if not options.delay else ():
            rows.append({"load": "text", **row})
    with Batcher(endless, max_num_seqs=options.requests) as batcher:
        delay = prefill_delay(endless, batcher, draw, options.rounds)
    if options.images and not options.delay:
        paths = sorted(path for path in options.images.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
        with Batcher(engine, max_num_seqs=options.requests) as batcher:
            many = 4 * options.requests
            for row in measure(
                engine,
                batcher,
                lambda: image_requests(paths, many, draw),
                SamplingParams(max_new_tokens=16),
                options.rounds,
            ):
                rows.append({"load": "image", **row})
    facts = {**system_info(), "dtype": str(engine.model.dtype), "backend": engine.backend, "threads": options.threads}
    print(json.dumps(facts))
    print("| load | variant | requests/s | tokens/s | times single | same answers |\n|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['load']} | {row['variant']} | {row['requests_per_s']:.2f} | {row['tokens_per_s']:.1f} "
            f"| {row['times_single']:.2f} | {row['same_answers']:.1%} |"
        )
    print("prefill delay, ms: " + ", ".join(f"{name} {value:.1f}" for name, value in delay.items()))
    if options.out:
        found = {"machine": facts, "rows": rows, "prefill_delay_ms": delay}
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
