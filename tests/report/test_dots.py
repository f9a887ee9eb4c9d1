"""Points with intervals, and intervals over bars: placed where they are measured, told to those who do not see them."""

import re

from vila.report.bars import Group, bar_plot
from vila.report.dots import Dots, dot_plot


def numbers(markup, tag, kind, *names):
    found = re.findall(rf'<{tag} class="{kind}"[^>]*>', str(markup).split('class="narrow"')[0])
    return [tuple(float(re.search(rf' {name}="([^"]+)"', each)[1]) for name in names) for each in found]


def test_points_stand_at_their_values_and_the_axis_is_marked_at_them():
    drawing = dot_plot([Dots("a", [(0, 10.0), (4, 30.0), (2, 20.0)])], title="t")
    places = numbers(drawing, "circle", "dot line0", "cx", "cy")
    (x0, y0), (x2, y2), (x4, y4) = places
    assert abs((x0 + x4) / 2 - x2) < 0.02 and abs((y0 + y4) / 2 - y2) < 0.02
    assert x0 < x4 and y0 > y4
    assert re.findall(r'text-anchor="middle"[^>]*>([^<]+)<', str(drawing).split('class="narrow"')[0]) == ["0", "2", "4"]


def test_whiskers_reach_both_ends_and_two_series_do_not_hide_each_other():
    series = [Dots(name, [(1, 50.0)], {1: (40.0, 60.0)}) for name in "ab"]
    drawing = dot_plot(series, title="t")
    upright = [line for line in numbers(drawing, "line", "whisker core", "x1", "y1", "x2", "y2") if line[0] == line[2]]
    assert len(upright) == 2 and upright[0][0] != upright[1][0]
    ((_, y),) = numbers(drawing, "circle", "dot line0", "cx", "cy")
    assert abs((upright[0][1] + upright[0][3]) / 2 - y) < 0.02
    assert "a: 50 at 1 (40 to 60)" in drawing


def test_what_is_not_finite_is_left_out():
    drawing = dot_plot([Dots("a", [(0, float("nan")), (1, 2.0)], {1: (1.0, float("inf"))})], title="t")
    assert len(numbers(drawing, "circle", "dot line0", "cx")) == 1
    assert "whisker" not in drawing
    assert "no data" in dot_plot([], title="t")


def test_a_bar_has_its_interval_from_end_to_end():
    group = Group("g", {"score": 50.0}, {"score": (40.0, 60.0)})
    drawing = bar_plot([group], title="t", full=100.0)
    ((start, wide),) = numbers(drawing, "rect", "bar bar0", "x", "width")
    level = [line for line in numbers(drawing, "line", "whisker core", "x1", "x2", "y1", "y2") if line[2] == line[3]]
    assert len(level) == 1
    assert abs(level[0][0] - (start + 0.8 * wide)) < 0.05 and abs(level[0][1] - (start + 1.2 * wide)) < 0.05
    assert "g, score: 50 (40 to 60)" in drawing


def test_an_interval_may_cross_zero_and_labels_stand_clear_of_it():
    drawing = bar_plot([Group("g", {"d": -2.0}, {"d": (-5.0, 1.0)})], title="t")
    level = [line for line in numbers(drawing, "line", "whisker core", "x1", "x2", "y1", "y2") if line[2] == line[3]]
    label = re.search(r'x="([\d.]+)"[^>]*text-anchor="end"[^>]*>\N{MINUS SIGN}2<', str(drawing))
    assert level[0][0] < level[0][1]
    assert float(label[1]) < level[0][0]


def test_bars_without_intervals_have_no_whiskers():
    assert "whisker" not in bar_plot([Group("g", {"a": 1.0, "b": None}, {"b": (0.0, 1.0)})], title="t")
