"""What asking a judge will cost, before it is asked: tokens guessed from characters, prices from a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Prices = Mapping[str, tuple[float, float]]
"""US dollars for a million tokens read and for a million written, by model."""

PRICES: Prices = {
    "gpt-3.5-turbo": (0.50, 1.50),
    "gpt-4": (30.0, 60.0),
    "gpt-4-turbo": (10.0, 30.0),
    "gpt-4o": (2.50, 10.0),
    "gpt-4o-mini": (0.15, 0.60),
    "gpt-4.1": (2.00, 8.00),
    "gpt-4.1-mini": (0.40, 1.60),
    "gpt-4.1-nano": (0.10, 0.40),
}
"""As OpenAI published them in 2025; prices change, so an estimate says that it is one."""

_BYTES_PER_TOKEN = 4
_TOKENS_PER_MESSAGE = 4
_TOKENS_PER_REPLY = 20
"""`{'pred': 'yes', 'score': 4}` and a little more."""
_DATED = re.compile(r"-\d{4}(-\d{2}-\d{2})?$")


@dataclass(frozen=True, slots=True)
class Estimate:
    """dollars: None where the model's price is not known. kept: requests whose replies are there already."""

    model: str
    requests: int
    kept: int
    read_tokens: int
    written_tokens: int
    dollars: float | None

    @property
    def text(self) -> str:
        """One line for the user."""
        kept = f" ({self.kept:,} more are answered already)" if self.kept else ""
        cost = (
            f"the price of {self.model!r} is not known"
            if self.dollars is None
            else f"about ${self.dollars:.2f} at the prices of 2025"
            if self.model in PRICES or _DATED.sub("", self.model) in PRICES
            else f"about ${self.dollars:.2f}"
        )
        return (
            f"judge {self.model}: {self.requests:,} requests{kept}, about {self.read_tokens:,} tokens in and "
            f"{self.written_tokens:,} out; {cost}"
        )


def estimate_cost(
    bodies: Sequence[Mapping[str, Any]], model: str, prices: Prices | None = None, kept: int = 0
) -> Estimate:
    """prices: of models that the table does not have, or other ones. kept: requests that need not be sent.

    A dated model (`gpt-4o-2024-11-20`) costs what its name without the date does.
    """
    read = sum(
        _TOKENS_PER_MESSAGE + -(-len(message["content"].encode()) // _BYTES_PER_TOKEN)
        for body in bodies
        for message in body["messages"]
    )
    written = _TOKENS_PER_REPLY * len(bodies)
    table = {**PRICES, **(prices or {})}
    price = table.get(model) or table.get(_DATED.sub("", model))
    dollars = None if price is None else (read * price[0] + written * price[1]) / 1e6
    return Estimate(model, len(bodies), kept, read, written, dollars)
