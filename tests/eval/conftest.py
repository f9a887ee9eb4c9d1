"""Fixtures of the tests of interrupted and multi-process runs."""

import pytest

from tests import tiny
from tests.eval.eval_processes import evaluated, left_behind
from tests.eval.mini_datasets import write_mini_datasets
from vila.model.loading import save_model


@pytest.fixture(scope="session")
def reference_run(tmp_path_factory):
    """Model, mini datasets, and the output of an uninterrupted single-process run."""
    home = tmp_path_factory.mktemp("reference")
    model, data = home / "model", write_mini_datasets(home / "data")
    save_model(*tiny.vila(), model)
    assert evaluated(model, data, home / "run") == [0]
    return model, data, left_behind(home / "run", data, home / "submitted" / "run")
