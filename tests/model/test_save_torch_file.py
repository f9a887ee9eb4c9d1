"""What torch.save would have written, but one tensor at a time: torch reads it in every way it has."""

import zipfile

import pytest
import torch

from vila.model.save_weights import LazyTensor, write_torch_file
from vila.model.weights import TorchFile

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


def test_our_own_reader_maps_it(file):
    with TorchFile(file).open() as get:
        assert all(torch.equal(get(name), tensor) for name, tensor in TENSORS.items())


def test_the_archive_is_sound_and_its_storages_are_aligned(file):
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


def test_tied_tensors_and_views_are_written_for_themselves(tmp_path):
    whole = torch.arange(1000.0)
    write_torch_file({"view": whole[:2], "same": whole[:2]}, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 1500
    held = torch.load(tmp_path / "x.pt")
    assert held["view"].untyped_storage().data_ptr() != held["same"].untyped_storage().data_ptr()
