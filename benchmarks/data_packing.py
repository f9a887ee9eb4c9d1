"""Compare padding of micro-batches, as in the original code, with packed sequences.

    python benchmarks/data_packing.py

Lengths are drawn from distributions like those of the training stages; no text is needed. Exits with status 1 if
packed sequences of stage 3 are less than 98 % full, or if those of stage 2 are over one percentage point below best-fit
decreasing over all samples at once, which needs all samples and is an upper bound for a stream.
"""

from __future__ import annotations

import argparse
import bisect
import json
import sys
import time
from collections.abc import Callable

import numpy as np

from vila.chat.tokenize import TokenizedSample, TokenSegment
from vila.core.system import system_info
from vila.data.packing import PackingPolicy, PackingStreams

LENGTH, LANES = 4096, 8
STAGE_3_FILL, STAGE_2_GAP = 0.98, 0.01
MICRO = {"stage 2": 8, "stage 3": 16}  # samples of a padded micro-batch, as published


def stage_2(rng: np.random.Generator, image: int) -> int:
    """Draw half pages of 1 to 6 images and log-normal text (median 300 tokens), half pairs with 25 tokens of text."""
    if rng.random() < 0.5:
        return int(rng.integers(1, 7)) * image + int(rng.lognormal(np.log(300), 0.8))
    return image + max(1, int(rng.normal(25, 8)))


def stage_3(rng: np.random.Generator, image: int) -> int:
    """Draw ShareGPT4V-like turns, 3.5 on average, log-normal (median 120 tokens); a quarter has no image."""
    text = sum(int(rng.lognormal(np.log(120), 0.7)) for _ in range(1 + int(rng.geometric(0.4))))
    return text + (image if rng.random() >= 0.25 else 0)


def draw(stage: Callable[[np.random.Generator, int], int], image: int, number: int) -> list[int]:
    """Draw `number` lengths that fit a packed sequence; longer samples are left out for all methods."""
    rng = np.random.default_rng(0)
    out: list[int] = []
    while len(out) < number:
        if (length := stage(rng, image)) <= LENGTH:
            out.append(length)
    return out


def padded(lengths: list[int], micro: int) -> float:
    """Fraction of real tokens when each micro-batch is padded to its longest sample."""
    batches = [lengths[i : i + micro] for i in range(0, len(lengths), micro)]
    return sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def best_fit(lengths: list[int]) -> float:
    """Fraction of real tokens with best-fit decreasing over all samples at once."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = bisect.bisect_left(rooms, length)
        room = rooms.pop(place) if place < len(rooms) else LENGTH
        bisect.insort(rooms, room - length)
    return sum(lengths) / (len(rooms) * LENGTH)


def streamed(lengths: list[int], packing: str, look_ahead: int) -> tuple[float, float]:
    """Fraction of real tokens of the packing streams, and microseconds per sequence for packing and buffering."""

    def fetch(position: int) -> TokenizedSample:
        length = lengths[position % len(lengths)]
        return TokenizedSample(
            "", np.zeros(length, np.int32), np.ones(length, bool), (TokenSegment(length, 0, -1),), -1, ()
        )

    lanes = PackingStreams(
        fetch, LANES, policy=PackingPolicy(max_length=LENGTH, look_ahead=look_ahead, packing=packing)
    )  # type: ignore[arg-type]
    real = shown = rows = 0
    began = time.perf_counter()
    while min(state.next_position for state in lanes.states) < len(lengths):
        step = [sum(map(len, row)) for row in lanes.step()]
        real, rows = real + sum(step), rows + len(step)
        shown += LENGTH * len(step) if packing == "rows" else max(step) * len(step)
    micros = (time.perf_counter() - began) / rows * 1e6
    if packing == "rows":
        # Buffered samples count too, packed optimally: samples that fit badly must not be left out.
        waiting = [lengths[p % len(lengths)] for state in lanes.states for p in state.waiting]
        real, shown = real + sum(waiting), shown + sum(waiting) / best_fit(waiting)
    return real / shown, micros


def main() -> int:
    """Print the table; return the exit status."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--samples", type=int, default=40_000)
    chosen = options.parse_args()
    results, status = {}, 0
    for name, stage in (("stage 2", stage_2), ("stage 3", stage_3)):
        for image in (576, 196):
            lengths = draw(stage, image, chosen.samples)
            bound = best_fit(lengths)
            row = {"padded": padded(lengths, MICRO[name]), "grouped": streamed(lengths, "grouped", 64)[0]}
            for look_ahead in (64, 512):
                row[f"packed, look-ahead {look_ahead}"], micros = streamed(lengths, "rows", look_ahead)
                row[f"microseconds per packed sequence, look-ahead {look_ahead}"] = micros
            row["best-fit decreasing"] = bound
            results[f"{name}, {image} tokens per image"] = {k: round(v, 4 if v <= 1 else 0) for k, v in row.items()}
            floor = STAGE_3_FILL if name == "stage 3" else bound - STAGE_2_GAP
            status |= row["packed, look-ahead 64"] < floor
    sys.stdout.write(json.dumps({"fraction of real tokens": results, **system_info()}, indent=1) + "\n")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
