"""A few measured points with their intervals, joined by lines: a score against how much of something there was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from vila.report.scale import Axis, can_place, linear_ticks, span, write_number, write_ticks
from vila.report.svg import (
    GRID,
    LINE_COLOURS,
    NARROW,
    WIDE,
    Key,
    Sheet,
    element,
    frame,
    svg,
    text_element,
    text_width,
    whisker,
)


@dataclass(frozen=True, slots=True)
class Dots:
    """Named points; intervals: low and high ends around the point at an x. Points that are not finite are left out."""

    name: str
    points: Sequence[tuple[float, float]]
    intervals: Mapping[float, tuple[float, float]] = field(default_factory=dict)


def dot_plot(
    series: Sequence[Dots],
    *,
    title: str,
    x_label: str = "",
    y_label: str = "",
    write: Callable[[float], str] = write_number,
) -> Markup:
    """Points joined in the order of x, with whiskers; the x axis is marked where there are points and nowhere else.

    write: how a value is told to readers who do not see the plot.
    """
    shown = [_finite(each) for each in series]
    keys = [Key(f"line{i % 6}", LINE_COLOURS[i % 6], each.name) for i, each in enumerate(shown)]
    story = "; ".join(f"{each.name}: {_told(each, write)}" for each in shown)
    empty = not any(each.points for each in shown)
    drawn = [
        svg(sheet, 80 if empty else sheet.height, title, story or "no data", _shapes(shown, sheet, x_label, y_label))
        for sheet in (WIDE, NARROW)
    ]  # fmt: skip
    return frame(title, keys if len(keys) > 1 else [], drawn)


def _finite(each: Dots) -> Dots:
    points = sorted(point for point in each.points if all(map(can_place, point)))
    intervals = {x: ends for x, ends in each.intervals.items() if all(map(can_place, ends))}
    return Dots(each.name, points, {x: intervals[x] for x, _ in points if x in intervals})


def _told(each: Dots, write: Callable[[float], str]) -> str:
    words = []
    for x, y in each.points:
        between = each.intervals.get(x)
        sure = f" ({write(between[0])} to {write(between[1])})" if between else ""
        words.append(f"{write(y)} at {write_number(x)}{sure}")
    return ", ".join(words)


def _shapes(series: Sequence[Dots], sheet: Sheet, x_label: str, y_label: str) -> list[Markup]:
    font = sheet.font
    xs = sorted({x for each in series for x, _ in each.points})
    if not xs:
        return [text_element("no data", sheet.width / 2, 40, size=font + 2, anchor="middle")]
    ys = [y for each in series for _, y in each.points]
    low, high = span([*ys, *(end for each in series for pair in each.intervals.values() for end in pair)])
    y_ticks = linear_ticks(low, high)
    labels = write_ticks(y_ticks)
    left = max(text_width(label, font) for label in labels) + 10
    top, bottom = (2 * font if y_label else font), sheet.height - (3.6 if x_label else 2) * font
    x_axis = Axis(xs[0], xs[-1] if len(xs) > 1 else xs[0] + 1, left + 30, sheet.width - 40)
    y_axis = Axis(low, high, bottom, top)
    shapes = [text_element(y_label, 0, font, size=font)] if y_label else []
    for value, label in zip(y_ticks, labels, strict=True):
        y = y_axis.place(value)
        shapes.append(element("line", class_="grid", x1=left, x2=sheet.width, y1=y, y2=y, stroke=GRID))
        shapes.append(text_element(label, left - 8, y + 0.35 * font, size=font, anchor="end"))
    for value in xs:
        place = x_axis.place(value)
        shapes.append(text_element(write_number(value), place, bottom + 1.5 * font, size=font, anchor="middle"))
    if x_label:
        shapes.append(text_element(x_label, sheet.width, sheet.height - 0.4 * font, size=font, anchor="end"))
    for index, each in enumerate(series):
        # Whiskers of two series at one x stand side by side.
        aside = 9 * (index - (len(series) - 1) / 2)
        shapes += _drawn(each, index, aside, x_axis, y_axis)
    return shapes


def _drawn(each: Dots, index: int, aside: float, x_axis: Axis, y_axis: Axis) -> list[Markup]:
    style, colour = f"line{index % 6}", LINE_COLOURS[index % 6]
    placed = [(x_axis.place(x) + aside, y_axis.place(y)) for x, y in each.points]
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    shapes = [element("polyline", class_=f"stroke {style}", points=corners, fill="none", stroke=colour, stroke_width=2)]
    for (x, _), (left, _) in zip(each.points, placed, strict=True):
        if x in each.intervals:
            low, high = each.intervals[x]
            shapes += whisker((left, y_axis.place(low)), (left, y_axis.place(high)))
    shapes += [element("circle", class_=f"dot {style}", cx=x, cy=y, r=4.5, fill=colour) for x, y in placed]
    return shapes
