"""All exceptions that `vila` raises on purpose. They carry the location and the value as fields; see `VilaError`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from os import PathLike
from typing import Any, Final, Self

MAX_SHOWN_VALUE: Final = 120
"""Characters of a value that a message shows."""
_SHORTEST_PART: Final = 3


class _Missing:
    """Type of `MISSING`."""

    def __repr__(self) -> str:
        return "MISSING"

    def __reduce__(self) -> str:
        return "MISSING"


MISSING: Final = _Missing()
"""Default of `VilaError.value`: the error has no value (None is a value)."""


class VilaError(Exception):
    """Base class of all errors with a message for the user. The command line prints the message without a traceback.

    problem:  reason, without location and remedy. May be empty when `value` and `expected` say it.
    file:     file, directory or URL with the problem.
    record:   number of the record in `file` (from 0), or text such as "line 3" or "key 0001".
    field:    dotted name of the key, option, tensor or argument.
    value:    the offending value; `MISSING` if there is none.
    expected: the accepted values.
    hint:     remedy: command, option or near match.

    `str(error)` is `FILE, record RECORD: FIELD: PROBLEM, got VALUE, expected EXPECTED; HINT`, without the absent parts.
    """

    exit_code = 1

    is_repeated = False
    """Whether another process of the run, rank 0, prints the same error."""
    rank: int | None = None
    """Rank of the process that the error is from, where it is another one."""

    def __init__(
        self,
        problem: str = "",
        *,
        file: str | PathLike[str] | None = None,
        record: int | str | None = None,
        field: str | None = None,
        value: Any = MISSING,
        expected: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.file = None if file is None else str(file)
        self.record = record
        self.field = field
        self.value = value
        self.expected = expected
        self.hint = hint

    def __str__(self) -> str:
        record = f"record {self.record}" if isinstance(self.record, int) else self.record
        location = [part for part in (self.file, record) if part]
        reasons = [self.problem] if self.problem else []
        if self.value is not MISSING:
            reasons.append(f"got {_shown(self.value)}")
        if self.expected:
            reasons.append(f"expected {self.expected}")
        text = ": ".join(part for part in (", ".join(location), self.field or "", ", ".join(reasons)) if part)
        text = f"{text}; {self.hint}" if self.hint else text
        return text if self.rank is None else f"rank {self.rank}: {text}"

    def within(self, file: str | PathLike[str], record: int | str | None = None) -> Self:
        """Add the file and record that hold the reported text, in place, and return the error itself.

        An error that names another file (an image of a record, for example) keeps its text as the problem. To pass an
        error on: `except VilaError as error: error.within(file, record); raise`.
        """
        if self.file not in (None, str(file)):
            self.problem, self.field, self.value, self.expected, self.hint = str(self), None, MISSING, None, None
            self.record = None
        self.file = str(file)
        self.record = record if self.record is None else self.record
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own pickling passes `args` only.
        return _rebuild, (type(self), self.args, dict(self.__dict__))


def _rebuild(kind: type[VilaError], args: tuple[Any, ...], fields: dict[str, Any]) -> VilaError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(fields)
    return error


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_VALUE else f"{text[:MAX_SHOWN_VALUE]}..."


class ConfigError(VilaError, ValueError):
    """A recipe, an override or a command-line value is wrong. All problems are listed at once."""

    exit_code = 2

    @classmethod
    def collect(cls, where: str, problems: Iterable[str]) -> ConfigError:
        """One error naming `where` and every problem, a line each."""
        lines = list(problems)
        if len(lines) == 1:
            return cls(f"{where}: {lines[0]}")
        return cls("\n".join([f"{where}: {len(lines)} problems", *(f"  - {line}" for line in lines)]))


class UnknownNameError(VilaError, LookupError):
    """A name that no registry holds. `near` has up to three similar names, the hint lists them and the known names."""

    exit_code = 2

    def __init__(self, kind: str, name: str, known: Iterable[str], *, field: str | None = None) -> None:
        names = sorted(known)
        self.kind, self.name, self.near = kind, name, near_names(name, names)
        suggestion = f"did you mean {' or '.join(map(repr, self.near))}? " if self.near else ""
        super().__init__(
            f"unknown {kind} {name!r}", field=field, hint=f"{suggestion}(known: {', '.join(names) or 'none'})"
        )


def near_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return up to `count` of the `known` names that `name` is probably a misspelling or an abbreviation of.

    Case and the difference between `-`, `_`, `.` and spaces do not matter. Without a misspelling that is close, names
    that contain `name` count as near.
    """
    by_folded: dict[str, list[str]] = {}
    for one in known:
        by_folded.setdefault(_folded(one), []).append(one)
    wanted = _folded(name)
    near = get_close_matches(wanted, by_folded, n=count)
    if not near and len(wanted) >= _SHORTEST_PART:
        near = [one for one in by_folded if wanted in one]
    return [one for folded in near[:count] for one in by_folded[folded]][:count]


