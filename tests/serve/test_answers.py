"""Response formatting, seeds of several answers, model names and validation errors."""

import itertools

import pytest
from pydantic import ValidationError

from vila.core.errors import ConfigError
from vila.engine.sampling_params import TokenLogprob
from vila.serve.chat import LogprobFormatter, StreamTrimmer, sampling_params
from vila.serve.errors import validation_error
from vila.serve.models import Batching, Models, ServedModel, default_name
from vila.serve.schema import ChatRequest


@pytest.mark.parametrize("text", ["  a cat \n sat  ", "", "   ", "a", "a b", "\n\nx\n\ny\n"])
def test_trimmed_pieces_join_to_the_stripped_text(text):
    for cuts in itertools.product([0, 1], repeat=min(len(text), 12)):
        pieces, start = [], 0
        for place, cut in enumerate(cuts, start=1):
            if cut:
                pieces.append(text[start:place])
                start = place
        trim = StreamTrimmer()
        assert "".join(trim.push(piece) for piece in [*pieces, text[start:]]) == text.strip()


def test_token_text_depends_on_the_previous_token():
    # As a sentencepiece tokenizer does, the decoder takes the space off the first token of a text.
    words = {1: " a", 2: " cat", 3: "\N{REPLACEMENT CHARACTER}"}
    reports = LogprobFormatter(lambda ids: "".join(words[id_] for id_ in ids).removeprefix(" "), top=1)
    steps = [TokenLogprob(id_, -0.5, ((2, -0.5), (1, -1.0))) for id_ in (1, 2, 3)]
    reported = reports.push(steps[:1]) + reports.push(steps[1:])
    assert [token["token"] for token in reported] == ["a", " cat", "\N{REPLACEMENT CHARACTER}"]
    assert [token["bytes"] for token in reported] == [[97], list(b" cat"), None]
    assert [[top["token"] for top in token["top_logprobs"]] for token in reported] == [["cat"], [" cat"], [" cat"]]


def request(**changes):
    return ChatRequest(model="m", messages=[{"role": "user", "content": "x"}], **changes)


def test_choices_have_distinct_seeds_and_the_default_is_random():
    first = [sampling.seed for sampling in sampling_params(request(n=3, seed=5), 9)]
    assert first[0] == 5
    assert len({*first, *(sampling.seed for sampling in sampling_params(request(n=3, seed=6), 9))}) == 6
    assert sampling_params(request(seed=-1), 9)[0].seed == 2**63 - 1
    assert sampling_params(request(), 9) != sampling_params(request(), 9)


def test_duplicate_model_names_are_rejected():
    same = [ServedModel("a", lambda: None), ServedModel("a", lambda: None)]
    with pytest.raises(ConfigError) as caught:
        Models(same, Batching())
    assert (caught.value.field, caught.value.value) == ("--served-model-name", "a")


def test_default_name_is_that_of_the_directory_or_run(tmp_path):
    (tmp_path / "starter" / "model").mkdir(parents=True)
    assert default_name(str(tmp_path / "starter")) == "starter"
    assert default_name(str(tmp_path / "starter" / "model")) == "starter"
    assert default_name("owner/name") == "owner/name"


def test_validation_errors_are_truncated():
    problems = [{"type": "x", "loc": ("messages", number), "msg": "bad"} for number in range(15)]
    error = validation_error(problems)
    assert error.param == "messages[0]"
    assert error.message.count("bad") == 10
    assert "5 more" in error.message


def test_invalid_content_lists_both_accepted_types():
    with pytest.raises(ValidationError) as raised:
        ChatRequest(model="m", messages=[{"role": "user", "content": None}])
    error = validation_error(raised.value.errors())
    assert error.param == "messages[0].content"
    assert "string" in error.message and "list" in error.message


def test_model_names_are_valid_utf8(tmp_path):
    folder = tmp_path / "m\udcff"
    folder.mkdir()
    assert default_name(str(folder)) == "m?"
    with pytest.raises(ConfigError) as raised:
        Models([ServedModel("m\udcff", lambda: None)], Batching())
    assert raised.value.field == "--served-model-name"
