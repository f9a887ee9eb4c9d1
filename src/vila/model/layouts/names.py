"""Foreign names of weights and ours, as pairs of prefixes that work in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from vila.core.errors import LayoutError
from vila.model.weights import Piece

Prefixes = Sequence[tuple[str, str]]
"""Pairs (foreign, ours). The first that fits is taken, so longer ones come first."""

# Buffers that old versions of transformers saved; every module computes them itself.
_HARMLESS = ("rotary_emb.inv_freq", "embeddings.position_ids")


def to_ours(name: str, prefixes: Prefixes) -> str | None:
    """Our name of a foreign weight, None when no prefix fits."""
    return next((ours + name[len(theirs) :] for theirs, ours in prefixes if name.startswith(theirs)), None)


def to_theirs(name: str, prefixes: Prefixes) -> str:
    """The foreign name of a weight of ours. Raises LayoutError when the layout has no place for it."""
    for theirs, ours in sorted(prefixes, key=lambda pair: -len(pair[1])):
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    raise LayoutError(f"this layout has no place for the weight {name}")


def claim(
    pieces: Mapping[str, Piece], prefixes: Prefixes, ignore: Iterable[str] = ()
) -> tuple[dict[str, Piece], list[str]]:
    """Pieces by our names, and the foreign names that nothing claims. `ignore`: prefixes that are known and not needed.

    Raises LayoutError when two foreign weights claim one of ours.
    """
    ours: dict[str, Piece] = {}
    unclaimed = []
    skipped = tuple(ignore)
    for name, piece in pieces.items():
        if name.endswith(_HARMLESS) or (skipped and name.startswith(skipped)):
            continue
        target = to_ours(name, prefixes)
        if target is None:
            unclaimed.append(name)
        elif target in ours:
            raise LayoutError(f"{piece.file.path}: both {ours[target].name} and {name} stand for {target}")
        else:
            ours[target] = piece
    return ours, unclaimed


def keep_rows(piece: Piece, rows: int) -> Piece:
    """Return the first `rows` rows of a weight. Raises LayoutError if it has fewer."""
    if not piece.shape or piece.shape[0] < rows:
        raise _shape_error(piece, f"at least {rows} rows")
    return replace(piece, shape=(rows, *piece.shape[1:]), change=_then(piece.change, lambda tensor: tensor[:rows]))


def take_third(piece: Piece, number: int) -> Piece:
    """Return query, key or value from a weight that holds all three, one below the other.

    Raises LayoutError unless its rows can be divided by three.
    """
    if not piece.shape or piece.shape[0] % 3:
        raise _shape_error(piece, "rows of query, key and value")
    rows = piece.shape[0] // 3
    start = number * rows

    def cut(tensor):
        return tensor[start : start + rows]

    return replace(piece, shape=(rows, *piece.shape[1:]), change=_then(piece.change, cut))


def _shape_error(piece: Piece, expected: str) -> LayoutError:
    return LayoutError("", file=piece.file.path, field=piece.name, value=list(piece.shape), expected=expected)


def _then(first: Callable | None, second: Callable) -> Callable:
    return second if first is None else lambda tensor: second(first(tensor))
