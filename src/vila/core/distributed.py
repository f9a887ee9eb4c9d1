"""Rank and world size of this process, as set by `torchrun`; standard library only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from vila.core.errors import ConfigError

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
