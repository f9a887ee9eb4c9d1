"""Plots: valid markup from any data, values at the right positions, text escaped."""

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pages import numbers
from vila.report.numbers import write_percent
from vila.report.plots import Dots, Group, Series, bar_plot, dot_plot, line_plot

EVIL = "<script>alert('x')</script> & \"quoted\" $x_1$ \x00 \ud800"
SVG = "{http://www.w3.org/2000/svg}"
NAN, INF = math.nan, math.inf


def svgs(plot):
    return ET.fromstring(plot).findall(f"{SVG}svg")


def labels(plot, index=0):
    return [element.text for element in svgs(plot)[index].iter(f"{SVG}text")]


def notes(plot):
    return re.findall(r'<p class="note">(.*?)</p>', plot)


def paths(plot, colour="line0"):
    """Corners of every line of a colour in the wide rendering."""
    found = [p for p in svgs(plot)[0].iter(f"{SVG}path") if f"stroke: var(--{colour}," in p.get("style", "")]
    return [
        [tuple(map(float, pair)) for pair in re.findall(r"[ML] (\S+) (\S+)", path.get("d"))]
        for path in found
        if "fill: none" in path.get("style")
    ]


def bars(plot, name="bar"):
    found = re.findall(rf'class="{name}[^"]*" style="left: (\S+)%; width: (\S+)%"', plot)
    return [(float(left), float(width)) for left, width in found]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.floats(), st.floats()), max_size=8), st.booleans(), st.sampled_from([0.0, 0.9]))
def test_line_plot_is_valid_xml_with_finite_coordinates_for_any_points(points, log, smoothing) -> None:
    plot = line_plot([Series("a", points)], title="t", y_label="y", log_y=log, smoothing=smoothing)
    assert len(svgs(plot)) in (0, 2)
    drawn = re.findall(r' (?:d|x|y)="([^"]*)"', plot)
    assert not any("nan" in value or "inf" in value for value in drawn)


@pytest.mark.parametrize("series", [[], [Series("a", [])], [Series("a", [(0, NAN), (1, INF)])]])
def test_a_plot_without_data_has_no_drawing(series) -> None:
    plot = line_plot(series, title="t")
    assert svgs(plot) == []
    assert notes(plot)


def test_points_that_are_not_finite_break_the_line_and_are_counted() -> None:
    plot = line_plot([Series("a", [(0, 1.0), (1, 2.0), (2, NAN), (3, 3.0), (4, 2.0)])], title="t")
    assert [len(line) for line in paths(plot)] == [2, 2]
    assert [numbers(note) for note in notes(plot)] == [[1]]
    plot = line_plot([Series("a", [(0, 1.0), (1, 0.0), (2, -1.0)])], title="t", log_y=True)
    assert [numbers(note) for note in notes(plot)] == [[2]]


def test_smoothing_draws_the_average_over_the_raw_line_without_lag() -> None:
    noisy = [(float(i), 1.0 + (i % 2)) for i in range(60)]
    raw, main = paths(line_plot([Series("a", noisy)], title="t", smoothing=0.9))
    heights = [[y for _, y in line] for line in (raw, main)]
    assert max(heights[1]) - min(heights[1]) < 0.2 * (max(heights[0]) - min(heights[0]))
    slope = [(float(i), float(i)) for i in range(101)]
    raw, main = paths(line_plot([Series("a", slope)], title="t", smoothing=0.9))
    # matplotlib drops the points inside a straight line, so compare where the averaged line passes the middle.
    middle = (raw[0][0] + raw[-1][0]) / 2
    near = min(main, key=lambda point: abs(point[0] - middle))
    on_raw = raw[0][1] + (near[0] - raw[0][0]) * (raw[-1][1] - raw[0][1]) / (raw[-1][0] - raw[0][0])
    assert near[1] == pytest.approx(on_raw, abs=1.0)
    with pytest.raises(ValueError):
        line_plot([], title="t", smoothing=1)


def test_long_series_are_simplified_but_keep_their_spikes() -> None:
    points = [(float(i), 1.0) for i in range(50_000)]
    points[31_415] = (31_415.0, 9.0)
    plot = line_plot([Series("a", points)], title="t")
    assert len(plot) < 60_000
    (line,) = paths(plot)
    top = min(y for _, y in line)
    assert max(y for _, y in line) - top > 150


def test_text_of_plots_is_escaped_and_not_read_as_math() -> None:
    line = line_plot([Series(EVIL, [(0, 1), (1, 2)])], title=EVIL, x_label=EVIL, y_label=EVIL, smoothing=0.5)
    dots = dot_plot([Dots(EVIL, [(0, 1), (1, 2)])], title=EVIL, x_label=EVIL)
    for plot, num_labels in ((line, 2), (dots, 1)):
        assert "<script" not in plot
        assert len(svgs(plot)) == 2
        assert sum("$x_1$" in label for label in labels(plot)) == num_labels
        plot.encode("utf-8", "surrogatepass")
    assert "<script" not in bar_plot([Group(EVIL, {EVIL: 1.0, "b": 2.0})], title=EVIL, write=lambda _: EVIL)


