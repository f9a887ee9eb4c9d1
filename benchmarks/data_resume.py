"""Measure the time to resume at data positions 1e5, 1e7 and 1e8, and to start at 0.

    python benchmarks/data_resume.py

The source is synthetic (a billion samples, generated on access), so the time is that of seeking and of refilling the
look-ahead buffers. Exits with status 1 if the first step after a resume takes over a second.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import numpy as np

from vila.chat.tokenize import TokenizedSample, TokenSegment
from vila.core.system import system_info
from vila.core.types import Message, Sample
from vila.data.mixture import Mixture, MixtureDataset
from vila.data.packing import PackingPolicy, PackingStreams, PackingStreamState

LANES, LOOK_AHEAD, LIMIT_S = 16, 64, 1.0
POSITIONS = (0, 100_000, 10_000_000, 100_000_000)


class Billion:
    """Source of a billion short conversations."""

    def __len__(self) -> int:
        return 1_000_000_000

    def __getitem__(self, index: int) -> Sample:
        return Sample(str(index), (Message.of("user", "q"), Message.of("assistant", "a" * (index % 900 + 1))))


def first_step(position: int) -> float:
    """Return the seconds from construction to the first step after `position`."""
    began = time.perf_counter()
    mixture = Mixture([MixtureDataset("a", Billion()), MixtureDataset("b", Billion(), repeat=0.5)], seed=0)

    def fetch(place: int) -> TokenizedSample:
        _, sample = mixture[place]
        length = 30 + len(sample.messages[-1].text)
        return TokenizedSample(
            sample.id, np.zeros(length, np.int32), np.ones(length, bool), (TokenSegment(length, 0, -1),), -1, ()
        )

    start = position // LANES * LANES
    states = [
        PackingStreamState(
            start + lane, tuple(range(max(lane, start + lane - LANES * (LOOK_AHEAD - 1)), start + lane, LANES))
        )
        for lane in range(LANES)
    ]
    PackingStreams(fetch, LANES, policy=PackingPolicy(max_length=4096, look_ahead=LOOK_AHEAD), states=states).step()
    return time.perf_counter() - began


def main() -> int:
    """Print the seconds; return the exit status."""
    seconds = {f"{position:,}": statistics.median(first_step(position) for _ in range(5)) for position in POSITIONS}
    facts = {
        "seconds to the first step": {name: round(value, 4) for name, value in seconds.items()},
        "lanes": LANES,
        "look_ahead": LOOK_AHEAD,
        **system_info(),
    }
    sys.stdout.write(json.dumps(facts, indent=1) + "\n")
    return int(max(seconds.values()) > LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
