"""Where this process stands among those of a run, as `torchrun` tells it; standard library only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from vila.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Place:
    """Rank of this process among `world`, and among the `local_world` of its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes what is written once, and speaks for the others."""
        return self.rank == 0


def current_place(environment: Mapping[str, str] = os.environ) -> Place:
    """The place of this process; alone when nothing says otherwise.

    Raises ConfigError for variables that are not numbers, do not go together, or are set in part.
    """
    try:
        given = {field: int(environment[name]) for field, name in _NAMES.items() if name in environment}
    except ValueError as error:
        raise ConfigError(f"{', '.join(_NAMES.values())}: {error}; {_REMEDY}") from None
    place = Place(**given)
    told = ", ".join(f"{name}={environment[name]}" for name in _NAMES.values() if name in environment)
    for field in ("rank", "world"):
        if field not in given and (place.world > 1 or place.rank > 0):
            raise ConfigError(f"{told}, but {_NAMES[field]} is not set; {_REMEDY}")
    if not (0 <= place.rank < place.world and 0 <= place.local_rank < place.local_world <= place.world):
        raise ConfigError(f"{told} do not go together; {_REMEDY}")
    return place


_NAMES = {"rank": "RANK", "world": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_world": "LOCAL_WORLD_SIZE"}
_REMEDY = "start the run with torchrun, which sets them, or unset them to train in one process"
