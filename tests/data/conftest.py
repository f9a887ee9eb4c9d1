"""Fixtures of the data tests."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Skip fsync: the tests write hundreds of small indexes."""
    monkeypatch.setattr(os, "fsync", lambda number: None)
