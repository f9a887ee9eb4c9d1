"""Weights are written one tensor at a time, with the bytes of safetensors' own writer and readable by torch.load."""

import json
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from vila.core.errors import LayoutError
from vila.model.save_weights import LazyTensor, as_float16, write_torch_file, write_weights
from vila.model.weights import TorchFile

KINDS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16)
WIDE = (torch.int32, torch.float32, torch.float64, torch.int64)


def test_bytes_are_those_of_safetensors(tmp_path):
    tensors = {f"{n}.{kind}": torch.arange(2 * n + 3).to(kind) for n, kind in enumerate((*KINDS, *WIDE))}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), 'name \u00e9 "quoted"': torch.ones(3, 3)}
    tensors["turned"] = torch.arange(12.0).reshape(3, 4).T
    write_weights(tensors, tmp_path)
    save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_lazy_tensors_are_computed_one_at_a_time(tmp_path):
    alive, most = [], 0

    def make(number):
        def made():
            nonlocal most
            tensor = torch.full((4,), float(number))
            alive.append(number)
            most = max(most, len(alive))
            torch.utils.weak.weakref.finalize(tensor, alive.remove, number)
            return tensor

        return LazyTensor((4,), torch.float32, made)

    write_weights({str(n): make(n) for n in range(5)}, tmp_path)
    assert most == 1
    assert load_file(tmp_path / "model.safetensors")["3"].tolist() == [3.0] * 4


def test_shards_have_an_index(tmp_path):
    write_weights({name: torch.ones(10) for name in "abc"}, tmp_path, shard_size=80)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 120}
    assert [len(load_file(tmp_path / name)) for name in sorted(set(index["weight_map"].values()))] == [2, 1]


def test_a_lazy_tensor_must_have_its_declared_shape(tmp_path):
    with pytest.raises(RuntimeError) as caught:
        write_weights({"a": LazyTensor((2,), torch.float32, lambda: torch.zeros(3))}, tmp_path)
    assert "[3]" in str(caught.value) and "[2]" in str(caught.value)


def test_values_outside_float16_are_refused(tmp_path):
    tensors = as_float16({"a": torch.tensor([0.1]), "n": torch.tensor([7]), "big": torch.tensor([70000.0])})
    assert tensors["n"].dtype == torch.int64
    write_weights({name: tensors[name] for name in "an"}, tmp_path)
    assert load_file(tmp_path / "model.safetensors")["a"].dtype == torch.float16
    with pytest.raises(LayoutError) as caught:
        write_weights(tensors, tmp_path)
    assert caught.value.field == "big"


def test_an_unsupported_dtype_is_refused(tmp_path):
    with pytest.raises(LayoutError) as caught:
        write_weights({"z": torch.zeros(2, dtype=torch.complex64)}, tmp_path)
    assert (caught.value.field, caught.value.value) == ("z", "torch.complex64")


TENSORS = {
    "a.half": torch.arange(6.0).reshape(2, 3).half(),
    "turned": torch.arange(12).reshape(3, 4).T,
    "words": torch.arange(5, dtype=torch.int16),
    "bytes": torch.arange(3, dtype=torch.uint8),
    "b": torch.ones(7, dtype=torch.bfloat16),
    "flags": torch.tensor([True, False]),
    "scalar": torch.tensor(1.5),
    "empty": torch.zeros(0, 3),
}


@pytest.fixture
def file(tmp_path):
    made = LazyTensor((4,), torch.float32, lambda: torch.arange(4.0))
    write_torch_file({**TENSORS, "made": made}, tmp_path / "x.pt")
    return tmp_path / "x.pt"


@pytest.mark.parametrize("options", [{}, {"mmap": True}, {"weights_only": False}])
def test_torch_reads_it(file, options):
    held = torch.load(file, **options)
    assert list(held) == [*TENSORS, "made"]
    for name, tensor in {**TENSORS, "made": torch.arange(4.0)}.items():
        assert held[name].dtype == tensor.dtype
        assert torch.equal(held[name], tensor)
        assert held[name].is_contiguous()


def test_our_reader_memory_maps_it(file):
    with TorchFile(file).open() as get:
        assert all(torch.equal(get(name), tensor) for name, tensor in TENSORS.items())


def test_the_archive_is_valid_and_its_storages_are_aligned(file):
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        names = set(archive.namelist())
        assert {"archive/data.pkl", "archive/version", "archive/byteorder", "archive/data/0"} <= names
    torch.save(TENSORS, file.with_name("theirs.pt"))
    with zipfile.ZipFile(file.with_name("theirs.pt")) as archive:
        theirs = {name.partition("/")[2] for name in archive.namelist()}
    assert {name.partition("/")[2] for name in names} - {"data/8"} == {n for n in theirs if not n.startswith(".")}
    for tensor in torch.load(file, mmap=True).values():
        assert tensor.data_ptr() % tensor.element_size() == 0


def test_the_same_tensors_give_the_same_bytes(file):
    write_torch_file({**TENSORS, "made": torch.arange(4.0)}, file.with_name("other.pt"))
    assert file.read_bytes() == file.with_name("other.pt").read_bytes()


def test_tied_tensors_and_views_get_storages_of_their_own(tmp_path):
    whole = torch.arange(1000.0)
    write_torch_file({"view": whole[:2], "same": whole[:2]}, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 1500
    held = torch.load(tmp_path / "x.pt")
    assert held["view"].untyped_storage().data_ptr() != held["same"].untyped_storage().data_ptr()
