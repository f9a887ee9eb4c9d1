"""Fixtures of every test: a cache of its own, and exceptions that are none of ours show their traceback."""

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Indexes, features and parts that a test makes stay out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("VILA_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def tracebacks(monkeypatch):
    """The command line raises unexpected exceptions, here and in processes that a test starts."""
    monkeypatch.setenv("VILA_TRACEBACK", "1")
