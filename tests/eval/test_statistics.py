"""Intervals and paired tests count pictures, not questions."""

import pytest

from vila.core.errors import DataError
from vila.eval.benchmark import Mark
from vila.eval.statistics import compare, interval


def marks(values, per_group=1):
    return [Mark(str(n), float(value), str(n // per_group)) for n, value in enumerate(values)]


def test_an_interval_has_the_width_that_theory_gives():
    found = interval(marks([n % 2 for n in range(400)]))
    assert found.mean == 50
    # Standard error of a share of one half over 400 questions: 2.5 points; 1.96 of them on either side.
    assert found.low == pytest.approx(50 - 4.9, abs=0.6)
    assert found.high == pytest.approx(50 + 4.9, abs=0.6)


def test_questions_about_one_picture_count_as_one_when_they_agree():
    alike = [value for n in range(100) for value in [n % 2] * 4]
    wide, narrow = interval(marks(alike, per_group=4)), interval(marks([n % 2 for n in range(400)]))
    assert wide.groups == 100
    assert wide.high - wide.low == pytest.approx(2 * (narrow.high - narrow.low), rel=0.15)


def test_no_marks_no_interval():
    assert interval([]) is None


def test_equal_runs_do_not_differ():
    same = compare(marks([1, 0, 1, 1]), marks([1, 0, 1, 1]))
    assert (same.difference, same.better, same.worse, same.p) == (0, 0, 0, 1)


def test_a_difference_on_every_picture_is_no_chance():
    found = compare(marks([0] * 20), marks([1] * 20))
    assert (found.difference, found.better) == (100, 20)
    assert found.p < 0.01


def test_the_p_value_is_that_of_the_sign_test():
    # Six pictures differ, all one way: chance gives that twice in 2^6.
    found = compare(marks([0] * 6 + [1] * 50), marks([1] * 56))
    assert found.p == pytest.approx(2 / 64, abs=0.012)


def test_only_common_questions_are_compared():
    found = compare(marks([0, 0, 0]), marks([1, 1]))
    assert found.questions == 2
    with pytest.raises(DataError, match="no question in common"):
        compare(marks([1]), [Mark("other", 1.0)])
