"""Every error that `vila` raises on purpose. A message says what was wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class VilaError(Exception):
    """Base of all errors whose message is meant for the user; the command line prints it without a traceback."""

    exit_code = 1


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
    """A name that no registry holds; the message lists near matches and the known names."""

    exit_code = 2

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = get_close_matches(name, names, n=3)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        super().__init__(f"unknown {kind} {name!r}{hint} (known: {', '.join(names) or 'none'})")
        self._made_of = (kind, name, names)

    def __reduce__(self) -> tuple[type[UnknownNameError], tuple[str, str, list[str]]]:
        # It travels between processes, and is made there from what it was made of here.
        return type(self), self._made_of


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


class ContextOverflowError(VilaError, ValueError):
    """A prompt and its answer do not fit the model's context."""


class TrainingError(VilaError, RuntimeError):
    """Training cannot go on: the loss is not finite, or nothing is left to learn from."""


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


class CancelledError(VilaError):
    """Whoever asked did not want the answer any more."""


class DeadlineError(VilaError, TimeoutError):
    """A request was not answered within the time that it was given."""


class NumericsError(VilaError, ArithmeticError):
    """The model's numbers for a request are not finite."""
