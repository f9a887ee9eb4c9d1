"""`vila data inspect`: one sample as the model sees it, what is learnt told from what is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.text import Text

if TYPE_CHECKING:
    from PIL import Image as PilImage

    from vila.chat.tokenize import TokenizedSample
    from vila.core.types import Image
    from vila.engine.detokenize import Decode
    from vila.report.html import Card

_STYLES = {"learnt": "bold green", "given": "dim", "image": "magenta"}
_HALF_CHARACTER = "\ufffd"


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens of one kind (`learnt`, `given`, or `image` for one picture) in one segment, written out."""

    segment: int
    kind: str
    text: str
    tokens: int


def runs_of(sample: TokenizedSample, tokenizer: Any, slots_per_image: int) -> list[Run]:
    """The runs of a sample in order, a picture of its own each.

    tokenizer: a transformers tokenizer.
    slots_per_image: placeholder tokens that a picture takes.
    Text is decoded with what stands before it, so that characters of several tokens are whole and spaces stay. One that
    is cut where a run ends is shown in the next run; where branches begin inside a character, in each of them.
    """
    from vila.engine.detokenize import decoder_of

    decode = decoder_of(tokenizer, skip_special_tokens=False)
    placeholders = sample.is_placeholder.cumsum().tolist()
    keys = [
        (segment, kind, (placeholders[place] - 1) // slots_per_image if kind == "image" else -1)
        for place, (segment, kind) in enumerate(zip(sample.segment_ids.tolist(), _kinds(sample), strict=True))
    ]
    parent_of = {number: segment.parent for number, segment in enumerate(sample.segments)}
    groups = [(key, list(places)) for key, places in groupby(range(len(keys)), key=keys.__getitem__)]
    streams: dict[int, _Stream] = {}
    runs = []
    for number, ((segment, kind, _), places) in enumerate(groups):
        if segment not in streams:
            streams[segment] = _Stream.after(streams.get(parent_of[segment]))
        if kind == "image":
            streams[segment] = _Stream()
            runs.append(Run(segment, kind, f"<image x {len(places)}>", len(places)))
            continue
        later = [key for key, _ in groups[number + 1 :]]
        goes_on = any(key[0] == segment or parent_of[key[0]] == segment for key in later[:1])
        whole = not goes_on or later[0][1] == "image"
        text = streams[segment].add([int(sample.ids[place]) for place in places], decode, whole)
        runs.append(Run(segment, kind, text, len(places)))
    return runs


def _kinds(sample: TokenizedSample) -> list[str]:
    return [
        "image" if is_placeholder else "learnt" if is_supervised else "given"
        for is_placeholder, is_supervised in zip(
            sample.is_placeholder.tolist(), sample.is_supervised.tolist(), strict=True
        )
    ]


class _Stream:
    """Text since the last picture: the ids so far, and how many characters of them were shown."""

    def __init__(self, ids: Sequence[int] = (), shown: int = 0) -> None:
        self.ids, self.shown = list(ids), shown

    @staticmethod
    def after(parent: _Stream | None) -> _Stream:
        """A stream that goes on where `parent` stands, which stays as it is."""
        return _Stream(parent.ids, parent.shown) if parent else _Stream()

    def add(self, ids: Sequence[int], decode: Decode, whole: bool) -> str:
        """What these ids add; half a character at the end waits for more unless `whole`."""
        self.ids += ids
        text = decode(self.ids)
        if not whole:
            text = text.rstrip(_HALF_CHARACTER)
        new = text[self.shown :]
        self.shown = max(self.shown, len(text))
        return new


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
    """A card of a gallery: the pictures in the order in which the model meets them, and the runs below them."""
    from vila.core.types import Image
    from vila.report.html import Card

    pictures = [_thumbnail(item) for item in sample.media if isinstance(item, Image)]
    lines = [("", sample.id), *((run.kind, run.text) for run in runs)]
    return Card(pictures[0] if pictures else None, lines, more=pictures[1:])


def _thumbnail(image: Image) -> PilImage.Image:
    from vila.media.image import open_image
    from vila.report.html import MAX_SIDE

    picture = open_image(image)
    # Many cards wait for their page, and full pictures would fill the memory.
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    return picture
