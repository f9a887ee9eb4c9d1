"""Dealing the lanes of the global batch to ranks and micro-batches."""

from __future__ import annotations

from vila.core.errors import ConfigError


def lanes_of(rank: int, world: int, lanes: int, micro: int = 1) -> range:
    """The lanes that `rank` of `world` reads: a contiguous share, so that all ranks in order give all lanes in order.

    Raises ConfigError with the numbers that would do unless `lanes` is a multiple of `world` times `micro`.
    """
    unit = world * micro
    if lanes % unit:
        below, above = lanes // unit * unit, -(-lanes // unit) * unit
        near = " or ".join(str(number) for number in (below, above) if number)
        message = f"a global batch of {lanes} is not a multiple of {world} ranks x micro-batch {micro}; make it {near}"
        share = lanes // world
        if lanes % world == 0:
            fitting = [number for number in range(1, share + 1) if share % number == 0]
            message += f", or batch.micro one of {', '.join(map(str, fitting))}"
        raise ConfigError(message)
    share = lanes // world
    return range(rank * share, (rank + 1) * share)
