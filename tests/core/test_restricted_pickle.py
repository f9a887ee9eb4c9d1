"""Restricted unpickling: plain values come back, and memory stays in proportion to the content."""

import io
import pickle
import struct
import tracemalloc
from collections import OrderedDict

import pytest

from vila.core import restricted_pickle
from vila.core.errors import LayoutError
from vila.core.restricted_pickle import (
    ForbiddenPickleError,
    RestrictedUnpickler,
    load_restricted,
    parse_plain_pickle,
)

PLAIN = {"a": [1, -2.5, None, True, "x" * 300, b"\0\xff", (1, 2, 3, 4), (), {}, []], "b": bytearray(9), "c": 2**80}


def load(content, names=None):
    return RestrictedUnpickler(io.BytesIO(content), names).load()


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_values_come_back(protocol):
    names = {("builtins", "bytearray"): bytearray, ("_codecs", "encode"): str.encode}
    assert load(pickle.dumps([PLAIN] * 2, protocol), names) == [PLAIN] * 2


def test_a_listed_name_refers_to_the_given_object():
    assert load(pickle.dumps(OrderedDict(a=1)), {("collections", "OrderedDict"): dict}) == {"a": 1}


class Bomb:
    """Pickled as a call that allocates 3 GB."""

    def __reduce__(self):
        return bytearray, (3_000_000_000,)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Bomb()),
        b"\x96" + struct.pack("<Q", 3_000_000_000) + b".",  # BYTEARRAY8
        b"\x8e" + struct.pack("<Q", 3_000_000_000) + b".",  # BINBYTES8
        b"\x80\x04\x95" + struct.pack("<Q", 3_000_000_000) + b".",  # FRAME
        b"]r\xff\xff\xff\xff" * 2,  # memo entry 4 billion, which the unpickler in C makes room for
        b"}" + b")" + b"\x85" * 200_000 + b"Ns.",  # a key whose hash overflows the stack of the process
    ],
    ids=["call", "bytearray", "bytes", "frame", "memo", "key"],
)
def test_nothing_is_allocated_for_a_hostile_pickle(content):
    tracemalloc.start()
    with pytest.raises(LayoutError):
        parse_plain_pickle(content, file="x", error=LayoutError)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000_000


@pytest.mark.parametrize("content", [b"]" * 50, b"N" + b"\x94" * 50, b"}" * 50], ids=["lists", "memo", "dictionaries"])
def test_the_number_of_objects_is_bounded(monkeypatch, content):
    monkeypatch.setattr(restricted_pickle, "MAX_OBJECTS", 40)
    with pytest.raises(ForbiddenPickleError):
        load(content + b".")


def test_unclosed_markers_are_errors():
    with pytest.raises(ForbiddenPickleError):
        load(b"(" * 20_000 + b".")


@pytest.mark.parametrize("target", ["builtins.dict", "builtins.object"])
def test_attributes_are_not_set(target):
    kind = getattr(__import__("builtins"), target.partition(".")[2])
    content = f"c{target.replace('.', chr(10))}\n}}X\x01\x00\x00\x00aNsb.".encode()
    with pytest.raises(ForbiddenPickleError) as caught:
        load(content, {("builtins", kind.__name__): kind})
    assert caught.value.request == f"attributes of {target}"


def test_the_error_names_file_and_request():
    with pytest.raises(LayoutError) as caught:
        load_restricted(RestrictedUnpickler(io.BytesIO(b"cos\nsystem\n.")), file="x.bin", error=LayoutError)
    assert (caught.value.file, caught.value.value) == ("x.bin", "os.system")


def test_bytes_behind_the_end_are_refused():
    assert parse_plain_pickle(pickle.dumps(1), file="x", error=LayoutError) == 1
    with pytest.raises(LayoutError):
        parse_plain_pickle(pickle.dumps(1) + b"x", file="x", error=LayoutError)
