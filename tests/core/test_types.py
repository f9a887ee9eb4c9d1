"""Messages and samples, registries, tasks, and the lazy imports of the package."""

import subprocess
import sys

import pytest

import vila
from vila.core.errors import UnknownNameError
from vila.core.progress import SILENT, task
from vila.core.registry import Registry
from vila.core.types import Image, Message, Sample, Text, join_messages


def test_joining_merges_neighbours_of_equal_role():
    image = Image(b"x")
    joined = join_messages((Message.of("user", image),), (Message.of("user", "q"), Message.of("assistant", "a")))
    assert joined == (Message.of("user", image, "q"), Message.of("assistant", "a"))


def test_a_sample_has_one_conversation_per_branch():
    branches = ((Message.of("user", "1"),), (Message.of("user", "2"),))
    sample = Sample("s", (Message.of("user", "0 "),), branches)
    assert [m[0].text for m in sample.conversations()] == ["0 1", "0 2"]
    assert [m[0].text for m in Sample("s", (Message.of("user", "0"),)).conversations()] == ["0"]


def test_equal_images_have_equal_keys_whatever_their_source(tmp_path):
    (tmp_path / "a.png").write_bytes(b"bytes")
    assert Image(tmp_path / "a.png").key() == Image(b"bytes").key() != Image(b"other").key()


def test_plain_strings_become_text_parts():
    assert Message.of("user", "a").parts == (Text("a"),)


def test_importing_vila_imports_no_torch():
    code = "import vila, sys; vila.Message; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_vila_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError):
        vila.nothing  # noqa: B018


def test_a_registry_imports_late_and_suggests_near_names():
    registry = Registry("thing", {"math": "math:pi", "missing": "no_such_module:x"})
    assert registry["math"] > 3
    with pytest.raises(UnknownNameError) as caught:
        registry["maths"]
    assert (caught.value.kind, caught.value.name, caught.value.near) == ("thing", "maths", ["math"])


def test_a_task_reports_how_it_ended():
    outcomes = []

    class Listener(type(SILENT)):
        def finished(self, task, outcome="done"):
            outcomes.append((task, outcome))

    with task(Listener(), "whole"):
        pass
    with pytest.raises(ValueError), task(Listener(), "broken"):
        raise ValueError
    with pytest.raises(KeyboardInterrupt), task(Listener(), "interrupted"):
        raise KeyboardInterrupt
    assert outcomes == [("whole", "done"), ("broken", "failed"), ("interrupted", "stopped")]
