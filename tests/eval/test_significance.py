"""Confidence intervals and paired tests, resampled by image."""

import pytest

from vila.core.errors import DataError
from vila.eval.benchmark import AggregateMetric, BenchmarkResult, QuestionScore
from vila.eval.significance import compare_paired, mean_interval, score_interval


def question_scores(values, per_group=1):
    return [QuestionScore(str(n), float(value), str(n // per_group)) for n, value in enumerate(values)]


def test_an_interval_has_the_width_that_theory_gives():
    found = mean_interval(question_scores([n % 2 for n in range(400)]))
    assert found.mean == 50
    # Standard error of a share of one half over 400 questions: 2.5 points; 1.96 of them on either side.
    assert found.low == pytest.approx(50 - 4.9, abs=0.6)
    assert found.high == pytest.approx(50 + 4.9, abs=0.6)


def test_questions_about_one_image_count_as_one_when_they_agree():
    alike = [value for n in range(100) for value in [n % 2] * 4]
    wide, narrow = (
        mean_interval(question_scores(alike, per_group=4)),
        mean_interval(question_scores([n % 2 for n in range(400)])),
    )
    assert wide.groups == 100
    assert wide.high - wide.low == pytest.approx(2 * (narrow.high - narrow.low), rel=0.15)


def test_no_scores_no_interval():
    assert mean_interval([]) is None


def test_equal_runs_do_not_differ():
    same = compare_paired(question_scores([1, 0, 1, 1]), question_scores([1, 0, 1, 1]))
    assert (same.difference, same.better, same.worse, same.p) == (0, 0, 0, 1)


def test_difference_on_every_image_is_significant():
    found = compare_paired(question_scores([0] * 20), question_scores([1] * 20))
    assert (found.difference, found.better) == (100, 20)
    assert found.p < 0.01


def test_the_p_value_is_that_of_the_sign_test():
    # Six images differ, all one way: chance gives that twice in 2^6.
    found = compare_paired(question_scores([0] * 6 + [1] * 50), question_scores([1] * 56))
    assert found.p == pytest.approx(2 / 64, abs=0.012)


def test_only_common_questions_are_compared():
    found = compare_paired(question_scores([0, 0, 0]), question_scores([1, 1]))
    assert found.questions == 2
    with pytest.raises(DataError):
        compare_paired(question_scores([1]), [QuestionScore("other", 1.0)])


def result(found, parts, figure, **facts):
    return BenchmarkResult(figure([sum(column) for column in zip(*parts, strict=True)]), "%", {}, tuple(found), (),
                  AggregateMetric(tuple(parts), figure, **facts))  # fmt: skip


def test_a_score_that_is_the_mean_question_score_has_the_interval_of_the_mean():
    found = question_scores([n % 2 for n in range(40)])
    assert score_interval(BenchmarkResult(50.0, "%", {}, tuple(found))) == mean_interval(found)


def test_an_interval_of_sums_is_that_of_the_mean_where_the_figure_is_the_mean():
    found = question_scores([n % 3 == 0 for n in range(300)], per_group=3)
    ours = score_interval(result(found, [(mark.value, 1.0) for mark in found], lambda sums: 100 * sums[0] / sums[1]))
    theirs = mean_interval(found)
    assert (ours.mean, ours.questions, ours.groups) == (theirs.mean, 300, 100)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.5)


def test_an_interval_of_a_sum_over_categories_has_the_width_that_theory_gives():
    # Two kinds of 100 questions, half of them right: each has a standard error of 5 points, their sum one of 7.07.
    found = [QuestionScore(str(n), float(n % 2), category="ab"[n < 100]) for n in range(200)]
    parts = [(m.value, 0.0) if m.category == "a" else (0.0, m.value) for m in found]
    ours = score_interval(result(found, parts, lambda sums: sums[0] + sums[1], stratified=True))
    assert ours.mean == 100
    assert (ours.low, ours.high) == pytest.approx((100 - 13.9, 100 + 13.9), abs=1.5)


def test_drawing_by_kind_never_loses_a_kind():
    found = [QuestionScore("a", 1.0, category="a"), QuestionScore("b", 0.0, category="b")]
    ours = score_interval(result(found, [(1.0, 0.0), (0.0, 1.0)], lambda sums: sums[0] + sums[1], stratified=True))
    assert (ours.low, ours.mean, ours.high) == (2, 2, 2)
