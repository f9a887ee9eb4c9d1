"""The place of a process among those of a run, and variables that make no sense."""

import pytest

from vila.core.distributed import Place, current_place
from vila.core.errors import ConfigError


def test_a_process_is_alone_when_nothing_says_otherwise():
    assert current_place({}) == current_place({"RANK": "0"}) == current_place({"WORLD_SIZE": "1"}) == Place()
    assert Place().main


def test_a_process_stands_where_torchrun_says():
    told = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "HOME": "/"}
    assert current_place(told) == Place(5, 8, 1, 4)
    assert not current_place(told).main


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"RANK": "1"}, "RANK=1, but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2, WORLD_SIZE=2 do not go together"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1, WORLD_SIZE=2 do not go together"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0, WORLD_SIZE=0 do not go together"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "RANK=1, WORLD_SIZE=2, LOCAL_RANK=1 do not go together"),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            "RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, LOCAL_WORLD_SIZE=4 do not go together",
        ),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE: invalid literal .*'one'"),
    ],
)
def test_variables_that_do_not_go_together_are_named_with_the_remedy(told, says):
    with pytest.raises(ConfigError, match=f"^{says}.*; start the run with torchrun, which sets them, or unset them"):
        current_place(told)
