"""What a load run says: throughput, and percentiles of the waits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vila.bench.load import Timing, problems

PERCENTS = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """One line of the table. Times are seconds; percentiles are of answered requests, by `PERCENTS`.

    load:          what was asked for: `8 clients`, `2.5 a second`.
    seconds:       from the first question to the last answer.
    new_tokens:    of answers a second, over all requests; `requests` a second likewise.
    first_token:   from the question to the first piece of its answer.
    between:       between one piece and the next of one answer.
    whole:         from the question to the answer's end.
    lengths:       fewest, mean and most tokens of an answer: a model may end before its limit.
    """

    load: str
    asked: int
    answered: int
    statuses: dict[str, int]
    retries: int
    seconds: float
    requests: float
    new_tokens: float
    prompt_tokens: float
    first_token: tuple[float, ...]
    between: tuple[float, ...]
    whole: tuple[float, ...]
    lengths: tuple[int, float, int]
    problems: tuple[tuple[str, int], ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data, percentiles by name."""
        out = asdict(self)
        for name in ("first_token", "between", "whole"):
            out[name] = {f"p{percent}": value for percent, value in zip(PERCENTS, getattr(self, name), strict=True)}
        return out


def summarise(load: str, timings: Sequence[Timing]) -> LoadSummary:
    """The summary of one run; percentiles are NaN when nothing was answered."""
    good = [timing for timing in timings if timing.answered]
    seconds = max((t.end for t in timings), default=0.0) - min((t.start for t in timings), default=0.0)
    tokens = [timing.tokens for timing in good]
    rate = 1 / seconds if seconds > 0 else math.nan
    return LoadSummary(
        load=load,
        asked=len(timings),
        answered=len(good),
        statuses=dict(Counter(str(timing.status or "no connection") for timing in timings)),
        retries=sum(timing.retries for timing in timings),
        seconds=seconds,
        requests=len(good) * rate,
        new_tokens=sum(tokens) * rate,
        prompt_tokens=sum(timing.prompt for timing in good) * rate,
        first_token=percentiles([timing.first - timing.start for timing in good if timing.first]),
        between=percentiles([gap for timing in good for gap in timing.gaps]),
        whole=percentiles([timing.end - timing.start for timing in good]),
        lengths=(min(tokens, default=0), sum(tokens) / len(tokens) if tokens else 0.0, max(tokens, default=0)),
        problems=tuple(problems(timings)),
    )


def percentiles(values: Sequence[float]) -> tuple[float, ...]:
    """The smallest values that so many percent are not above (nearest rank); NaN of nothing."""
    ordered = sorted(values)
    if not ordered:
        return tuple(math.nan for _ in PERCENTS)
    return tuple(ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] for percent in PERCENTS)
