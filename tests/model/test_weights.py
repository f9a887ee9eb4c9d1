"""Weight files that are damaged, hostile or something else: an error with the file's name, and no allocation."""

import io
import json
import pickle
import struct
import tracemalloc
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from vila.core.errors import LayoutError
from vila.model.dtypes import FLOAT32
from vila.model.layouts.base import keep_rows, split_qkv
from vila.model.loading import load_model, save_model
from vila.model.pytorch_bin import read_torch_file
from vila.model.weights import SafetensorsFile, TorchFile, find_weight_files, list_tensors, open_weight_file

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1234567\n"
TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.tensor(3)}


def error_of(file):
    """The error of reading a file; nothing larger than 50 MB is allocated on the way."""
    tracemalloc.start()
    with pytest.raises(LayoutError) as caught:
        dict(open_weight_file(file).tensor_specs)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000_000
    assert caught.value.file == str(file)
    return caught.value


class TestTorchFiles:
    @pytest.mark.parametrize("zipped", [True, False])
    def test_tensors_are_those_of_torch(self, tmp_path, zipped):
        shared = torch.arange(20, dtype=torch.int32)
        state = torch.nn.Linear(2, 3).state_dict()  # an OrderedDict with attributes
        state |= {"view": shared[4:12:2], "turned": TENSORS["a.weight"].t(), "empty": torch.zeros(0, 3), **TENSORS}
        state["parameter"] = torch.nn.Parameter(torch.ones(2))
        torch.save(state, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
        file = TorchFile(tmp_path / "x.bin")
        assert list(file.tensor_specs) == list(state)
        with file.open() as get:
            for name, tensor in state.items():
                shape, dtype = file.tensor_specs[name]
                assert (shape, dtype.torch) == (tuple(tensor.shape), tensor.dtype)
                assert torch.equal(get(name), tensor)
        assert file.is_mapped or not zipped

    def test_changes_of_a_mapped_tensor_stay_in_memory(self, tmp_path):
        torch.save(TENSORS, tmp_path / "x.bin")
        with TorchFile(tmp_path / "x.bin").open() as get:
            get("a.weight").add_(1)
        assert torch.equal(torch.load(tmp_path / "x.bin")["a.weight"], TENSORS["a.weight"])

    @pytest.mark.parametrize(
        "content",
        [b"", POINTER, b"hello", b"\0" * 99, b"PK\x03\x04 cut", b"\x80\x02", b"<html>", pickle.dumps(TENSORS)],
    )
    def test_other_files(self, tmp_path, content):
        (tmp_path / "x.bin").write_bytes(content)
        error_of(tmp_path / "x.bin")

    def test_a_git_lfs_pointer_names_the_command(self, tmp_path):
        for name in ("x.bin", "x.pt", "x.safetensors"):
            (tmp_path / name).write_bytes(POINTER)
            assert "git lfs pull" in error_of(tmp_path / name).hint

    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_cut_or_longer_file(self, tmp_path, zipped):
        torch.save(TENSORS, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
        whole = (tmp_path / "x.bin").read_bytes()
        for content in (whole[:-9], whole[:200], whole[200:], whole + b"x", whole + b"more" * 20):
            (tmp_path / "x.bin").write_bytes(content)
            error_of(tmp_path / "x.bin")


def number(value):
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def stored(elements=16, shape=(4, 4), stride=(4, 1), key="0", offset=0):
    """Instructions that build a float32 tensor."""
    storage = (
        b"(" + text("storage") + named("torch", "FloatStorage") + text(key) + text("cpu") + number(elements) + b"tQ"
    )
    sizes = b"".join(b"(" + b"".join(map(number, one)) + b"t" for one in (shape, stride))
    hooks = named("collections", "OrderedDict") + b")R"
    return (
        named("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + number(offset) + sizes + b"\x89" + hooks + b"tR"
    )


def archive(path, value, members=(("data/0", b"\0" * 64),), compression=zipfile.ZIP_STORED):
    """A file like those of torch.save with {"w": value}."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", b"\x80\x02}" + text("w") + value + b"s.")
        for name, content in members:
            file.writestr(f"archive/{name}", content)
    return path


class TestMaliciousTorchFiles:
    def test_a_valid_file_is_read(self, tmp_path):
        assert open_weight_file(archive(tmp_path / "x.bin", stored())).tensor_specs == {"w": ((4, 4), FLOAT32)}

    @pytest.mark.parametrize(
        "value",
        [
            named("builtins", "bytearray") + b"(" + number(3_000_000_000) + b"tR",
            stored(shape=(10**9,), stride=(1,)),
            stored(elements=10**9, shape=(10**9,), stride=(1,)),
            stored(shape=(10**12,), stride=(0,)),
            stored(offset=1),
            stored(stride=(5, 1)),
            stored(stride=(-4, 1)),
            stored(shape=(4,)),
            stored(shape=(0, 2**62), stride=(2**62, 1)),
            stored(shape=(1,) * 99, stride=(1,) * 99),
            stored(key="1"),
            named("torch._utils", "_rebuild_meta_tensor_no_storage") + b")R",
            named("torch", "Tensor") + b")R",
        ],
        ids=lambda value: str(len(value)),
    )
    def test_tensors_larger_than_the_file(self, tmp_path, value):
        error_of(archive(tmp_path / "x.bin", value))

    def test_compressed_members(self, tmp_path):
        with_bomb = (("data/0", b"\0" * 10_000_000),)
        file = archive(tmp_path / "x.bin", stored(2_500_000, (2_500_000,), (1,)), with_bomb, zipfile.ZIP_DEFLATED)
        assert file.stat().st_size < 20_000
        assert error_of(file).field

    @pytest.mark.parametrize(
        "members",
        [(), (("data/0", b"\0" * 60),), (("data/0", b"\0" * 64), ("byteorder", b"big")),
         (("data/0", b"\0" * 64), ("constants.pkl", b"]."))],
    )  # fmt: skip
    def test_members_outside_the_file(self, tmp_path, members):
        error_of(archive(tmp_path / "x.bin", stored(), members))

    @pytest.mark.parametrize("stated", [8, 4_000_000_000_000_000_000])
    def test_legacy_storages_with_wrong_sizes(self, tmp_path, stated):
        torch.save({"w": torch.ones(7)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
        content = (tmp_path / "x.bin").read_bytes()
        honest = (7).to_bytes(8, "little") + torch.ones(7).numpy().tobytes()
        assert content.endswith(honest)
        (tmp_path / "x.bin").write_bytes(content.replace(honest, stated.to_bytes(8, "little") + honest[8:]))
        error_of(tmp_path / "x.bin")


def header(entries, data=b"\0" * 64, size=None):
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(raw) if size is None else size) + raw + data


def entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 99,
        header({}, size=2**40),
        header({}, size=2**63 + 1),
        header(b"[1]"),
        header(b"{bad"),
        header(b'{"a":' + b"[" * 100_000),
        header({"a": None}),
        header({"a": entry(0, 16, [4]), "b": entry(0, 64, [16])}),
        header({"a": entry(0, 16, [4]), "b": entry(32, 64, [8])}),
        header({"a": entry(0, 400, [100])}),
        header({"a": entry(64, 0, [16])}),
        header({"a": entry(0, 64, [-16])}),
        header({"a": entry(0, 64, [15])}),
        header({"a": entry(0, 64, [2**40, 2**40])}),
        header({"a": entry(0, 64, [64], "F8_E4M3")}),
        header({"a": entry(0, 64, [16], "Q4")}),
        header({"a": entry(0, 64, [16])}, b"\0" * 65),
        header({"a": entry(0, 64, [16])}, b"\0" * 63),
    ],
    ids=lambda content: str(len(content)),
)
def test_damaged_headers_of_safetensors(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    error_of(tmp_path / "x.safetensors")


def test_a_tensor_in_two_files_is_named(tmp_path):
    for name in ("a", "b"):
        save_file({"w": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(LayoutError) as caught:
        list_tensors([SafetensorsFile(tmp_path / f"{name}.safetensors") for name in ("a", "b")])
    assert (caught.value.file, caught.value.field) == (str(tmp_path / "b.safetensors"), "w")


class TestRows:
    def piece(self, tmp_path, tensor):
        save_file({"w": tensor}, tmp_path / "x.safetensors")
        return list_tensors([SafetensorsFile(tmp_path / "x.safetensors")])["w"]

    @pytest.mark.parametrize("shape", [(), (7, 2)])
    def test_rows_that_are_not_a_multiple_of_three(self, tmp_path, shape):
        with pytest.raises(LayoutError) as caught:
            split_qkv(self.piece(tmp_path, torch.zeros(shape)), 0)
        assert (caught.value.field, caught.value.value) == ("w", list(shape))

    @pytest.mark.parametrize("shape", [(), (7, 2)])
    def test_fewer_rows_than_requested(self, tmp_path, shape):
        with pytest.raises(LayoutError) as caught:
            keep_rows(self.piece(tmp_path, torch.zeros(shape)), 8)
        assert (caught.value.field, caught.value.value) == ("w", list(shape))


class TestIndexes:
    INDEX = "model.safetensors.index.json"

    @pytest.fixture
    def folder(self, tmp_path):
        """Two shards and their index."""
        where = tmp_path / "model"
        where.mkdir()
        save_file({"a": torch.ones(1)}, where / "model-00001-of-00002.safetensors")
        save_file({"b": torch.ones(1)}, where / "model-00002-of-00002.safetensors")
        self.write(where, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
        return where

    def write(self, folder, weight_map):
        (folder / self.INDEX).write_text(json.dumps({"weight_map": weight_map}))

    def refused(self, folder):
        with pytest.raises(LayoutError) as caught:
            find_weight_files(folder)
        return caught.value

    def test_its_shards_are_found(self, folder):
        assert sorted(list_tensors(find_weight_files(folder))) == ["a", "b"]

    @pytest.mark.parametrize("weight_map", [None, [], {}, "x", {"a": 3}, {"a": None}, {"a": ["x"]}, {"a": {}}])
    def test_a_map_of_another_type(self, folder, weight_map):
        self.write(folder, weight_map)
        error = self.refused(folder)
        assert error.file == str(folder / self.INDEX)
        assert error.field.startswith("weight_map")

    @pytest.mark.parametrize("content", [b"", b"[]", b"3", b"{", POINTER, b"\xff\xfe{\0}\0", b'{"weight_map":' * 9999])
    def test_a_file_that_is_no_index(self, folder, content):
        (folder / self.INDEX).write_bytes(content)
        assert self.refused(folder).file == str(folder / self.INDEX)

    @pytest.mark.parametrize(
        "name", ["../secret.safetensors", "/etc/passwd", "..", "", ".", "a\\b", "a/b", "a\0", "x" * 300]
    )
    def test_a_name_that_is_not_a_file_next_to_the_index(self, folder, name):
        save_file({"a": torch.ones(1)}, folder.parent / "secret.safetensors")
        self.write(folder, {"a": name})
        error = self.refused(folder)
        assert (error.file, error.field, error.value) == (str(folder / self.INDEX), "weight_map.a", name)

    def test_a_link_to_another_disk(self, folder):
        # The index may only name files in its own directory; such a file may be a link.
        (folder / "model-00001-of-00002.safetensors").rename(folder.parent / "elsewhere")
        (folder / "model-00001-of-00002.safetensors").symlink_to("../elsewhere")
        assert sorted(list_tensors(find_weight_files(folder))) == ["a", "b"]

    def test_links_of_the_hubs_cache(self, folder):
        repository = folder.parent / "models--owner--name"
        (repository / "blobs").mkdir(parents=True)
        (repository / "snapshots").mkdir()
        for file in folder.iterdir():
            blob = repository / "blobs" / f"sha-of-{file.name}"
            file.rename(blob)
            file.symlink_to(f"../../blobs/{blob.name}")
        snapshot = folder.rename(repository / "snapshots" / "commit")
        assert sorted(list_tensors(find_weight_files(snapshot))) == ["a", "b"]

    def test_a_link_to_the_whole_directory(self, folder):
        (folder.parent / "link").symlink_to(folder)
        assert sorted(list_tensors(find_weight_files(folder.parent / "link"))) == ["a", "b"]

    def test_shards_without_their_index(self, folder):
        (folder / self.INDEX).unlink()
        assert self.refused(folder).file == str(folder / self.INDEX)
        (folder / "model-00001-of-00002.safetensors").unlink()  # the other one alone is no model either
        assert self.refused(folder).value == ["model-00002-of-00002.safetensors"]

    def test_one_shard_of_one_needs_no_index(self, tmp_path):
        save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00001.safetensors")
        assert list(list_tensors(find_weight_files(tmp_path))) == ["a"]


def test_integer_weights_are_refused(tmp_path):
    save_model(*tiny.vila(), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "projector.0.weight": weights["projector.0.weight"].int()}, file, metadata={"format": "pt"})
    with pytest.raises(LayoutError) as caught:
        load_model(tmp_path / "model")
    assert "projector.0.weight" in caught.value.problem


def test_nested_values_of_a_file_are_read(tmp_path):
    made = io.BytesIO()
    torch.save({"scale": [("a", ("b",), torch.ones(2))], "n": 3}, made)
    (tmp_path / "x.pt").write_bytes(made.getvalue())
    content = read_torch_file(tmp_path / "x.pt")
    name, linears, tensor = content.value["scale"][0]
    assert (name, linears, content.value["n"]) == ("a", ("b",), 3)
    assert torch.equal(tensor.read(content.map()), torch.ones(2))
