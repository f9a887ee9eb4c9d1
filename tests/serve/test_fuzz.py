"""Fuzzing by the OpenAPI schema: every request gets an answer or a 4xx error."""

import json

import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error

from tests.serve import fixtures
from vila.serve.app import create_app

APP = create_app(fixtures.ready(max_queue=64))
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)
KNOWN = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["messages", "stream", "max_tokens", "temperature", "top_p", "stop", "seed", "n", "logprobs", "top_logprobs",
          "stream_options", "tools", "logit_bias", "response_format", "user"]  # fmt: skip


@SCHEMA.parametrize()
@KNOWN
def test_no_request_of_the_schema_makes_the_server_fail(case):
    if isinstance(case.body, dict) and "model" in case.body and isinstance(case.body["model"], str):
        case.body["model"] = "tiny"
        case.body["max_tokens"] = 2
        case.body.pop("max_completion_tokens", None)
    response = case.call()
    case.validate_response(response, checks=[not_a_server_error])


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_no_value_of_any_field_makes_the_server_fail(changes):
    limit = {} if "max_tokens" in changes else {"max_tokens": 2}
    content = json.dumps({**fixtures.body(), **limit, **changes})
    answer = fixtures.send(APP, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert answer.json()["error"]["message"]
