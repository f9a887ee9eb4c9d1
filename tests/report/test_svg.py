"""Plots: valid markup from any data, ticks that a reader expects, nothing of a user's text taken as markup."""

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vila.report.bars import Group, bar_plot
from vila.report.lines import Series, line_plot
from vila.report.scale import (
    Axis,
    linear_ticks,
    log_ticks,
    span,
    write_number,
    write_percent,
    write_seconds,
    write_ticks,
)
from vila.report.svg import text_width, wrap

EVIL = "<script>alert('x')</script> & \"quoted\" \x00 \ud800"
SVG = "{http://www.w3.org/2000/svg}"
NAN, INF = math.nan, math.inf


def svgs(plot):
    return ET.fromstring(plot).findall(f"{SVG}svg")


def texts(plot, index=0):
    return [element.text for element in svgs(plot)[index].iter(f"{SVG}text")]


@pytest.mark.parametrize(
    ("low", "high", "about", "labels"),
    [
        (0, 1, 5, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0, 158_500, 4, ["0", "50k", "100k", "150k"]),
        (0, 3_000, 4, ["0", "1000", "2000", "3000"]),
        (-0.3, 0.3, 4, ["-0.2", "0", "0.2"]),
        (1e-9, 5e-9, 5, ["1e-9", "2e-9", "3e-9", "4e-9", "5e-9"]),
    ],
)
def test_linear_ticks_are_round_and_written_alike(low, high, about, labels):
    written = write_ticks(linear_ticks(low, high, about))
    assert [label.replace("\N{MINUS SIGN}", "-") for label in written] == labels


def test_log_ticks_step_by_one_two_five_and_thin_out_over_many_decades():
    assert log_ticks(0.09, 8) == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5])
    assert log_ticks(1e-6, 1e6) == pytest.approx([10.0**n for n in range(-6, 7, 3)])
    assert len(log_ticks(2.1, 4.6)) >= 3


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(), max_size=6), st.booleans())
def test_every_data_gives_a_span_with_ticks_inside_it(values, log):
    low, high = span(values, log)
    assert math.isfinite(low) and math.isfinite(high) and low < high
    ticks = log_ticks(low, high) if log else linear_ticks(low, high)
    assert 1 <= len(ticks) <= 16
    axis = Axis(low, high, 0, 100, log)
    assert all(-1 <= axis.place(tick) <= 101 for tick in ticks if tick > 0 or not log)
    assert len(write_ticks(ticks, log)) == len(ticks)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(), st.floats()), max_size=8), st.booleans(), st.sampled_from([0.0, 0.9]))
def test_line_plot_is_valid_xml_with_finite_coordinates_for_any_points(points, log, smoothing):
    plot = line_plot([Series("a", points)], title="t", y_label="y", log_y=log, smoothing=smoothing)
    assert len(svgs(plot)) == 2
    drawn = re.findall(r'(?:points|x|y|x1|x2|y1|y2|cx|cy)="([^"]*)"', plot)
    assert not any("nan" in value or "inf" in value for value in drawn)


@pytest.mark.parametrize("series", [[], [Series("a", [])], [Series("a", [(0, NAN), (1, INF)])]])
def test_a_plot_without_data_says_so(series):
    assert texts(line_plot(series, title="t")) == ["no data"]


def test_constant_data_gets_an_axis_around_it():
    labels = texts(line_plot([Series("a", [(0, 2.5), (10, 2.5)])], title="t"))
    assert "2.5" in labels
    assert len(set(labels)) == len(labels)


def test_points_that_are_not_finite_break_the_line_and_are_counted():
    plot = line_plot([Series("a", [(0, 1.0), (1, 2.0), (2, NAN), (3, 3.0), (4, 2.0)])], title="t")
    assert len(svgs(plot)[0].findall(f"{SVG}polyline")) == 2
    assert "1 point without a finite value left out." in plot
    positive = line_plot([Series("a", [(0, 1.0), (1, 0.0), (2, -1.0)])], title="t", log_y=True)
    assert "2 points without a positive finite value left out." in positive


def test_smoothing_draws_the_average_over_the_raw_line():
    noisy = [(float(i), 1.0 + (i % 2)) for i in range(60)]
    raw, main = svgs(line_plot([Series("a", noisy)], title="t", smoothing=0.9))[0].findall(f"{SVG}polyline")
    assert "raw" in raw.get("class") and "main" in main.get("class")
    height = [float(pair.split(",")[1]) for pair in main.get("points").split()]
    rough = [float(pair.split(",")[1]) for pair in raw.get("points").split()]
    assert max(height) - min(height) < 0.2 * (max(rough) - min(rough))
    with pytest.raises(ValueError, match=r"smoothing is 1; expected 0 <= smoothing < 1"):
        line_plot([], title="t", smoothing=1)


