"""Pickles are programs: only those that make plain values are read, and nothing of the others runs."""

import datetime
import os
import pickle
import struct
from collections import OrderedDict

import numpy as np
import pytest

from vila.core.errors import DataError
from vila.prepare.unpickle import read_plain_pickle

PLAIN = [{"a": [1, -2.5, None, True, "x" * 300, b"\0\xff", (1, 2, 3, 4), (), {}, []], "big": 2**80, "e": "\u00e9"}] * 3


class Trap:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_values_are_read_as_pickle_reads_them(tmp_path, protocol):
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
def test_anything_else_is_refused_by_name_and_nothing_runs(tmp_path, monkeypatch, value, name, protocol):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps([1, {"a": value}], protocol))
    if name == "EMPTY_SET" and protocol < 4:
        name = "set"
    elif protocol < 3:
        name = name.replace("builtins.", "__builtin__.")
    with pytest.raises(DataError, match=r"x\.pkl: .*" + name.replace(".", r"\.")):
        read_plain_pickle(tmp_path / "x.pkl")
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("content, message", [
    (b"cos\nsystem\n(S'touch RAN'\ntR.", "asks for 'os.system'"),
    (b"(S'touch RAN'\nios\nsystem\n.", "asks for 'os.system'"),
    (b"Pid\n.", "instruction PERSID"), (b"\x82\x01.", "instruction EXT1"), (b"]}b.", "instruction BUILD"),
    (b"]r" + struct.pack("<I", 2**31) + b".", "stores a value under number 2147483648"),
    (b"\x8e" + struct.pack("<Q", 2**60) + b"x.", "not a whole pickle"),
    (pickle.dumps(PLAIN)[:-40], "not a whole pickle"), (b"", "not a whole pickle"),
    (b"\x01hello", "not a whole pickle"),
    (b"0.", "not a plain pickle"), (b"(.", "not a plain pickle"),
])  # fmt: skip
def test_traps_and_cut_files_are_refused(tmp_path, content, message):
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_plain_pickle(tmp_path / "x.pkl")


def test_what_contains_itself_or_multiplies_is_refused(tmp_path):
    endless: list = []
    endless.append(endless)
    doubled: list = []
    for _ in range(60):
        doubled = [doubled, doubled]
    for value in (endless, doubled):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(value))
        with pytest.raises(DataError, match="refused"):
            read_plain_pickle(tmp_path / "x.pkl")
