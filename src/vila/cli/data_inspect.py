"""`vila data inspect`: one sample as the model sees it, what is learnt told from what is not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.text import Text

if TYPE_CHECKING:
    from vila.chat.tokenize import TokenizedSample
    from vila.report.page import Card

_STYLES = {"learnt": "bold green", "given": "dim", "image": "magenta"}


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens of one kind (`learnt`, `given`, `image`) in one segment, written out."""

    segment: int
    kind: str
    text: str
    tokens: int


def runs_of(sample: TokenizedSample, tokenizer: Any) -> list[Run]:
    """The runs of a sample in order. Placeholders of neighbouring pictures are one run each.

    tokenizer: a transformers tokenizer; it decodes each run on its own.
    """
    from vila.chat.tokenize import IGNORE

    kinds = [
        "image" if slot else "given" if label == IGNORE else "learnt"
        for slot, label in zip(sample.slots.tolist(), sample.labels.tolist(), strict=True)
    ]
    return list(_runs(sample.ids.tolist(), sample.segments.tolist(), kinds, tokenizer))


def _runs(ids: Sequence[int], segments: Sequence[int], kinds: Sequence[str], tokenizer: Any) -> Iterator[Run]:
    for (segment, kind), places in groupby(range(len(ids)), key=lambda place: (segments[place], kinds[place])):
        some = [ids[place] for place in places]
        text = f"<image x {len(some)}>" if kind == "image" else tokenizer.decode(some, skip_special_tokens=False)
        yield Run(segment, kind, text, len(some))


def as_terminal_text(runs: Sequence[Run]) -> Text:
    """The runs in colours; where there are none, what is learnt stands between double angle quotes.

    A new segment (a branch) begins on a line of its own.
    """
    out, segment = Text(), 0
    for run in runs:
        if run.segment != segment:
            out.append(f"\n--- branch {run.segment}\n", style="cyan")
            segment = run.segment
        out.append(f"\u00ab{run.text}\u00bb" if run.kind == "learnt" else run.text, style=_STYLES[run.kind])
    return out


def as_card(sample: TokenizedSample, runs: Sequence[Run]) -> Card:
    """A card of a gallery: the first picture, and the runs below it."""
    from vila.core.types import Image
    from vila.media.image import open_image
    from vila.report.page import Card

    picture = next((open_image(item) for item in sample.media if isinstance(item, Image)), None)
    return Card(picture, [("", sample.id), *((run.kind, run.text) for run in runs)])
