"""A streamed answer is the stripped text for any division into pieces."""

import pytest

from vila.cli.run import stripped
from vila.engine.sampling_params import TokenEvent


@pytest.mark.parametrize(
    "pieces",
    [
        [" ", "\n", " a", " ", "b ", "\n"],
        ["a b"],
        [" a", "", "  b", " c\n\n", "d "],
        ["", " "],
    ],
)
def test_pieces_without_the_space_around_them_join_to_the_stripped_text(pieces):
    ends = []
    events = [TokenEvent(piece) for piece in pieces] + [TokenEvent("", "length")]
    shown = list(stripped(events, ends))
    assert "".join(shown) == "".join(pieces).strip()
    assert all(shown)
    assert ends == ["length"]


def test_pieces_come_as_soon_as_they_are_certain():
    pieces = iter(["a ", "b", "c"])
    shown = stripped(TokenEvent(piece) for piece in pieces)
    assert [next(shown), next(pieces)] == ["a", "b"]
