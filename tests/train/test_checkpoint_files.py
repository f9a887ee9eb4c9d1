"""Indexes and tensor files that were planted: refused with the file's name, and nothing of them is run."""

import os
import pickle
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.train.finish import sign
from vila.core.errors import CheckpointError
from vila.core.system import ProcessInfo
from vila.train.checkpoint import Checkpoint, CheckpointWriter, Progress, load_checkpoint
from vila.train.fsdp import World

WORLD = World(ProcessInfo(), torch.device("cpu"))
INDEX = "torch.distributed.checkpoint.metadata"


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of one tensor, `weight`, that counts from 0 to 5."""
    state = Checkpoint(Progress(step=1), [], {}, {})
    CheckpointWriter(tmp_path / "checkpoint", WORLD).save({"weight": torch.arange(6.0)}, state)
    return tmp_path / "checkpoint" / "step-00000001"


def load(folder):
    sign(folder)
    into = {"weight": torch.zeros(6)}
    load_checkpoint(folder.parent, WORLD).load_tensors(into, WORLD)
    return into["weight"].tolist()


def text(word):
    return pickle.SHORT_BINUNICODE + bytes([len(word)]) + word.encode()


def name(module, attribute):
    return text(module) + text(attribute) + pickle.STACK_GLOBAL


def program(*codes):
    return pickle.PROTO + b"\x04" + b"".join(codes) + pickle.STOP


def call(module, attribute, argument):
    return program(name(module, attribute), text(argument), pickle.TUPLE1, pickle.REDUCE)


class Call:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


def test_a_whole_index_is_read(folder):
    assert load(folder) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("module", "attribute"),
    [
        (os.system.__module__, "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        (INDEX, "os.system"),  # a name with dots, through a module that is allowed
        (INDEX, "Metadata.__init__.__globals__"),
        (INDEX, "BytesStorageMetadata"),
        ("torch.serialization", "load"),
        ("torch.serialization", "os.system"),
        ("torch.storage", "_load_from_bytes"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("pathlib", "Path.touch"),
        ("pathlib", "os.system"),
    ],
)
def test_an_index_that_asks_for_anything_else_is_refused(folder, tmp_path, module, attribute):
    mark = tmp_path / "ran"
    planted = call(module, attribute, f"touch {mark}" if "eval" not in attribute else f"open({str(mark)!r}, 'w')")
    if attribute.endswith(("system", "eval")):
        pickle.loads(planted)
        assert mark.exists()  # it would run
        mark.unlink()
    (folder / ".metadata").write_bytes(planted)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert not mark.exists()
    assert (caught.value.file, caught.value.value) == (str(folder / ".metadata"), f"{module}.{attribute}")


def test_a_call_that_is_hidden_in_a_good_index_is_refused(folder, tmp_path):
    index = dcp.FileSystemReader(folder).read_metadata()
    planted = replace(index, planner_data=[Call(os.system, f"touch {tmp_path / 'ran'}")])
    (folder / ".metadata").write_bytes(pickle.dumps(planted))
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert caught.value.value == "posix.system"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "planted",
    [
        b"",
        b"\xff" * 64,
        pickle.dumps({"weight": 1}),
        call("pathlib", "PosixPath", "/etc/passwd"),
        call(INDEX, "Metadata", "weight"),
        call(INDEX, "_MEM_FORMAT_ENCODING", "weight"),
        call("torch.serialization", "_get_layout", "posix.system"),
        program(text("weight"), pickle.BINPERSID),
        program(pickle.EMPTY_LIST * 100_000 + pickle.APPEND * 99_999),
        # These end the process, or take its memory, if they are not refused.
        program(pickle.EMPTY_DICT, pickle.EMPTY_TUPLE + pickle.TUPLE1 * 200_000, pickle.NONE + pickle.SETITEM),
        program(pickle.BYTEARRAY8 + (3_000_000_000).to_bytes(8, "little")),
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
    ids=lambda planted: str(len(planted)),
)
def test_hostile_arguments_and_garbage_are_refused(folder, planted):
    (folder / ".metadata").write_bytes(planted)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert caught.value.file == str(folder / ".metadata")


def test_an_entry_whose_hash_would_end_the_process_is_refused(folder):
    index = dcp.FileSystemReader(folder).read_metadata()
    place, info = next(iter(index.storage_data.items()))
    marker = "deep"
    index.storage_data = {replace(place, fqn=marker): info}
    deep = pickle.EMPTY_TUPLE + pickle.TUPLE1 * 200_000
    (folder / ".metadata").write_bytes(pickle.dumps(index, 2).replace(b"X\x04\0\0\0deep", deep))
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert caught.value.value == "a MetadataIndex as key"


@pytest.mark.parametrize(
    "target", [(INDEX, "Metadata"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath")], ids=str
)
def test_an_index_that_changes_what_the_process_shares_is_refused(folder, target):
    attributes = pickle.EMPTY_DICT + text("planted") + text("1") + pickle.SETITEM
    planted = program(name(*target), pickle.NONE + attributes + pickle.TUPLE2, pickle.BUILD)
    changed = pickle.loads(planted)
    assert changed.planted == "1"  # it would change it
    del changed.planted
    (folder / ".metadata").write_bytes(planted)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert caught.value.value.startswith("attributes of ")
    assert not hasattr(changed, "planted")


def test_a_value_that_is_not_a_tensor_is_refused(folder, tmp_path):
    # Read by torch itself such a value is unpickled without restriction.
    value = Call(os.system, f"touch {tmp_path / 'ran'}")
    dcp.save({"weight": value}, checkpoint_id=folder, no_dist=True)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert caught.value.value.endswith("BytesStorageMetadata")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", ["../../secret", "/etc/passwd", "link"])
def test_files_outside_of_the_checkpoint_are_not_read(folder, tmp_path, path):
    (tmp_path / "secret").write_bytes(next(folder.glob("*.distcp")).read_bytes())
    (folder / "link").symlink_to(tmp_path / "secret")
    change_storage(folder, relative_path=path)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert caught.value.file == str(folder / ".metadata")
    assert path in caught.value.problem


@pytest.mark.parametrize(
    "change", [{"transform_descriptors": ["zstd"]}, {"relative_path": 3}, {"offset": None}, {"length": "3"}]
)
def test_other_kinds_of_storage_are_refused(folder, change):
    change_storage(folder, **change)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert caught.value.file == str(folder / ".metadata")


@pytest.mark.parametrize("change", [{"offset": 10**9}, {"length": 3}, {"offset": -5}, {"length": 10**15}])
def test_entries_without_a_tensor_are_refused(folder, change):
    change_storage(folder, **change)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert caught.value.file == str(folder)


def change_storage(folder, **changes):
    index = dcp.FileSystemReader(folder).read_metadata()
    index.storage_data = {place: replace(info, **changes) for place, info in index.storage_data.items()}
    (folder / ".metadata").write_bytes(pickle.dumps(index))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_program_in_place_of_tensors_is_not_run(folder, tmp_path, protocol):
    planted = pickle.dumps(Call(os.system, f"touch {tmp_path / 'ran'}"), protocol)
    file = next(folder.glob("*.distcp"))
    file.write_bytes(planted.ljust(file.stat().st_size, b"\0"))
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert caught.value.file == str(folder)
    assert not (tmp_path / "ran").exists()


def test_a_saved_object_in_place_of_tensors_is_not_run(folder, tmp_path):
    file = next(folder.glob("*.distcp"))
    torch.save(Call(os.system, f"touch {tmp_path / 'ran'}"), file)
    change_storage(folder, length=file.stat().st_size)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert caught.value.file == str(folder)
    assert not (tmp_path / "ran").exists()
