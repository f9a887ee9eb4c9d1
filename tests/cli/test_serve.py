"""`vila serve`: errors of its flags before the server starts. Requests are tested in tests/serve."""

import pytest

from vila.core.errors import ConfigError, LayoutError


@pytest.mark.parametrize(
    ("arguments", "kind", "fields"),
    [
        (("{tmp}/none",), ConfigError, {"file": "{tmp}/none"}),
        (("none",), ConfigError, {"file": "none"}),
        (
            ("{model}", "--served-model-name", "a", "--served-model-name", "b"),
            ConfigError,
            {"field": "--served-model-name"},
        ),
        (("{model}", "{model}"), ConfigError, {"field": "--served-model-name", "value": "{parent}"}),
        (("{model}", "--ssl-certfile", "a.pem"), ConfigError, {"field": "--ssl-certfile"}),
        (("{model}", "--ssl-keyfile", "a.pem"), ConfigError, {"field": "--ssl-keyfile"}),
        (
            ("{model}", "--ssl-certfile", "{tmp}/a.pem", "--ssl-keyfile", "{tmp}/b.pem"),
            ConfigError,
            {"file": "{tmp}/a.pem, {tmp}/b.pem"},
        ),
        (("{model}", "--host", "256.0.0.1"), ConfigError, {"field": "--port", "value": 8000}),
        (("{tmp}", "--port", "0"), LayoutError, {"file": "{tmp}"}),
    ],
)
def test_bad_models_and_flags_are_errors_before_the_server_starts(vila_error, model, tmp_path, arguments, kind, fields):
    def filled(value):
        return value.format(tmp=tmp_path, model=model, parent=model.parent.name) if isinstance(value, str) else value

    error = vila_error("serve", *map(filled, arguments))
    assert type(error) is kind
    assert vars(error).items() >= {name: filled(value) for name, value in fields.items()}.items()


@pytest.mark.parametrize(
    "domain", ["https://images.example.org", "images.example.org/a", "images.example.org:443", "*", ""]
)
def test_what_is_no_host_is_refused_as_media_domain(vila_error, model, domain):
    error = vila_error("serve", model, "--allowed-media-domain", "*.example.org", "--allowed-media-domain", domain)
    assert isinstance(error, ConfigError)
    assert (error.field, error.value) == ("--allowed-media-domain", domain)
