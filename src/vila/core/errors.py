"""Exceptions of `vila`. Location, value and hint are fields of the exception; `VilaError` renders the message."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from os import PathLike
from typing import Any, Final, Self

MAX_SHOWN_VALUE: Final = 120
"""Maximum number of characters of a value in a message."""
_SHORTEST_PART: Final = 3


class _Missing:
    """Type of `MISSING`."""

    def __repr__(self) -> str:
        return "MISSING"

    def __reduce__(self) -> str:
        return "MISSING"


MISSING: Final = _Missing()
"""Default of `VilaError.value`: no value (None is a value)."""


class VilaError(Exception):
    """Base class of errors caused by input or environment. The command line prints the message without a traceback.

    problem:  reason, without location and remedy. Empty if `value` and `expected` are enough.
    file:     file, directory or URL with the problem.
    record:   index of the record in `file` (from 0), or text such as "line 3" or "key 0001".
    field:    dotted name of the key, option, tensor or argument.
    value:    the rejected value; `MISSING` if there is none.
    expected: the accepted values.
    hint:     remedy: a command, an option or a near match.

    `str(error)` is `FILE, record RECORD: FIELD: PROBLEM, got VALUE, expected EXPECTED; HINT`, without absent parts.
    """

    exit_code = 1
    """Exit code of a command that ends with this error."""
    is_repeated = False
    """Whether rank 0 of the run prints the same error."""
    rank: int | None = None
    """Rank that raised the error, if it was another process."""

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
    """A recipe, an override or a command-line value is invalid. May hold several problems, see `collect`."""

    exit_code = 2

    _collected: tuple[VilaError, ...] = ()

    @property
    def problems(self) -> tuple[VilaError, ...]:
        """The single errors of `collect`, or the error itself."""
        return self._collected or (self,)

    @classmethod
    def collect(cls, source: str, problems: Iterable[VilaError | str]) -> ConfigError:
        """Return one error for all `problems`; its message has one line per problem.

        source: the file or group of settings that was checked; becomes `file`.
        """
        errors = [one if isinstance(one, VilaError) else cls(one) for one in problems]
        if len(errors) > 1:
            error = cls("\n".join([f"{len(errors)} problems", *(f"  - {one}" for one in errors)]), file=source)
        elif (one := errors[0]).file is None:
            error = cls(one.problem, field=one.field, value=one.value, expected=one.expected, hint=one.hint)
            error.file, error.record = source, one.record
        else:
            error = cls(str(one), file=source)
        error._collected = tuple(errors)
        return error


class UnknownNameError(VilaError, LookupError):
    """A name is not in a registry. `near` has up to three similar names; the hint lists them and all known names."""

    exit_code = 2

    def __init__(self, kind: str, name: str, known: Iterable[str], *, field: str | None = None) -> None:
        names = sorted(known)
        self.kind, self.name, self.near = kind, name, near_names(name, names)
        suggestion = f"did you mean {' or '.join(map(repr, self.near))}? " if self.near else ""
        super().__init__(
            f"unknown {kind} {name!r}", field=field, hint=f"{suggestion}(known: {', '.join(names) or 'none'})"
        )


def near_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return up to `count` of the `known` names that `name` may be a misspelling or an abbreviation of.

    Case is ignored; `-`, `_`, `.` and spaces are equal. Without a close match, names that contain `name` are returned.
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
    """An image, video or URL cannot be read."""


class DataError(VilaError, ValueError):
    """A record cannot be converted to a sample."""


class TemplateError(VilaError, ValueError):
    """A conversation cannot be rendered with its template."""


class LayoutError(VilaError, ValueError):
    """A directory is not a known checkpoint, or its weights do not match its config."""


class WeightMismatchError(LayoutError):
    """The weights of a checkpoint do not match its config.

    missing, unexpected: names of weights. mismatched: one description per weight of another shape or dtype.
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        mismatched: Sequence[str] = (),
    ) -> None:
        self.missing, self.unexpected, self.mismatched = list(missing), list(unexpected), list(mismatched)
        lists = (("missing", self.missing), ("unexpected", self.unexpected))
        problems = [f"{len(names)} weights {what} ({', '.join(names)})" for what, names in lists if names]
        super().__init__("; ".join([*problems, *self.mismatched]), file=folder, hint="refusing a partial load")


class DownloadError(VilaError, OSError):
    """A download failed, or its content is not the expected one."""


class CheckpointError(VilaError, ValueError):
    """Training cannot resume from a checkpoint."""


class RunChangedError(CheckpointError):
    """The recipe, the data or the model changed since the run was started.

    differences: (field, value at the start, value now) of each change.
    """

    def __init__(self, what: str, differences: Iterable[tuple[str, str, str]], folder: str | PathLike[str]) -> None:
        self.differences = list(differences)
        lines = "; ".join(f"{field}: {before} -> {now}" for field, before, now in self.differences)
        field = self.differences[0][0]
        super().__init__(
            f"{what} changed since the run was started ({lines})",
            file=folder,
            hint=f"undo the change, allow it by name (--allow-changes {field}), choose another output.dir, or delete "
            "the directory to start over",
        )


class ContextOverflowError(VilaError, ValueError):
    """A prompt and its answer exceed the context length of the model."""


class TrainingError(VilaError, RuntimeError):
    """Training cannot continue: the loss is not finite, or no supervised token is left."""


class DirectoryInUseError(VilaError):
    """Another process is writing the directory that a command is about to write."""

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
    """The user interrupted the command. Finished work is saved; the same command resumes it."""

    exit_code = 130


class Preempted(Interrupted):
    """A batch system or `kill` (SIGTERM) stopped the command after its work was saved; not a failure."""

    exit_code = 0


class QueueFullError(VilaError):
    """The request queue is full. retry_after: seconds after which the client should try again."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ClosedError(VilaError, RuntimeError):
    """The request scheduler is closed: new requests are rejected, running ones end."""


class EngineDeadError(ClosedError):
    """The thread that runs the model ended with an error; the process has to be restarted."""


class CancelledError(VilaError):
    """The client cancelled the request."""


class DeadlineError(VilaError, TimeoutError):
    """A request exceeded its deadline."""


class NumericsError(VilaError, ArithmeticError):
    """The logits of a request are not finite."""
