"""What a step did, in numbers: how many records came in, how many went out, and why the others did not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vila.core.fields import Fields

_MAX = 2**63 - 1


@dataclass(slots=True)
class Counts:
    """`read` = `written` + the sum of `dropped`; `noted` counts what happened to records that were kept."""

    read: int = 0
    written: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> dict[str, Any]:
        """The form in which counts are stored, reasons in alphabetical order."""
        return {
            "in": self.read,
            "out": self.written,
            "dropped": dict(sorted(self.dropped.items())),
            "noted": dict(sorted(self.noted.items())),
        }

    @staticmethod
    def total(stored: Iterable[Fields]) -> Counts:
        """Add up stored counts. Raises the error of the fields for what is no number."""
        counts = Counts()
        for one in stored:
            counts.read += one.integer("in", maximum=_MAX)
            counts.written += one.integer("out", maximum=_MAX)
            for name, own in (("dropped", counts.dropped), ("noted", counts.noted)):
                section = one.section(name)
                own.update({reason: section.integer(reason, maximum=_MAX) for reason in section})
        return counts

    def __str__(self) -> str:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in self.dropped.most_common())
        return f"{self.read:,} in, {self.written:,} out" + (f"; dropped: {reasons}" if reasons else "")
