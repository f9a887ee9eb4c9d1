"""Plots of reports: lines and points drawn by matplotlib as inline SVG, bar charts as HTML and CSS.

Every plot is drawn for screens and for phones, and carries its values as text for screen readers. Colours are CSS
variables of the page, so plots follow its light or dark mode.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeGuard

from markupsafe import Markup

from vila.report.html import printable, render_template
from vila.report.numbers import MISSING, write_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float]

LINE_COLOURS = ("#1d5fbf", "#c2610c", "#11806a", "#8a4bb5", "#b82f55", "#69707a")
NUM_BAR_COLOURS = 6
_INK, _MUTED, _GRID = "#16191d", "#59606a", "#e4e7ea"
# Name, width, height and font size in CSS pixels; the page shows the one that fits.
_SHEETS = (("wide", 760, 300, 12.5), ("narrow", 358, 250, 12.0))
_CSS_NAMES = {
    **{colour: f"line{index}" for index, colour in enumerate(LINE_COLOURS)},
    **{_INK: "ink", _MUTED: "muted", _GRID: "line"},
}
# Larger values overflow the arithmetic of the axes.
_MAX = 1e100


@dataclass(frozen=True, slots=True)
class Series:
    """A named line through `points`; a point that is not finite breaks the line.

    raw: points of the faint line, such as the extremes around means; empty for `points` themselves.
    """

    name: str
    points: Sequence[Point]
    raw: Sequence[Point] = ()


@dataclass(frozen=True, slots=True)
class Dots:
    """Named points; points that are not finite are left out.

    intervals: low and high end of the interval of the point at an x.
    """

    name: str
    points: Sequence[Point]
    intervals: Mapping[float, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Group:
    """One category of a bar plot: values by the name of the bar. None and non-finite values are shown as missing.

    intervals: low and high end of the interval of a bar, by the bar's name.
    """

    name: str
    values: Mapping[str, float | None]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _LegendEntry:
    style: str
    name: str
    remark: str = ""


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
    """Return lines over a common axis.

    smoothing: 0 <= smoothing < 1, the weight of each neighbour in the moving average relative to the next nearer one.
        Above 0 the average is drawn over the faint raw line, which is also drawn if a series has `raw` points.
    faint: whether raw lines are drawn.
    Points that the axis cannot show (not finite, or not positive on a logarithmic axis) are left out and counted in a
    note. Raises ValueError if `smoothing` is out of range.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing is {smoothing!r}; expected 0 <= smoothing < 1")
    runs = [_runs(each.points, log_y) for each in series]
    smooth = [[_smoothed(run, smoothing) for run in each] for each in runs]
    raw = [
        (_runs(each.raw, log_y) if each.raw else runs[index] if smoothing else []) if faint else []
        for index, each in enumerate(series)
    ]
    lost = sum(len(each.points) - sum(map(len, runs[index])) for index, each in enumerate(series))

    def draw(axes: Axes, sheet_width: float) -> None:
        for index, lines in enumerate(smooth):
            style: dict[str, Any] = {"color": LINE_COLOURS[index % len(LINE_COLOURS)], "linestyle": _linestyle(index)}
            for run in raw[index]:
                axes.plot(*zip(*run, strict=True), linewidth=1, alpha=0.3, marker=_marker(run, 3), **style)
            for run in lines:
                axes.plot(*zip(*run, strict=True), linewidth=2, marker=_marker(run, 6), **style)
        if log_y:
            axes.set_yscale("log")
        else:
            _start_at_zero(axes.set_ylim, axes.get_ylim(), [y for each in smooth + raw for run in each for _, y in run])
        _start_at_zero(axes.set_xlim, axes.get_xlim(), [x for each in smooth for run in each for x, _ in run], 0.05)

    ends = [(each[0][0][1], each[-1][-1][1]) if each else None for each in smooth]
    legend = [
        _LegendEntry(
            f"line{index % len(LINE_COLOURS)}" + " dashed" * (index >= len(LINE_COLOURS)),
            each.name,
            f"ends at {write_number(float(f'{end[1]:.3g}'))}" if (end := ends[index]) else "no data",
        )
        for index, each in enumerate(series)
    ]
    text = "; ".join(
        f"{each.name}: "
        + (f"from {write_number(end[0])} to {write_number(end[1])}" if (end := ends[index]) else "no data")
        for index, each in enumerate(series)
    )
    note = f"{lost} point{'s' * (lost != 1)} without a {'positive ' * log_y}finite value left out." if lost else ""
    has_legend = len(series) > 1 or smoothing > 0 or any(raw)
    return _plot(title, y_label, text, draw if any(ends) else None, legend if has_legend else [], x_label, note)


