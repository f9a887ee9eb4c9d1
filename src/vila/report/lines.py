"""Lines over a common axis: losses, rates, scores over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from markupsafe import Markup

from vila.report.scale import Axis, can_place, linear_ticks, log_ticks, span, write_number, write_ticks
from vila.report.svg import GRID, LINE_COLOURS, NARROW, WIDE, Key, Sheet, element, frame, svg, text_element, text_width

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Series:
    """A named line through `points`; one that is not finite breaks the line.

    raw: what the faint line goes through where it is not `points`, such as the extremes around means.
    """

    name: str
    points: Sequence[Point]
    raw: Sequence[Point] = ()


def line_plot(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str = "",
    y_label: str = "",
    log_y: bool = False,
    smoothing: float = 0.0,
    faint: bool = True,
) -> Markup:
    """Lines over a common axis, drawn once for screens and once for phones.

    smoothing: 0..1, the weight that a moving average gives each neighbour relative to the next nearer one; above 0
        the average is drawn over the faint raw line, which is also drawn where a series brings its own.
    faint: whether raw lines are drawn at all; many of them hide the averages.
    Points that no axis can show (not finite, not positive on a logarithmic one) are left out, and a note counts them.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing is {smoothing!r}; expected 0 <= smoothing < 1")
    lines = [_line(s, log_y, smoothing, faint) for s in series]
    lost = sum(line.lost for line in lines)
    keys = [Key(_style(i), LINE_COLOURS[i % len(LINE_COLOURS)], line.name, line.remark) for i, line in enumerate(lines)]
    story = "; ".join(f"{line.name}: {line.story}" for line in lines) or "no data"
    label = title or y_label or "plot"
    empty = not any(line.smooth for line in lines)
    drawn = [
        svg(sheet, 80 if empty else sheet.height, label, story, _line_shapes(lines, sheet, x_label, y_label, log_y))
        for sheet in (WIDE, NARROW)
    ]
    note = f"{lost} point{'s' * (lost != 1)} without a {'positive ' * log_y}finite value left out." if lost else ""
    return frame(title, keys if len(keys) > 1 or smoothing or any(line.raw for line in lines) else [], drawn, note)


@dataclass(frozen=True, slots=True)
class _Line:
    """A series ready to draw: unbroken runs of points, raw and smoothed."""

    name: str
    raw: list[list[Point]]
    smooth: list[list[Point]]
    lost: int

    @property
    def remark(self) -> str:
        return f"ends at {write_number(float(f'{self.smooth[-1][-1][1]:.3g}'))}" if self.smooth else "no data"

    @property
    def story(self) -> str:
        if not self.smooth:
            return "no data"
        return f"from {write_number(self.smooth[0][0][1])} to {write_number(self.smooth[-1][-1][1])}"


def _line(series: Series, log_y: bool, smoothing: float, faint: bool) -> _Line:
    runs, lost = _runs(series.points, log_y)
    raw = _runs(series.raw, log_y)[0] if series.raw else runs if smoothing else []
    return _Line(series.name, raw if faint else [], [_smooth(run, smoothing) for run in runs], lost)


def _runs(points: Sequence[Point], log_y: bool) -> tuple[list[list[Point]], int]:
    """The unbroken parts of a line, and how many points no axis can show."""
    runs: list[list[Point]] = [[]]
    lost = 0
    for x, y in points:
        if can_place(x) and can_place(y, log_y):
            runs[-1].append((x, y))
        else:
            lost += 1
            runs.append([])
    return [run for run in runs if run], lost


def _smooth(run: Sequence[Point], weight: float) -> list[Point]:
    """Each value averaged with its neighbours on both sides, which unlike a running mean does not lag behind."""
    values = [y for _, y in run]
    sums = zip(_decay(values, weight), _decay(values[::-1], weight)[::-1], values, strict=True)
    ones = [1.0] * len(run)
    shares = zip(_decay(ones, weight), _decay(ones, weight)[::-1], strict=True)
    means = ((past + future - own) / (a + b - 1) for (past, future, own), (a, b) in zip(sums, shares, strict=True))
    return [(x, mean) for (x, _), mean in zip(run, means, strict=True)]


