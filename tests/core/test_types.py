"""Messages, samples and the lazy package."""

import subprocess
import sys

import pytest

import vila
from vila.core.errors import ConfigError, UnknownNameError
from vila.core.progress import SILENT, task
from vila.core.registry import Registry
from vila.core.types import Image, Message, Sample, Text, join_messages


def test_messages_of_equal_roles_join_at_the_seam():
    picture = Image(b"x")
    joined = join_messages((Message.of("user", picture),), (Message.of("user", "q"), Message.of("assistant", "a")))
    assert joined == (Message.of("user", picture, "q"), Message.of("assistant", "a"))


def test_a_sample_gives_one_conversation_a_branch():
    branches = ((Message.of("user", "1"),), (Message.of("user", "2"),))
    sample = Sample("s", (Message.of("user", "0 "),), branches)
    assert [m[0].text for m in sample.conversations()] == ["0 1", "0 2"]
    assert [m[0].text for m in Sample("s", (Message.of("user", "0"),)).conversations()] == ["0"]


def test_equal_pictures_have_equal_keys_wherever_they_lie(tmp_path):
    (tmp_path / "a.png").write_bytes(b"bytes")
    assert Image(tmp_path / "a.png").key() == Image(b"bytes").key() != Image(b"other").key()


def test_plain_strings_become_text_parts():
    assert Message.of("user", "a").parts == (Text("a"),)


def test_importing_vila_imports_no_torch():
    code = "import vila, sys; vila.Message; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_vila_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'vila' has no attribute 'nothing'"):
        vila.nothing  # noqa: B018


def test_problems_are_collected_into_one_message():
    assert str(ConfigError.collect("r.yaml", ["one"])) == "r.yaml: one"
    assert str(ConfigError.collect("r.yaml", ["one", "two"])) == "r.yaml: 2 problems\n  - one\n  - two"


def test_a_registry_imports_late_and_suggests_near_names():
    registry = Registry("thing", {"math": "math:pi", "missing": "no_such_module:x"})
    assert registry["math"] > 3
    with pytest.raises(UnknownNameError, match="unknown thing 'maths'; did you mean 'math'"):
        registry["maths"]


def test_a_task_is_finished_also_when_its_body_raises():
    seen = []

    class Listener(type(SILENT)):
        def finished(self, task, summary=""):
            seen.append(task)

    with pytest.raises(ValueError), task(Listener(), "work"):
        raise ValueError
    assert seen == ["work"]
