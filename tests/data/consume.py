"""Takes steps from worker lanes and keeps a record of each, going on after the last one kept: killed by a test.

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
    """One file a step: the samples and pixels of its rows, and the state after it."""
    kept = sorted(out.glob("*.json"))
    states = None
    if kept:
        saved = json.loads(kept[-1].read_text())["states"]
        states = [PackingStreamState(state["next_position"], tuple(state["waiting"])) for state in saved]
    policy = PackingPolicy(max_length=96, look_ahead=6)
    lanes = WorkerStreams(reader_of(file), 4, policy=policy, workers=2, start_method="fork", states=states)
    for step in range(len(kept), steps):
        rows = [
            {
                "ids": [sample.id for sample in row],
                "positions": list(row.positions),
                "pixels": hashlib.sha256(np.ascontiguousarray(np.array(row.pixels)).tobytes()).hexdigest(),
            }
            for row in lanes.step()
        ]
        time.sleep(0.03)  # a step of training
        write_json(out / f"{step:05d}.json", {"rows": rows, "states": [asdict(state) for state in lanes.states]})
    lanes.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
