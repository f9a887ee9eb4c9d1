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

    Raises ConfigError for variables that are not numbers or do not go together.
    """
    names = {"rank": "RANK", "world": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_world": "LOCAL_WORLD_SIZE"}
    if names["world"] not in environment:
        return Place()
    try:
        place = Place(
            **{field: int(environment.get(name, 1 if "world" in field else 0)) for field, name in names.items()}
        )
    except ValueError as error:
        raise ConfigError(
            f"{', '.join(names.values())}: {error}; start the run with torchrun, which sets them"
        ) from None
    if not (0 <= place.rank < place.world and 0 <= place.local_rank < place.local_world <= place.world):
        raise ConfigError(f"RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE do not go together: {place}")
    return place
