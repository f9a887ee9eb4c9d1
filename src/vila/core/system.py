"""The machine and the process: CPU, memory, package versions; rank and world size. Standard library only."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vila.core.errors import ConfigError


def cpu_name() -> str:
    """Return the CPU model name that the operating system reports."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or "unknown"


def memory_gib() -> float | None:
    """Return the physical memory in GiB, or None if the system does not report it."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def version(package: str) -> str | None:
    """Return the version of an installed distribution, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def system_info() -> dict[str, Any]:
    """Return CPU, number of usable cores, memory, operating system, versions and the date of today (UTC)."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "date": datetime.now(UTC).date().isoformat(),
    }


# Rank and world size of this process, as set by `torchrun`; standard library only.


_VARIABLES = {
    "rank": "RANK",
    "world_size": "WORLD_SIZE",
    "local_rank": "LOCAL_RANK",
    "local_world_size": "LOCAL_WORLD_SIZE",
}
_HINT = "start the run with torchrun, which sets the variables, or unset them to train in one process"


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """Rank of this process and number of processes, in the run and on this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the process that writes shared files and logs."""
        return self.rank == 0


def current_process(environment: Mapping[str, str] = os.environ) -> ProcessInfo:
    """Return the `ProcessInfo` of this process; the defaults where `torchrun` has set no variable.

    Raises ConfigError if the variables are not integers, contradict each other, or are only partly set.
    """
    given: dict[str, int] = {}
    for field, name in _VARIABLES.items():
        if name in environment:
            try:
                given[field] = int(environment[name])
            except ValueError:
                raise ConfigError(field=name, value=environment[name], expected="an integer", hint=_HINT) from None
    process = ProcessInfo(**given)
    for field in ("rank", "world_size"):
        if field not in given and (process.world_size > 1 or process.rank > 0):
            raise ConfigError("not set", field=_VARIABLES[field], hint=_HINT)
    variables = {_VARIABLES[field]: value for field, value in given.items()}
    is_in_range = 0 <= process.rank < process.world_size and 0 <= process.local_rank < process.local_world_size
    if not is_in_range or process.local_world_size > process.world_size:
        raise ConfigError("the variables contradict each other", value=variables, hint=_HINT)
    return process