def dot_plot(series: Sequence[Dots], *, title: str, x_label: str = "") -> Markup:
    """Return points with intervals, joined in the order of x; the x axis has ticks at the points only."""
    shown = [_finite(each) for each in series]
    ticks = sorted({x for each in shown for x, _ in each.points})

    def draw(axes: Axes, sheet_width: float) -> None:
        low, high = (ticks[0], ticks[-1]) if len(ticks) > 1 else (ticks[0] - 1, ticks[0] + 1)
        # Intervals of two series at one x are drawn side by side.
        step = 9 * (high - low) / (sheet_width - 120)
        for index, each in enumerate(shown):
            if not each.points:
                continue
            shift = step * (index - (len(shown) - 1) / 2)
            colour = LINE_COLOURS[index % len(LINE_COLOURS)]
            axes.plot(
                [x + shift for x, _ in each.points], [y for _, y in each.points], "o-", color=colour, markersize=7
            )
            for x, (bottom, top) in each.intervals.items():
                axes.errorbar(
                    x + shift,
                    (bottom + top) / 2,
                    yerr=(top - bottom) / 2,
                    color=_INK,
                    elinewidth=1.5,
                    capsize=3.5,
                    zorder=3,
                )
        axes.set_xticks(ticks, [write_number(x) for x in ticks])

    text = "; ".join(f"{each.name}: {_points_as_text(each)}" for each in shown)
    legend = [_LegendEntry(f"line{index % len(LINE_COLOURS)}", each.name) for index, each in enumerate(shown)]
    return _plot(title, "", text, draw if ticks else None, legend if len(legend) > 1 else [], x_label)


def bar_plot(
    groups: Sequence[Group],
    *,
    title: str,
    write: Callable[[float], str] = write_number,
    full: float | None = None,
) -> Markup:
    """Return horizontal bars, several per category, each with its value; the first bar name has the accent colour.

    write: formats a value.
    full:  the value of a full bar (1 for fractions); None for the largest value.
    """
    names = list(dict.fromkeys(name for group in groups for name in group.values))
    ends = [v for group in groups for v in group.values.values() if _is_drawable(v)]
    ends += [end for group in groups for name in group.values for end in _interval(group, name) or ()]
    low, high = min([0.0, *ends]), max([0.0, *ends] if full is None else [full, *ends])
    scale = 100 / (high - low or 1)
    rows = []
    for group in groups:
        bars = []
        for name in (name for name in names if name in group.values):
            value, interval = group.values[name], _interval(group, name)
            drawable = _is_drawable(value)
            label = write(value) if value is not None and drawable else MISSING
            bars.append(
                {
                    "style": f"bar{names.index(name) % NUM_BAR_COLOURS}",
                    "name": name,
                    "value": label,
                    "interval": f"{write(interval[0])} to {write(interval[1])}" if interval else "",
                    "bar": _extent(0.0, value, low, scale) if value is not None and drawable else None,
                    "whisker": _extent(*interval, low, scale) if interval else None,
                }
            )
        rows.append({"name": group.name, "bars": bars})
    legend = [_LegendEntry(f"bar{index % NUM_BAR_COLOURS}", name) for index, name in enumerate(names)]
    return render_template(
        "plot.html.j2",
        title=title,
        legend=legend if len(legend) > 1 else [],
        groups=rows,
        track=full is not None,
        drawings=[],
        note="",
    )


def _plot(
    title: str,
    y_label: str,
    text: str,
    draw: Callable[[Axes, float], None] | None,
    legend: Sequence[_LegendEntry],
    x_label: str,
    note: str = "",
) -> Markup:
    """Return both renderings of a plot between its title, legend and note; "no data" if `draw` is None."""
    drawings = (
        [_svg(*sheet, title or y_label or "plot", text, draw, x_label, y_label) for sheet in _SHEETS] if draw else []
    )
    return render_template("plot.html.j2", title=title, legend=legend, groups=[], drawings=drawings, note=note)


