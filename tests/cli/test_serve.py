"""`vila serve`: errors of its flags before the server starts. Requests are tested in tests/serve."""

import sys

import pytest

from vila.core.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "code", "where"),
    [
        (("{tmp}/none",), 2, "{tmp}/none"),
        (("none",), 2, "none"),
        (("{model}", "--served-model-name", "a", "--served-model-name", "b"), 2, "--served-model-name"),
        (("{model}", "{model}"), 2, "--served-model-name"),
        (("{model}", "--ssl-certfile", "a.pem"), 2, "--ssl-certfile"),
        (("{model}", "--ssl-certfile", "{tmp}/a.pem", "--ssl-keyfile", "{tmp}/a.pem"), 2, "{tmp}/a.pem"),
        (("{model}", "--host", "256.0.0.1"), 2, "256.0.0.1"),
        (("{model}", "--port", "70000"), 2, "--port"),
        (("{model}", "--max-num-seqs", "0"), 2, "--max-num-seqs"),
        (("{tmp}", "--port", "0"), 1, "{tmp}"),
    ],
)
def test_bad_models_and_flags_are_errors_before_the_server_starts(vila, model, tmp_path, arguments, code, where):
    ended, out, err = vila("serve", *(one.format(model=model, tmp=tmp_path) for one in arguments))
    assert ended == code, err
    assert where.format(tmp=tmp_path) in err
    assert "Traceback" not in err
    assert out == ""


def test_without_its_packages_the_extra_is_named(vila, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    code, _, err = vila("serve", model)
    assert code == 2
    assert "pip install 'vila-vlm[serve]'" in err


@pytest.mark.parametrize(
    "domain", ["https://images.example.org", "images.example.org/a", "images.example.org:443", "*", ""]
)
def test_what_is_no_host_is_refused_as_media_domain(vila_error, model, domain):
    error = vila_error("serve", model, "--allowed-media-domain", "*.example.org", "--allowed-media-domain", domain)
    assert isinstance(error, ConfigError)
    assert (error.field, error.value) == ("--allowed-media-domain", domain)
