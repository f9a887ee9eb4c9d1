"""Horizontal bars, several per category: scores beside what they are to be compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from vila.report.scale import MISSING, Axis, can_place, write_number
from vila.report.svg import (
    BAR_COLOURS,
    NARROW,
    TRACK,
    WIDE,
    Key,
    Sheet,
    element,
    frame,
    svg,
    text_element,
    text_width,
    whisker,
    wrap,
)


@dataclass(frozen=True, slots=True)
class Group:
    """The bars of one category, by name; None and values that are not finite are shown as missing.

    intervals: low and high ends of a thin line over a bar, by the bar's name.
    """

    name: str
    values: Mapping[str, float | None]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def bar_plot(
    groups: Sequence[Group],
    *,
    title: str,
    write: Callable[[float], str] = write_number,
    full: float | None = None,
) -> Markup:
    """Horizontal bars, several per category, each with its value; the first name of all has the accent.

    write: how a value is labelled.
    full:  the value of a full bar (1 for fractions), drawn as a track; without it the largest value is.
    """
    names = list(dict.fromkeys(name for group in groups for name in group.values))
    keys = [Key(f"bar{i % len(BAR_COLOURS)}", BAR_COLOURS[i % len(BAR_COLOURS)], n) for i, n in enumerate(names)]
    drawn = [_bars(groups, keys, sheet, title, write, full) for sheet in (WIDE, NARROW)]
    return frame(title, keys if len(keys) > 1 else [], drawn)


def _bars(
    groups: Sequence[Group],
    keys: Sequence[Key],
    sheet: Sheet,
    title: str,
    write: Callable[[float], str],
    full: float | None,
) -> Markup:
    font, thick, pitch = sheet.font, 14, 19
    values = [v for group in groups for v in group.values.values() if can_place(v)]
    ends = [*values, *(end for group in groups for pair in group.intervals.values() for end in pair if can_place(end))]
    low, high = min([0.0, *ends]), max([0.0, *ends] if full is None else [full, *ends])
    # Names stand beside the bars where there is room, above them where there is not.
    aside = min(215.0, max((text_width(g.name, font + 1) for g in groups), default=0.0)) + 16 if sheet is WIDE else 0.0
    room = max((text_width(write(v), font) for v in values), default=0.0) + 10
    minus = room if low < 0 else 0.0
    axis = Axis(low, high if high > low else low + 1, aside + minus, sheet.width - room)

    shapes: list[Markup] = []
    story: list[str] = []
    y = 2.0
    for group in groups:
        words = wrap(group.name, (aside - 12) if aside else sheet.width, font + 1)
        for number, line in enumerate(words):
            shapes.append(text_element(line, 0, y + 11.5 + 16 * number, size=font + 1, strong=True))
        head = y
        y += 0 if aside else 16 * len(words) + 4
        for key in keys:
            if key.name in group.values:
                value = group.values[key.name]
                shown = write(value) if can_place(value) else MISSING
                sure = _interval(group, key.name)
                between = f" ({write(sure[0])} to {write(sure[1])})" if sure else ""
                story.append(f"{group.name}, {key.name}: {shown}{between}")
                shapes += _bar(key, value, shown, axis, y, thick, font, full is not None, sure)
                y += pitch
        y = max(y, head + 16 * len(words)) + (14 if sheet is WIDE else 12)
    if not groups:
        shapes, y = [text_element("no data", sheet.width / 2, 40, size=font + 2, anchor="middle")], 80.0
    return svg(sheet, y - 8, title or "bars", "; ".join(story) or "no data", shapes)


def _interval(group: Group, name: str) -> tuple[float, float] | None:
    ends = group.intervals.get(name)
    return ends if ends and can_place(group.values[name]) and all(map(can_place, ends)) else None


def _bar(
    key: Key,
    value: float | None,
    shown: str,
    axis: Axis,
    y: float,
    thick: float,
    font: float,
    track: bool,
    sure: tuple[float, float] | None,
) -> list[Markup]:
    shapes: list[Markup] = []
    zero = tip = axis.place(0)
    if track:
        wide = axis.end - axis.start
        shapes.append(element("rect", class_="track", x=axis.start, y=y, width=wide, height=thick, rx=2, fill=TRACK))
    if can_place(value):
        tip = axis.place(value)
        # A zero is still a bar: a sliver says "measured, and nothing", a bare dash says "not measured".
        size = {"x": min(zero, tip), "y": y, "width": max(abs(tip - zero), 1.5), "height": thick, "rx": 2.0}
        shapes.append(element("rect", class_=f"bar {key.style}", fill=key.colour, **size))
    left = tip < zero
    if sure and (ends := sorted(map(axis.place, sure)))[1] - ends[0] >= 1:
        first, last = ends
        shapes += whisker((first, y + thick / 2), (last, y + thick / 2))
        tip = min(tip, first) if left else max(tip, last)
    base, strong = y + thick / 2 + 0.36 * font, key.style == "bar0"
    anchor = "end" if left else "start"
    shapes.append(text_element(shown, tip - 6 if left else tip + 6, base, size=font, strong=strong, anchor=anchor))
    return shapes
