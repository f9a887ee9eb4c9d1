"""Measure memory and time of opening a JSON-lines file with 1e5 and with 1e7 records.

    python benchmarks/data_index.py --work /tmp/data-index

Writes both files, opens each in new processes (once without an index, once with it), reads 1000 random samples and
prints resident memory and times. Exits with status 1 if the large file takes over 50 MB more than the small one once
its index exists. `--list` measures a JSON list instead of JSON lines. The files are deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

LIMIT_MB = 50
SIZES = (100_000, 10_000_000)
READS = 1000


def write(path: Path, records: int, as_list: bool) -> None:
    """Write tiny records: {"id": "7", "question": "q7", "answer": "a7"}."""
    with path.open("w") as stream:
        stream.write("[" if as_list else "")
        for start in range(0, records, 10_000):
            rows = (f'{{"id": "{n}", "question": "q{n}", "answer": "a{n}"}}' for n in range(start, start + 10_000))
            comma = ",\n" if as_list else "\n"
            last = "" if as_list and start + 10_000 >= records else comma
            stream.write(comma.join(rows) + last)
        stream.write("]" if as_list else "")


def measure(path: Path) -> dict[str, float]:
    """Open the file and read samples in this process; return MB and seconds."""
    from vila.data.formats.base import FORMATS

    start = time.perf_counter()
    source = FORMATS["flan"].open(path, path.parent)
    opened = time.perf_counter()
    chance = random.Random(0)
    for number in (chance.randrange(len(source)) for _ in range(READS)):
        sample = source[number]
        assert sample.id == str(number)
        assert sample.messages[1].text == f"a{number}"
    read = time.perf_counter()
    with Path("/proc/self/statm").open() as stream:
        resident = int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "records": len(source),
        "open_s": opened - start,
        "read_us": (read - opened) / READS * 1e6,
        "resident_mb": resident / 2**20,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }


def main() -> int:
    """Run both sizes and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--list", action="store_true", help="a JSON list instead of JSON lines")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure)))
        return 0
    given.work.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "VILA_CACHE": str(given.work / "cache")}
    resident = []
    for records in SIZES:
        path = given.work / f"{records}.{'json' if given.list else 'jsonl'}"
        write(path, records, given.list)
        for state in ("building", "indexed"):
            command = [sys.executable, __file__, "--work", str(given.work), "--measure", str(path)]
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout)
            print(
                f"{records:>10,} records, {path.stat().st_size / 2**20:6.0f} MB, {state:8}: "
                f"open {found['open_s']:7.3f} s, {found['read_us']:6.1f} us a sample, "
                f"resident {found['resident_mb']:.1f} MB, peak {found['peak_mb']:.1f} MB"
            )
        resident.append(found["resident_mb"])
        path.unlink()
    for file in (given.work / "cache" / "index").iterdir():
        file.unlink()
    above = resident[1] - resident[0]
    print(f"{SIZES[1]:,} records take {above:.1f} MB above {SIZES[0]:,}; the limit is {LIMIT_MB}")
    return int(above > LIMIT_MB)


if __name__ == "__main__":
    sys.exit(main())
