"""Settings: every impossible field is named at once, and one string is a list of one."""

import pytest

from vila.core.errors import ConfigError
from vila.engine.sampling_params import SamplingParams, choose_sampling

IMPOSSIBLE = [
    {"max_new_tokens": 0},
    {"max_new_tokens": 2.5},
    {"max_new_tokens": True},
    {"temperature": -1.0},
    {"temperature": float("nan")},
    {"temperature": float("inf")},
    {"temperature": 1e-9},
    {"temperature": "0.2"},
    {"top_k": -1},
    {"top_k": 1.0},
    {"top_p": 0.0},
    {"top_p": 1.1},
    {"min_p": -0.1},
    {"min_p": 2},
    {"repetition_penalty": 0},
    {"stop": ("a", "")},
    {"stop": (1,)},
    {"logprobs": -1},
    {"seed": -1},
    {"seed": 2**63},
    {"overlong": "cut"},
]


@pytest.mark.parametrize("facts", IMPOSSIBLE, ids=str)
def test_an_impossible_setting_is_refused_with_its_value(facts):
    (name, value), *_ = facts.items()
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**facts)
    assert f"sampling: {name}={value!r}" in str(caught.value)


def test_all_problems_are_named_at_once():
    with pytest.raises(ConfigError, match=r"3 problems\n.*temperature=-1.*\n.*top_k=-2.*\n.*overlong='no'"):
        SamplingParams(temperature=-1, top_k=-2, overlong="no")


def test_the_borders_are_possible():
    SamplingParams(max_new_tokens=1, temperature=1, top_k=1, top_p=1, min_p=1, repetition_penalty=0.5, seed=2**63 - 1)


@pytest.mark.parametrize(("given", "kept"), [("ab", ("ab",)), (["a", "b"], ("a", "b")), ((), ())])
def test_stop_is_one_string_or_several(given, kept):
    assert SamplingParams(stop=given).stop == kept


def test_options_make_a_sampling_and_a_typo_is_named():
    assert choose_sampling(None, {"top_k": 3}) == SamplingParams(top_k=3)
    assert choose_sampling(SamplingParams(top_k=3), {}) == SamplingParams(top_k=3)
    with pytest.raises(ConfigError, match="'max_new_token'.*'max_new_tokens'"):
        choose_sampling(None, {"max_new_token": 3})
    with pytest.raises(ConfigError, match="'zzz'.* max_new_tokens, temperature, "):
        choose_sampling(None, {"zzz": 3})
    with pytest.raises(ConfigError, match="top_k, seed"):
        choose_sampling(SamplingParams(), {"top_k": 3, "seed": 1})
