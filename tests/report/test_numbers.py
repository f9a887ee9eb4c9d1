"""Numbers, percentages and durations as text."""

import math

from vila.report.numbers import write_number, write_percent, write_seconds


def test_numbers_are_grouped_and_rounded() -> None:
    assert [write_number(v) for v in (12345, 0.012345, 3.0, 1234.5, 0, math.nan)] == [
        "12,345", "0.01235", "3", "1,234", "0", "\N{EN DASH}",
    ]  # fmt: skip
    assert write_number(-1.5e-7) == "\N{MINUS SIGN}1.5e-7"


def test_percentages_and_durations_have_no_break_spaces() -> None:
    assert write_percent(0.97126) == "97.1\xa0%"
    assert [write_seconds(s) for s in (0.4213, 41.6, 402.2, 3600, 7500)] == [
        "0.42\xa0s", "42\xa0s", "6\xa0min 42\xa0s", "1\xa0h", "2\xa0h 5\xa0min",
    ]  # fmt: skip