def test_plots_are_named_for_screen_readers() -> None:
    plot = line_plot([Series("loss", [(0, 4.0), (1, 2.0)])], title="Loss")
    for svg in svgs(plot):
        assert svg.get("role") == "img" and svg.get("aria-label") == "Loss"
        assert svg.find(f"{SVG}title").text == "Loss"
        assert svg.find(f"{SVG}desc").text == "loss: from 4 to 2"


def test_both_renderings_have_legible_text_and_page_colours() -> None:
    wide, narrow = svgs(line_plot([Series("a", [(0, 1), (1, 2)])], title="t", x_label="tokens", y_label="loss"))
    assert (wide.get("class"), narrow.get("class")) == ("wide", "narrow")
    assert float(narrow.get("viewBox").split()[2]) <= 358  # width of a 390 px screen without its margins
    for svg in (wide, narrow):
        texts = [element.get("style") for element in svg.iter(f"{SVG}text")]
        assert texts
        assert all(float(re.search(r"font(?:-size)?: (?:\w+ )?([\d.]+)px", text)[1]) >= 12 for text in texts)
        assert all("fill: var(--" in text for text in texts)


def test_points_are_at_their_values_and_ticks_at_the_points() -> None:
    plot = dot_plot([Dots("a", [(0, 10.0), (4, 30.0), (2, 20.0)])], title="t")
    ((x0, y0), (x2, y2), (x4, y4)) = paths(plot)[0]
    assert (x0 + x4) / 2 == pytest.approx(x2, abs=0.02) and (y0 + y4) / 2 == pytest.approx(y2, abs=0.02)
    assert x0 < x4 and y0 > y4
    assert [label for label in labels(plot) if label in "0124"] == ["0", "2", "4"]


def test_intervals_of_two_series_are_side_by_side() -> None:
    plot = dot_plot([Dots(name, [(1, 50.0)], {1: (40.0, 60.0)}) for name in "ab"], title="t")
    upright = [line for line in paths(plot, "ink") if len(line) == 2 and line[0][0] == line[1][0]]
    assert len(upright) == 2 and upright[0][0][0] != upright[1][0][0]
    assert numbers(re.search(r"<desc>(.*?)</desc>", plot)[1]) == [50, 1, 40, 60] * 2


def test_points_and_intervals_that_are_not_finite_are_left_out() -> None:
    plot = dot_plot([Dots("a", [(0, NAN), (1, 2.0)], {1: (1.0, INF)})], title="t")
    assert svgs(plot)[0].find(f"{SVG}desc").text == "a: 2 at 1"
    assert paths(plot, "ink") == []
    assert svgs(dot_plot([], title="t")) == []


def test_bars_keep_their_proportions_and_show_what_is_missing() -> None:
    plot = bar_plot(
        [Group("what", {"model": 0.8, "blind": 0.4, "other": None}), Group("is", {"model": 0.0, "blind": NAN})],
        title="t",
        write=write_percent,
        full=1.0,
    )
    assert bars(plot) == [(0, 80), (0, 40), (0, 0)]
    values = [re.sub("<[^>]*>", "", value) for value in re.findall(r'<p class="bar-value">(.*?)</p>', plot)]
    assert values == [
        "model: 80.0\xa0%",
        "blind: 40.0\xa0%",
        "other: \N{EN DASH}",
        "model: 0.0\xa0%",
        "blind: \N{EN DASH}",
    ]


def test_negative_bars_extend_to_the_left_of_zero() -> None:
    (left, width), (start, _) = bars(bar_plot([Group("a", {"x": -1.0}), Group("b", {"x": 1.0})], title="t"))
    assert left + width == pytest.approx(start, abs=0.01)


def test_an_interval_of_a_bar_reaches_both_ends() -> None:
    plot = bar_plot([Group("g", {"score": 50.0}, {"score": (40.0, 60.0)})], title="t", full=100.0)
    assert bars(plot, "whisker") == [(40, 20)]
    (value,) = re.findall(r'<p class="bar-value">(.*?)</p>', plot)
    assert numbers(value) == [50, 40, 60]
    assert bars(bar_plot([Group("g", {"d": -2.0}, {"d": (-5.0, 1.0)})], title="t"), "whisker") == [(0, 100)]
    assert bars(bar_plot([Group("g", {"a": 1.0, "b": None}, {"b": (0.0, 1.0)})], title="t"), "whisker") == []