def _svg(
    name: str,
    width: float,
    height: float,
    font: float,
    label: str,
    text: str,
    draw: Callable[[Axes, float], None],
    x_label: str,
    y_label: str,
) -> Markup:
    with _matplotlib(font):
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

        # One unit of the SVG backend is 1/72 inch.
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)  # type: ignore[union-attr, call-arg]
        axes = figure.add_subplot()
        formatter = FuncFormatter(lambda value, _: write_number(round(value, 12)))
        axes.xaxis.set_major_locator(MaxNLocator(round(width / 100)))
        axes.xaxis.set_major_formatter(formatter)
        draw(axes, width)
        if axes.get_yscale() == "log":
            low, high = axes.get_ylim()
            subs = (1, 2, 5) if high < 500 * low else (1,)
            axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(formatter)
        axes.set_xlabel(printable(x_label), loc="right")
        axes.set_title(printable(y_label), loc="left", fontsize=font, color=_MUTED)
        axes.grid(axis="y")
        axes.tick_params(length=0)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", stream.getvalue(), flags=re.DOTALL)
    _, _, body = body.partition("<svg")
    box = re.search(r'viewBox="([^"]+)"', body)
    inside = body[body.index(">") + 1 : body.rindex("</svg>")]
    # Colours become variables of the page, fonts those of the page.
    inside = re.sub(r"#[0-9a-f]{6}", lambda found: _as_variable(found[0]), inside)
    inside = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans, sans-serif)", inside).replace("xlink:href", "href")
    head = Markup('<svg xmlns="http://www.w3.org/2000/svg" class="{}" viewBox="{}" role="img" aria-label="{}">').format(
        name, box[1] if box else "", printable(label)
    )
    words = Markup("<title>{}</title><desc>{}</desc>").format(printable(label), printable(text))
    return head + words + Markup(inside) + Markup("</svg>")


def _as_variable(colour: str) -> str:
    return f"var(--{_CSS_NAMES[colour]}, {colour})" if colour in _CSS_NAMES else colour


@contextmanager
def _matplotlib(font: float) -> Iterator[None]:
    """Configure matplotlib for small SVGs with text as text elements; its font warnings are suppressed."""
    import matplotlib

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "vila",
        "font.family": "DejaVu Sans",
        "font.size": font,
        "text.parse_math": False,
        "text.color": _INK,
        "axes.labelcolor": _MUTED,
        "axes.labelsize": font,
        "axes.edgecolor": _GRID,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.axisbelow": True,
        "axes.xmargin": 0.01,
        "grid.color": _GRID,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
        "xtick.labelsize": font,
        "ytick.labelsize": font,
        "lines.solid_joinstyle": "round",
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        yield


def _is_drawable(value: float | None, log: bool = False) -> TypeGuard[float]:
    return value is not None and abs(value) < _MAX and (value > 1 / _MAX or not log)


def _runs(points: Sequence[Point], log_y: bool) -> list[list[Point]]:
    """Return the unbroken parts of a line."""
    runs: list[list[Point]] = [[]]
    for x, y in points:
        if _is_drawable(x) and _is_drawable(y, log_y):
            runs[-1].append((x, y))
        else:
            runs.append([])
    return [run for run in runs if run]


def _smoothed(run: Sequence[Point], weight: float) -> list[Point]:
    """Average each value with its neighbours on both sides, which unlike a running mean does not lag."""
    if not weight:
        return list(run)

    def decayed(values: list[float]) -> list[float]:
        return list(accumulate(values, lambda total, value: weight * total + value))

    values, ones = [y for _, y in run], [1.0] * len(run)
    sums = zip(decayed(values), decayed(values[::-1])[::-1], values, strict=True)
    weights = zip(decayed(ones), decayed(ones)[::-1], strict=True)
    means = ((past + future - own) / (a + b - 1) for (past, future, own), (a, b) in zip(sums, weights, strict=True))
    return [(x, mean) for (x, _), mean in zip(run, means, strict=True)]


def _start_at_zero(
    set_limits: Callable[..., Any], limits: tuple[float, float], values: Sequence[float], nearness: float = 0.35
) -> None:
    """Let an axis start at zero if its lowest value is near zero."""
    if values and 0 <= min(values) <= nearness * max(values):
        set_limits(0, limits[1])


def _marker(run: Sequence[Point], size: float) -> str:
    return "o" if len(run) == 1 else ""


def _linestyle(index: int) -> str:
    return "-" if index < len(LINE_COLOURS) else "--"


def _finite(each: Dots) -> Dots:
    points = sorted(point for point in each.points if all(map(_is_drawable, point)))
    intervals = {x: ends for x, ends in each.intervals.items() if all(map(_is_drawable, ends))}
    return Dots(each.name, points, {x: intervals[x] for x, _ in points if x in intervals})


def _points_as_text(each: Dots) -> str:
    words = []
    for x, y in each.points:
        ends = each.intervals.get(x)
        interval = f" ({write_number(ends[0])} to {write_number(ends[1])})" if ends else ""
        words.append(f"{write_number(y)} at {write_number(x)}{interval}")
    return ", ".join(words) or "no data"


def _interval(group: Group, name: str) -> tuple[float, float] | None:
    ends = group.intervals.get(name)
    return ends if ends and _is_drawable(group.values[name]) and all(map(_is_drawable, ends)) else None


def _extent(start: float, end: float, low: float, scale: float) -> tuple[float, float]:
    """Return left end and width in percent of the bar area."""
    left, right = sorted((start, end))
    return round((left - low) * scale, 3), round((right - left) * scale, 3)
