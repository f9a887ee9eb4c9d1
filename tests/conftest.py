"""Fixtures and reports of all tests: a cache per test, one thread per worker, documentation blocks not run."""

import os

# Workers share the cores; torch reads this when it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.package.readme_blocks import ROOT, read_blocks


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Keep indexes, features and parts that a test makes out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("VILA_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def tracebacks(monkeypatch):
    """Let the command line raise unexpected exceptions, here and in processes that a test starts."""
    monkeypatch.setenv("VILA_TRACEBACK", "1")


@pytest.fixture(scope="module")
def training_folder(tmp_path_factory):
    """A directory with a tiny model and records that train it, see `tests.train.tiny_run`."""
    from tests.train.tiny_run import write_training_files

    return write_training_files(tmp_path_factory.mktemp("training"))


@pytest.fixture
def refuse_weights(monkeypatch):
    """Fail a test in which the build of a training run reads weights."""
    from vila.train import build

    def refuse(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(build, "load_initial_model", refuse)


def pytest_terminal_summary(terminalreporter):
    """List the blocks of README and docs that a reader may type and that this session did not run."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    ran = {
        report.nodeid.partition("[")[2].rstrip("]") for report in reports if "test_documented_block" in report.nodeid
    }
    if not ran:
        return
    terminalreporter.section("documentation blocks not run")
    for block in read_blocks(ROOT):
        if block.where not in ran:
            why = "not selected" if "run" in block.tags else "not tagged run"
            terminalreporter.write_line(f"{block.where} ({' '.join([block.language, *sorted(block.tags)])}): {why}")
