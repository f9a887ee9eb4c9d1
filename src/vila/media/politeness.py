"""How hard one host may be pressed: requests at once, pauses between them, and waiting when it asks for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

_MANY = 20_000


@dataclass(slots=True)
class _Host:
    slots: asyncio.Semaphore
    next_start: float = 0.0
    users: int = 0


@dataclass(slots=True)
class HostGates:
    """One gate per host. `per_host` requests at once; `delay_s` seconds at least from one start to the next."""

    per_host: int
    delay_s: float
    _hosts: dict[str, _Host] = field(default_factory=dict)

    @asynccontextmanager
    async def passing(self, host: str) -> AsyncIterator[None]:
        """Wait for a turn at `host`, and hold it while the body runs."""
        gate = self._hosts.setdefault(host, _Host(asyncio.Semaphore(self.per_host)))
        gate.users += 1
        try:
            async with gate.slots:
                while (wait := gate.next_start - time.monotonic()) > 0:
                    await asyncio.sleep(wait)
                gate.next_start = time.monotonic() + self.delay_s
                yield
        finally:
            gate.users -= 1
            if len(self._hosts) > _MANY:
                self._forget_idle()

    def _forget_idle(self) -> None:
        now = time.monotonic()
        idle = [host for host, gate in self._hosts.items() if not gate.users and gate.next_start <= now]
        for host in idle:
            del self._hosts[host]

    def pause(self, host: str, seconds: float) -> None:
        """Nothing more goes to `host` for `seconds`: it has said that it is pressed too hard."""
        if gate := self._hosts.get(host):
            gate.next_start = max(gate.next_start, time.monotonic() + seconds)


def retry_after_s(value: str | None, now: float) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or a date (RFC 9110, 10.2.3); None when it says nothing.

    now: Unix time.
    """
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now)
    except ValueError:
        return None


def spread_by_host(urls: Iterable[str]) -> list[str]:
    """The same URLs, the first of every host before the second of any: no host keeps the others waiting."""
    rank: dict[str, int] = {}
    keyed: list[tuple[int, int, str]] = []
    for position, url in enumerate(urls):
        host = host_of(url)
        rank[host] = rank.get(host, -1) + 1
        keyed.append((rank[host], position, url))
    return [url for _, _, url in sorted(keyed)]


def host_of(url: str) -> str:
    """The host that a URL names, in small letters, or nothing when it names none."""
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""