def test_smoothing_does_not_lag_behind_a_slope():
    slope = [(float(i), float(i)) for i in range(101)]
    _, main = svgs(line_plot([Series("a", slope)], title="t", smoothing=0.9))[0].findall(f"{SVG}polyline")
    raw = svgs(line_plot([Series("a", slope)], title="t"))[0].find(f"{SVG}polyline")
    middle = [line.get("points").split()[50] for line in (main, raw)]
    # The two runs scale their axes alike, from 0 to 100: the averaged line stays inside the raw one.
    assert [float(pair.split(",")[1]) for pair in middle] == pytest.approx(
        [float(middle[1].split(",")[1])] * 2, abs=0.5
    )


def test_long_series_are_thinned_but_keep_their_spikes():
    points = [(float(i), 1.0) for i in range(50_000)]
    points[31_415] = (31_415.0, 9.0)
    plot = line_plot([Series("a", points)], title="t")
    assert len(plot) < 60_000
    heights = [float(pair.split(",")[1]) for pair in svgs(plot)[0].find(f"{SVG}polyline").get("points").split()]
    assert sum(height < min(heights) + 1 for height in heights) == 1


def test_text_of_plots_is_escaped():
    line = line_plot([Series(EVIL, [(0, 1), (1, 2)])], title=EVIL, x_label=EVIL, y_label=EVIL, smoothing=0.5)
    bars = bar_plot([Group(EVIL, {EVIL: 1.0, "b": 2.0})], title=EVIL, write=lambda _: EVIL)
    for plot in (line, bars):
        assert "<script" not in plot
        assert len(svgs(plot)) == 2
        plot.encode("utf-8")


def test_plots_are_named_for_screen_readers():
    for plot in (line_plot([Series("loss", [(0, 4.0), (1, 2.0)])], title="Loss"), bar_plot([], title="Loss")):
        for svg in svgs(plot):
            assert svg.get("role") == "img" and svg.get("aria-label") == "Loss"
            assert svg.find(f"{SVG}title").text == "Loss"
    assert "loss: from 4 to 2" in line_plot([Series("loss", [(0, 4.0), (1, 2.0)])], title="Loss")


def test_bars_keep_their_proportions_and_show_what_is_missing():
    plot = bar_plot(
        [Group("what", {"model": 0.8, "blind": 0.4, "other": None}), Group("is", {"model": 0.0, "blind": NAN})],
        title="t",
        write=write_percent,
        full=1.0,
    )
    for svg in svgs(plot):
        rects = {(r.get("class"), r.get("y")): float(r.get("width")) for r in svg.iter(f"{SVG}rect")}
        tracks = [width for (name, _), width in rects.items() if name == "track"]
        model, blind, none = sorted((w for (name, _), w in rects.items() if name.startswith("bar ")), reverse=True)
        assert model == pytest.approx(0.8 * tracks[0], abs=0.02)
        assert blind == pytest.approx(0.4 * tracks[0], abs=0.02)
        assert none == 1.5
    assert [t for t in texts(plot) if t not in ("what", "is")] == [
        "80.0\xa0%",
        "40.0\xa0%",
        "\N{EN DASH}",
        "0.0\xa0%",
        "\N{EN DASH}",
    ]


def test_negative_bars_grow_to_the_left_of_zero():
    svg = svgs(bar_plot([Group("a", {"x": -1.0}), Group("b", {"x": 1.0})], title="t"))[0]
    left, right = svg.findall(f"{SVG}rect")
    assert float(left.get("x")) + float(left.get("width")) == pytest.approx(float(right.get("x")), abs=0.02)


def test_letters_stay_legible_in_both_renderings():
    plot = line_plot([Series("a", [(0, 1), (1, 2)])], title="t", x_label="tokens", y_label="loss")
    wide, narrow = svgs(plot)
    assert (wide.get("class"), narrow.get("class")) == ("wide", "narrow")
    for svg in (wide, narrow):
        assert min(float(t.get("font-size")) for t in svg.iter(f"{SVG}text")) >= 12
    assert float(narrow.get("viewBox").split()[2]) <= 358  # what a 390 px screen leaves between its margins


@given(st.text(max_size=200))
def test_wrapped_text_fits_its_width(text):
    lines = wrap(text, 120, 12)
    assert 1 <= len(lines) <= 3
    assert all(text_width(line, 12) <= 120 + 12 for line in lines)


def test_numbers_are_written_for_readers():
    assert [write_number(v) for v in (12345, 0.012345, 3.0, 1234.5, 0, NAN)] == [
        "12,345", "0.01235", "3", "1,234", "0", "\N{EN DASH}",
    ]  # fmt: skip
    assert write_number(-1.5e-7) == "\N{MINUS SIGN}1.5e-7"
    assert write_percent(0.97126) == "97.1\xa0%"
    assert [write_seconds(s) for s in (0.4213, 41.6, 402.2, 3600, 7500)] == [
        "0.42\xa0s", "42\xa0s", "6\xa0min 42\xa0s", "1\xa0h", "2\xa0h 5\xa0min",
    ]  # fmt: skip
