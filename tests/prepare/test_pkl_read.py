"""Only pickles of plain values are read; no code of any pickle is executed."""

import datetime
import os
import pickle
import struct
from collections import OrderedDict

import numpy as np
import pytest

from vila.core.errors import DataError
from vila.prepare.pkl import read_plain_pickle

PLAIN = [{"a": [1, -2.5, None, True, "x" * 300, b"\0\xff", (1, 2, 3, 4), (), {}, []], "big": 2**80, "e": "\u00e9"}] * 3


class Trap:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_values_equal_those_of_pickle(tmp_path, protocol):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(PLAIN, protocol))
    assert read_plain_pickle(path) == PLAIN


@pytest.mark.parametrize("value, name", [
    (Trap(os.system, "touch RAN"), "posix.system"), (Trap(eval, "open('RAN', 'w')"), "builtins.eval"),
    (Trap(getattr, [], "append"), "builtins.getattr"), (OrderedDict(a=1), "collections.OrderedDict"),
    (datetime.date(2024, 1, 1), "datetime.date"), (np.zeros(2), "numpy"), ({1, 2}, "EMPTY_SET"),
    (3j, "builtins.complex"),
])  # fmt: skip
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_other_types_are_refused_by_name_and_not_executed(tmp_path, monkeypatch, value, name, protocol):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps([1, {"a": value}], protocol))
    if name == "EMPTY_SET" and protocol < 4:
        name = "set"
    elif protocol < 3:
        name = name.replace("builtins.", "__builtin__.")
    with pytest.raises(DataError) as caught:
        read_plain_pickle(tmp_path / "x.pkl")
    assert caught.value.file == str(tmp_path / "x.pkl")
    assert name in caught.value.value
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("content, request_", [
    (b"cos\nsystem\n(S'touch RAN'\ntR.", "os.system"),
    (b"(S'touch RAN'\nios\nsystem\n.", "instruction INST"),
    (b"Pid\n.", "instruction PERSID"), (b"\x82\x01.", "instruction EXT1"), (b"]}b.", "attributes of builtins.list"),
    (b"}" + b")" + b"\x85" * 10 + b"Ns.", "a tuple as key"),
])  # fmt: skip
def test_malicious_pickles_are_refused_by_name(tmp_path, content, request_):
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_plain_pickle(tmp_path / "x.pkl")
    assert caught.value.value == request_


@pytest.mark.parametrize("content", [
    b"\x8e" + struct.pack("<Q", 2**60) + b"x.", pickle.dumps(PLAIN)[:-40], b"", b"\x01hello", b"0.", b"(.",
    pickle.dumps(PLAIN) + b"x", b"version https://git-lfs.github.com/spec/v1\n",
])  # fmt: skip
def test_truncated_and_foreign_files_are_refused_by_name(tmp_path, content):
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_plain_pickle(tmp_path / "x.pkl")
    assert caught.value.file == str(tmp_path / "x.pkl")
    assert caught.value.hint


def test_recursive_and_exponentially_large_values_are_refused(tmp_path):
    endless: list = []
    endless.append(endless)
    doubled: list = []
    for _ in range(60):
        doubled = [doubled, doubled]
    for value in (endless, doubled):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(value))
        with pytest.raises(DataError) as caught:
            read_plain_pickle(tmp_path / "x.pkl")
        assert caught.value.file == str(tmp_path / "x.pkl") and caught.value.expected
