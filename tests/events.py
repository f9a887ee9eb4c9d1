"""Events listeners for tests."""

from vila.core.progress import Silent


class EventLog(Silent):
    """Records log lines and ignores progress."""

    def __init__(self) -> None:
        # `Silent` is frozen.
        object.__setattr__(self, "lines", [])

    def log(self, text: str) -> None:
        """Record a line."""
        self.lines.append(text)
