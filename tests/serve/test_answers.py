"""Pieces of answers: white space around them, tokens as text, sampling_params of several answers."""

import itertools

import pytest
from pydantic import ValidationError

from vila.core.errors import ConfigError
from vila.engine.request import TokenLogprob
from vila.serve.chat import LogprobFormatter, StreamTrimmer, sampling_params
from vila.serve.errors import validation_error
from vila.serve.models import Batching, Models, ServedModel, default_name
from vila.serve.schema import ChatRequest


@pytest.mark.parametrize("text", ["  a cat \n sat  ", "", "   ", "a", "a b", "\n\nx\n\ny\n"])
def test_trimmed_pieces_are_the_stripped_text_however_it_is_cut(text):
    for cuts in itertools.product([0, 1], repeat=min(len(text), 12)):
        pieces, start = [], 0
        for place, cut in enumerate(cuts, start=1):
            if cut:
                pieces.append(text[start:place])
                start = place
        trim = StreamTrimmer()
        assert "".join(trim.push(piece) for piece in [*pieces, text[start:]]) == text.strip()


def test_a_token_is_shown_as_it_stands_behind_the_one_before_it():
    # As a sentencepiece tokenizer does, the decoder takes the space off the first token of a text.
    words = {1: " a", 2: " cat", 3: "\N{REPLACEMENT CHARACTER}"}
    reports = LogprobFormatter(lambda ids: "".join(words[id_] for id_ in ids).removeprefix(" "), top=1)
    steps = [TokenLogprob(id_, -0.5, ((2, -0.5), (1, -1.0))) for id_ in (1, 2, 3)]
    told = reports.push(steps[:1]) + reports.push(steps[1:])
    assert [token["token"] for token in told] == ["a", " cat", "\N{REPLACEMENT CHARACTER}"]
    assert [token["bytes"] for token in told] == [[97], list(b" cat"), None]
    assert [[top["token"] for top in token["top_logprobs"]] for token in told] == [["cat"], [" cat"], [" cat"]]


def request(**changes):
    return ChatRequest(model="m", messages=[{"role": "user", "content": "x"}], **changes)


def test_several_answers_have_seeds_of_their_own_and_none_given_is_random():
    first = [sampling.seed for sampling in sampling_params(request(n=3, seed=5), 9)]
    assert first[0] == 5
    assert len({*first, *(sampling.seed for sampling in sampling_params(request(n=3, seed=6), 9))}) == 6
    assert sampling_params(request(seed=-1), 9)[0].seed == 2**63 - 1
    assert sampling_params(request(), 9) != sampling_params(request(), 9)


def test_two_models_of_one_name_are_refused():
    same = [ServedModel("a", lambda: None), ServedModel("a", lambda: None)]
    with pytest.raises(ConfigError) as caught:
        Models(same, Batching())
    assert (caught.value.field, caught.value.value) == ("--served-model-name", "a")


def test_a_directory_gives_its_name_or_that_of_the_run(tmp_path):
    (tmp_path / "starter" / "model").mkdir(parents=True)
    assert default_name(str(tmp_path / "starter")) == "starter"
    assert default_name(str(tmp_path / "starter" / "model")) == "starter"
    assert default_name("owner/name") == "owner/name"


def test_many_problems_are_not_all_told():
    problems = [{"type": "x", "loc": ("messages", number), "msg": "bad"} for number in range(15)]
    error = validation_error(problems)
    assert error.param == "messages[0]"
    assert error.message.count("bad") == 10
    assert "5 more" in error.message


def test_content_of_another_kind_is_told_both_that_there_are():
    with pytest.raises(ValidationError) as raised:
        ChatRequest(model="m", messages=[{"role": "user", "content": None}])
    error = validation_error(raised.value.errors())
    assert error.param == "messages[0].content"
    assert "string" in error.message and "list" in error.message


def test_names_of_models_can_be_written_in_json(tmp_path):
    folder = tmp_path / "m\udcff"
    folder.mkdir()
    assert default_name(str(folder)) == "m?"
    with pytest.raises(ConfigError) as raised:
        Models([ServedModel("m\udcff", lambda: None)], Batching())
    assert raised.value.field == "--served-model-name"
