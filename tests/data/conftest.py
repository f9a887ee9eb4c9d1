"""Indexes of the data tests do not wait for the disk."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Hundreds of tiny indexes are written here, and no test cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda number: None)
