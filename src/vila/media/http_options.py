"""Limits of HTTP downloads. Apart from the client, so that the command line can list them without network code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class HTTPOptions:
    """Limits and identity of an `HTTPClient`. The docstrings of the fields are help texts of flags."""

    max_connections: int = 256
    """Maximum number of concurrent requests, over all hosts."""
    connect_timeout_s: float = 5.0
    """Timeout in seconds for DNS and TCP connection, and again for TLS."""
    read_timeout_s: float = 10.0
    """Timeout in seconds without received data."""
    total_timeout_s: float = 30.0
    """Timeout in seconds per attempt: redirects and the complete body included, waiting for the rate limiter not."""
    max_bytes: int = 20 * 2**20
    """Maximum size of a body in bytes."""
    max_redirects: int = 5
    """Maximum number of redirects per attempt."""
    allow_private: bool = False
    """Allow private and local addresses: this machine and its network."""
    respect_noai: bool = False
    """Skip images whose X-Robots-Tag header has noai or noimageai."""
    user_agent: str = "vila"
    """User-Agent header; include a contact for large downloads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadOptions(HTTPOptions):
    """Limits of one attempt, rate limit per host, and retries."""

    max_connections_per_host: int = 4
    """Maximum number of concurrent requests per host; use 1 with many workers."""
    host_delay_s: float = 0.05
    """Minimum delay in seconds between requests to one host."""
    max_attempts: int = 3
    """Maximum number of attempts after timeouts, broken connections and busy servers. Other failures are final."""
    initial_backoff_s: float = 1.0
    """Delay in seconds before the second attempt; doubles with each attempt, plus up to a quarter at random."""
    max_retry_after_s: float = 60.0
    """Maximum accepted Retry-After in seconds; longer ones are failures."""
    respect_noai: bool = True
    """Skip images whose X-Robots-Tag header has noai or noimageai."""


DEFAULT_OPTIONS = DownloadOptions()
