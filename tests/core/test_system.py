"""Rank and world size from the variables of `torchrun`."""

import pytest

from vila.core.errors import ConfigError
from vila.core.system import ProcessInfo, current_process


def test_without_variables_the_process_is_the_only_one():
    alone = ProcessInfo()
    assert current_process({}) == current_process({"RANK": "0"}) == current_process({"WORLD_SIZE": "1"}) == alone
    assert alone.is_main


def test_ranks_and_sizes_come_from_the_variables():
    variables = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "HOME": "/"}
    assert current_process(variables) == ProcessInfo(5, 8, 1, 4)
    assert not current_process(variables).is_main


@pytest.mark.parametrize(
    ("variables", "missing"), [({"RANK": "1"}, "WORLD_SIZE"), ({"WORLD_SIZE": "2"}, "RANK")], ids=str
)
def test_a_missing_variable_is_named(variables, missing):
    with pytest.raises(ConfigError) as caught:
        current_process(variables)
    assert caught.value.field == missing
    assert "torchrun" in caught.value.hint


@pytest.mark.parametrize(
    "values",
    [
        {"RANK": 2, "WORLD_SIZE": 2},
        {"RANK": -1, "WORLD_SIZE": 2},
        {"RANK": 0, "WORLD_SIZE": 0},
        {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1},
        {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4},
    ],
    ids=str,
)
def test_variables_that_contradict_each_other_are_listed(values):
    with pytest.raises(ConfigError) as caught:
        current_process({name: str(value) for name, value in values.items()})
    assert caught.value.value == values


def test_a_variable_that_is_no_integer_is_named():
    with pytest.raises(ConfigError) as caught:
        current_process({"RANK": "one", "WORLD_SIZE": "2"})
    assert (caught.value.field, caught.value.value) == ("RANK", "one")
