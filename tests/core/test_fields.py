"""Values of JSON objects: each accessor gives the value, or an error with file, field, value and what is accepted."""

import json

import pytest

from vila.core.errors import MISSING, DataError, LayoutError
from vila.core.reading import Fields

SOUND = {"int": 3, "float": 0.5, "flag": True, "text": "a", "list": [1, 2.5], "names": ["a"], "object": {"in": 1}}


def fields(values):
    return Fields(values, "config.json", error=LayoutError)


def test_sound_values_are_returned_as_they_are():
    sound = fields(SOUND)
    assert sound.integer("int", minimum=1) == 3
    assert sound.number("float") == 0.5
    assert sound.number("int") == 3
    assert sound.numbers("list", length=2) == (1, 2.5)
    assert sound.flag("flag") is True
    assert sound.text("text", choices=("a", "b")) == "a"
    assert sound.texts("names") == ["a"]
    assert sound.section("object").integer("in") == 1
    assert dict(sound) == SOUND


@pytest.mark.parametrize("values", [{}, {"x": None}])
def test_absent_and_null_values_take_the_default(values):
    empty = fields(values)
    assert empty.integer("x", 7) == 7
    assert empty.number("x", None) is None
    assert empty.numbers("x", (1.0,), length=1) == (1.0,)
    assert empty.flag("x", False) is False
    assert empty.text("x", "") == ""
    assert empty.texts("x", ()) == ()
    assert dict(empty.section("x")) == {}


@pytest.mark.parametrize(
    ("read", "wrong"),
    [
        (lambda f: f.integer("x", minimum=1, maximum=9), [[], {}, "x", -1, 0, 10, 1e30, 2.0, True, float("nan")]),
        (lambda f: f.number("x", maximum=9), [[], {}, "x", -1, 10, 1e30, True, float("nan"), float("inf")]),
        (lambda f: f.numbers("x", length=2), [[], {}, "x", 1, [1], [1, 2, 3], [1, None], [1, True], [1, -1]]),
        (lambda f: f.flag("x"), [[], {}, "x", 0, 1]),
        (lambda f: f.text("x"), [[], {}, 0, True]),
        (lambda f: f.text("x", choices=("a",)), ["x", [], 0]),
        (lambda f: f.texts("x"), [{}, "x", [1], [None]]),
        (lambda f: f.section("x"), [[], "x", 0, True]),
    ],
)
def test_other_values_are_refused_with_file_field_and_value(read, wrong):
    for value in wrong:
        with pytest.raises(LayoutError) as caught:
            read(fields({"x": value}))
        error = caught.value
        assert (error.file, error.field) == ("config.json", "x")
        assert error.value is value
        assert error.expected


def test_a_value_inside_an_object_has_a_dotted_field():
    with pytest.raises(LayoutError) as caught:
        fields({"text_config": {"rope": {"factor": "x"}}}).section("text_config").section("rope").number("factor")
    assert caught.value.field == "text_config.rope.factor"


def test_a_value_without_a_default_must_be_there():
    for values, value in (({}, MISSING), ({"x": None}, None)):
        with pytest.raises(LayoutError) as caught:
            fields(values).integer("x")
        assert caught.value.value is value


def test_a_file_is_an_object(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SOUND))
    assert Fields.of_file(file).integer("int") == 3
    file.write_text("[1]")
    with pytest.raises(DataError) as caught:
        Fields.of_file(file)
    assert caught.value.file == str(file)
