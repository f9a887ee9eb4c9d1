"""Data loading that a test kills: writes one file per step, and resumes after the last one.

python -m tests.data.consume FILE OUT STEPS
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from tests.data.reading import reader_of
from vila.core.files import write_json
from vila.data.packing import PackingPolicy, PackingStreamState
from vila.data.workers import WorkerStreams


def main(file: Path, out: Path, steps: int) -> None:
    """Write one file per step: samples and pixels of its sequences, and the state after it."""
    written = sorted(out.glob("*.json"))
    states = None
    if written:
        saved = json.loads(written[-1].read_text())["states"]
        states = [PackingStreamState(state["next_position"], tuple(state["waiting"])) for state in saved]
    policy = PackingPolicy(max_length=96, look_ahead=6)
    streams = WorkerStreams(reader_of(file), 4, policy=policy, workers=2, start_method="fork", states=states)
    for step in range(len(written), steps):
        rows = [
            {
                "ids": [sample.id for sample in row],
                "positions": list(row.positions),
                "pixels": hashlib.sha256(np.ascontiguousarray(np.array(row.pixels)).tobytes()).hexdigest(),
            }
            for row in streams.step()
        ]
        time.sleep(0.03)  # a step of training
        write_json(out / f"{step:05d}.json", {"rows": rows, "states": [asdict(state) for state in streams.states]})
    streams.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
