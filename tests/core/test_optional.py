"""Optional packages: absent, broken, and the extras that bring them."""

import pickle
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.extras import ROOT
from vila.core.errors import ConfigError
from vila.core.optional import EXTRAS, MissingExtraError, require, require_all, require_extra


def test_an_absent_package_names_its_extra_and_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingExtraError) as raised:
        require("gradio", "vila demo", extra="demo")
    error = raised.value
    assert (error.field, error.packages, error.extra) == ("vila demo", ("gradio",), "demo")
    assert error.hint == "pip install 'vila-vlm[demo]'"
    assert isinstance(error, ConfigError) and error.exit_code == 2
    assert "\n" not in str(error)
    assert pickle.loads(pickle.dumps(error)).packages == ("gradio",)


def test_a_package_that_is_in_no_extra_is_installed_by_its_own_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError) as raised:
        require("wandb", "monitor.trackers")
    assert (raised.value.extra, raised.value.hint) == ("", "pip install wandb")


def test_a_broken_package_is_an_error_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "half_package.py").write_text("raise ImportError('libfoo.so.1:\\n not found')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError) as raised:
        require("half_package", "x")
    assert "libfoo.so.1: not found" in raised.value.problem


def test_every_absent_package_is_named_at_once(monkeypatch):
    for name in ("fastapi", "uvicorn"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError) as raised:
        require_extra("serve", "vila serve")
    assert raised.value.packages == ("fastapi", "uvicorn")
    assert raised.value.extra == "serve"


def test_what_is_there_is_returned():
    assert require("json", "x").loads("1") == 1
    require_all({"json": "json.decoder"}, "x")


def test_extras_are_those_of_the_package():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, modules in EXTRAS.items():
        declared = {canonicalize_name(Requirement(text).name) for text in extras[extra]}
        assert {canonicalize_name(module) for module in modules} == declared, extra
