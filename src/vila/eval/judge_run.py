"""Asking a judge: every case until its reply can be read, replies kept on disk, the cost told before the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vila.core.events import SILENT, Events, task
from vila.core.fields import Fields
from vila.core.files import write_json
from vila.eval.endpoint import Endpoint, Reply, ServerError
from vila.eval.judge import DEFAULT_MODEL, Case, Verdict, body_hash, read_reply, request_body
from vila.eval.judge_cost import Estimate, Prices, estimate_cost

_STALE_ROUNDS = 10
"""The original gives up after so many rounds in which no further reply could be read."""


@dataclass
class Judge:
    """A judge behind a server.

    cache:  folder of replies that could be read, by hash of model and messages; what lies there is not asked again.
    rounds: give up on the rest after this many rounds in a row without a further readable reply.
    prices: of models that the table does not have, or other ones.
    """

    endpoint: Endpoint
    cache: Path
    model: str = DEFAULT_MODEL
    rounds: int = _STALE_ROUNDS
    prices: Prices | None = None
    events: Events = SILENT

    def estimate(self, kind: str, cases: Sequence[Case]) -> Estimate:
        """What `verdicts` would ask now, and about what that costs."""
        bodies = self._bodies(kind, cases)
        asked = [body for key, body in bodies.items() if not self._path(key).is_file()]
        return estimate_cost(asked, self.model, self.prices, kept=len(bodies) - len(asked))

    def verdicts(self, kind: str, cases: Sequence[Case]) -> list[Verdict]:
        """A verdict for each case; equal requests are sent once. Says the estimate first.

        Replies that could not be read, and failures of the server, are asked again in rounds; what then remains comes
        as a verdict that is not readable. Raises ServerError when the server refuses, or answers nothing in a round.
        """
        self.events.said(self.estimate(kind, cases).text)
        bodies = self._bodies(kind, cases)
        replies = {key: reply for key in bodies if (reply := self._kept(key)) is not None}
        stale = 0
        name = f"judge {self.model}: {len(cases)} answers"
        with task(self.events, name, len(bodies), "answers"):
            self.events.advanced(name, len(replies))
            while stale < self.rounds:
                waiting = {key: body for key, body in bodies.items() if not _readable(replies.get(key))}
                if not waiting:
                    break
                came = self._round(waiting, replies, name)
                stale = 0 if came else stale + 1
        return [
            read_reply(case.id, replies.get(key, "")) for case, key in zip(cases, self._keys(kind, cases), strict=True)
        ]

    def _round(self, waiting: Mapping[str, Mapping[str, Any]], replies: dict[str, str], name: str) -> int:
        """Ask each of `waiting` once more. Returns how many replies could be read."""
        keys = list(waiting)
        jobs = [partial(self.endpoint.complete, waiting[key]) for key in keys]
        readable = answered = 0
        error: Exception | None = None
        for number, result in self.endpoint.each(jobs):
            if not isinstance(result, Reply):
                if isinstance(result, ServerError) and result.final:
                    raise result
                error = result
                continue
            answered += 1
            replies[keys[number]] = result.text
            if _readable(result.text):
                readable += 1
                self.events.advanced(name, 1)
                kept = {"model": self.model, "messages": waiting[keys[number]]["messages"], "reply": result.text}
                write_json(self._path(keys[number]), kept)
        if error is not None and not answered:
            raise error
        return readable

    def _bodies(self, kind: str, cases: Sequence[Case]) -> dict[str, dict[str, Any]]:
        bodies = [request_body(kind, case, self.model) for case in cases]
        return {body_hash(body): body for body in bodies}

    def _keys(self, kind: str, cases: Sequence[Case]) -> list[str]:
        return [body_hash(request_body(kind, case, self.model)) for case in cases]

    def _path(self, key: str) -> Path:
        return self.cache / key[:2] / f"{key}.json"

    def _kept(self, key: str) -> str | None:
        path = self._path(key)
        return Fields.of_file(path).text("reply") if path.is_file() else None


def _readable(reply: str | None) -> bool:
    return reply is not None and read_reply("", reply).readable
