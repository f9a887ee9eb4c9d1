"""Errors travel between processes and say the same there."""

import pickle

import pytest

from vila.core.errors import DataError, Interrupted, Preempted, UnknownNameError


@pytest.mark.parametrize(
    "error", [UnknownNameError("format", "jsonl", ["json", "parquet"]), DataError("a.json row 3: no text")]
)
def test_an_error_survives_the_way_to_another_process(error):
    there = pickle.loads(pickle.dumps(error))
    assert (type(there), str(there)) == (type(error), str(error))


def test_being_preempted_is_no_failure():
    assert (Interrupted.exit_code, Preempted.exit_code) == (130, 0)
