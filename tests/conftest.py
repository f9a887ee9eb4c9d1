"""What every test starts from: a cache of its own."""

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Indexes, features and parts that a test makes stay out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("VILA_CACHE", str(folder))
    return folder