def _decay(values: Sequence[float], weight: float) -> list[float]:
    return list(accumulate(values, lambda total, value: weight * total + value))


def _line_shapes(lines: Sequence[_Line], sheet: Sheet, x_label: str, y_label: str, log_y: bool) -> list[Markup]:
    font = sheet.font
    points = [p for line in lines for run in (*line.raw, *line.smooth) for p in run]
    if not points:
        return [text_element("no data", sheet.width / 2, 40, size=font + 2, anchor="middle")]
    y_low, y_high = span((y for _, y in points), log_y)
    y_ticks = log_ticks(y_low, y_high) if log_y else linear_ticks(y_low, y_high)
    y_labels = write_ticks(y_ticks, log_y)
    left = max(text_width(label, font) for label in y_labels) + 10
    top, bottom = (2 * font if y_label else font), sheet.height - (3.6 if x_label else 2) * font
    xs = [x for x, _ in points]
    x_low, x_high = (min(xs), max(xs)) if min(xs) < max(xs) else span(xs)
    if 0 <= x_low < 0.05 * x_high:
        x_low = 0.0
    x_axis, y_axis = Axis(x_low, x_high, left, sheet.width - 12), Axis(y_low, y_high, bottom, top, log_y)

    shapes = [text_element(y_label, 0, font, size=font)] if y_label else []
    for value, label in zip(y_ticks, y_labels, strict=True):
        y = y_axis.place(value)
        shapes.append(element("line", class_="grid", x1=left, x2=sheet.width, y1=y, y2=y, stroke=GRID))
        shapes.append(text_element(label, left - 8, y + 0.35 * font, size=font, anchor="end"))
    x_ticks = linear_ticks(x_low, x_high, round(sheet.width / 100))
    for value, label in zip(x_ticks, write_ticks(x_ticks), strict=True):
        shapes.append(text_element(label, x_axis.place(value), bottom + 1.5 * font, size=font, anchor="middle"))
    if x_label:
        shapes.append(text_element(x_label, sheet.width, sheet.height - 0.4 * font, size=font, anchor="end"))
    for index, line in enumerate(lines):
        shapes += [_stroke(run, x_axis, y_axis, index, "raw") for run in line.raw]
        shapes += [_stroke(run, x_axis, y_axis, index, "main") for run in line.smooth]
    return shapes


def _style(index: int) -> str:
    # Past the last colour they begin again, dashed.
    return f"line{index % len(LINE_COLOURS)}" + " dashed" * (index >= len(LINE_COLOURS))


def _stroke(run: Sequence[Point], x_axis: Axis, y_axis: Axis, index: int, weight: str) -> Markup:
    placed = _thin([(x_axis.place(x), y_axis.place(y)) for x, y in run], round(abs(x_axis.end - x_axis.start)))
    colour = LINE_COLOURS[index % len(LINE_COLOURS)]
    if len(placed) == 1:
        (x, y), *_ = placed
        return element("circle", class_=f"dot {_style(index)} {weight}", cx=x, cy=y, r=3, fill=colour)
    return element(
        "polyline",
        class_=f"stroke {_style(index)} {weight}",
        points=" ".join(f"{x:.1f},{y:.1f}" for x, y in placed),
        fill="none",
        stroke=colour,
        stroke_width=2 if weight == "main" else 1,
        stroke_opacity=1 if weight == "main" else 0.3,
        stroke_linejoin="round",
        stroke_linecap="round",
    )


def _thin(points: list[Point], columns: int) -> list[Point]:
    """At most four points for each of `columns`: its first, last, lowest and highest, so no spike is lost."""
    if len(points) <= 4 * columns:
        return points
    size = math.ceil(len(points) / columns)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        part = range(start, min(start + size, len(points)))
        extremes = {part[0], part[-1], min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1])}
        kept += [points[i] for i in sorted(extremes)]
    return kept
