"""Sharing the lanes of the global batch among ranks and micro-batches."""

from __future__ import annotations

from vila.core.errors import ConfigError


def lanes_of(rank: int, world: int, lanes: int) -> range:
    """The lanes that `rank` of `world` reads: a contiguous share, so that all ranks in order give all lanes in order.

    Raises ConfigError with the nearest numbers that would do unless `lanes` is a multiple of `world`.
    """
    if lanes % world:
        below, above = lanes // world * world, -(-lanes // world) * world
        raise ConfigError(
            f"the global batch is not a multiple of the {world} ranks",
            field="batch",
            value=lanes,
            expected=" or ".join(str(number) for number in (below, above) if number),
        )
    share = lanes // world
    return range(rank * share, (rank + 1) * share)


def fitting_micro(world: int, lanes: int, micro: int) -> int:
    """The largest micro-batch up to `micro` that the lanes of a rank are a multiple of. Raises as `lanes_of`."""
    share = len(lanes_of(0, world, lanes))
    return max(number for number in range(1, min(share, micro) + 1) if share % number == 0)


def micro_note(world: int, lanes: int, micro: int) -> str:
    """The line that says so when `fitting_micro` is not the one that was asked for; else empty."""
    fitting = fitting_micro(world, lanes, micro)
    if fitting == micro:
        return ""
    return (
        f"note: batch.micro={micro} is reduced to {fitting}: each of {world} ranks has {lanes // world} of the global "
        f"batch of {lanes}; results do not depend on it"
    )