def _folded(name: str) -> str:
    return re.sub(r"[-_. ]+", "_", name.casefold())


class MediaError(VilaError, ValueError):
    """An image, video or URL cannot be read; the message names the file and the reason."""


class DataError(VilaError, ValueError):
    """A record cannot become a sample; the message names file, row or key, and reason."""


class TemplateError(VilaError, ValueError):
    """A conversation does not fit the template it is rendered with."""


class LayoutError(VilaError, ValueError):
    """A directory is not a checkpoint that we know, or its weights do not match its config."""


class DownloadError(VilaError, OSError):
    """A part could not be fetched, or what came is not what was asked for."""


class CheckpointError(VilaError, ValueError):
    """A training checkpoint cannot be resumed from."""


class RunChangedError(CheckpointError):
    """The recipe, the data or the model is not what a run began with.

    differences: (field, before, now) of each.
    """

    def __init__(self, what: str, differences: Iterable[tuple[str, str, str]], folder: str | PathLike[str]) -> None:
        self.differences = list(differences)
        lines = "; ".join(f"{field}: {before} -> {now}" for field, before, now in self.differences)
        field = self.differences[0][0]
        super().__init__(
            f"{what} changed since this run began ({lines})",
            file=folder,
            hint=f"undo the change, allow it by name (--allow-changes {field}), choose another output.dir, or delete "
            "the directory to start over",
        )


class ContextOverflowError(VilaError, ValueError):
    """A prompt and its answer do not fit the model's context."""


class TrainingError(VilaError, RuntimeError):
    """Training cannot go on: the loss is not finite, or nothing is left to learn from."""


class DirectoryInUseError(VilaError):
    """Another process writes the directory that a command is about to write."""

    def __init__(
        self, folder: str | PathLike[str], host: str | None = None, pid: int | None = None, since: str | None = None
    ) -> None:
        owner = f"process {pid} on {host}" if pid else "another process"
        super().__init__(
            f"in use by {owner}{f' since {since}' if since else ''}",
            file=folder,
            hint="wait until it ends or stop it, or choose another directory",
        )
        self.host, self.pid = host, pid


class Interrupted(VilaError):
    """The user stopped long work; what was finished is kept and the same command goes on from there."""

    exit_code = 130


class Preempted(Interrupted):
    """A batch system or `kill` stopped long work; it is saved, so this is no failure."""

    exit_code = 0


class QueueFullError(VilaError):
    """More requests wait than the batcher holds; `retry_after` is when to ask again, in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ClosedError(VilaError, RuntimeError):
    """The batcher takes no more requests, or ended this one because it was closed."""


class EngineDeadError(ClosedError):
    """The thread that runs the model has ended by an error; nothing is answered until the process is restarted."""


class CancelledError(VilaError):
    """Whoever asked did not want the answer any more."""


class DeadlineError(VilaError, TimeoutError):
    """A request was not answered within the time that it was given."""


class NumericsError(VilaError, ArithmeticError):
    """The model's numbers for a request are not finite."""
