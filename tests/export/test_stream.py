"""SafetensorsWriter writes ordinary safetensors files row by row."""

import pytest
import torch
from safetensors.torch import load_file

from tests.export.readers.safetensors_file import read_file, read_folder
from vila.core.reading import read_json
from vila.model.save_weights import SafetensorsWriter

TENSORS = {
    "odd": torch.arange(3, dtype=torch.uint8),
    "rows": torch.randn(10, 3, generator=torch.Generator().manual_seed(0)),
    "half": torch.randn(2, 2, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
    "shape": torch.tensor([7, 9]),
    "one": torch.tensor(2.5),
}
DECLARED = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


def write(folder, **options):
    with SafetensorsWriter(folder, DECLARED, **options) as writer:
        writer.append("rows", TENSORS["rows"][:4])
        for name in ("one", "shape", "half", "odd"):
            writer.append(name, TENSORS[name])
        writer.append("rows", TENSORS["rows"][4:])


def test_rows_are_written_in_any_tensor_order(tmp_path):
    write(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert read_file(tmp_path / "model.safetensors")["rows"].tolist() == TENSORS["rows"].tolist()


def test_shards_have_an_index_and_every_tensor_once(tmp_path):
    write(tmp_path, shard_bytes=130)
    index = read_json(tmp_path / "model.safetensors.index.json")
    assert set(index["weight_map"].values()) == {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert read_folder(tmp_path).keys() == TENSORS.keys()


def test_an_incomplete_tensor_is_an_error(tmp_path):
    with (
        pytest.raises(RuntimeError, match="rows"),
        SafetensorsWriter(tmp_path, {"rows": ((10, 3), torch.float32)}) as writer,
    ):
        writer.append("rows", TENSORS["rows"][:9])


@pytest.mark.parametrize(
    ("rows", "value"),
    [
        (torch.zeros(2, 3, dtype=torch.float16), "torch.float16"),
        (torch.zeros(2, 4), r"\[2, 4\]"),
        (torch.zeros(11, 3), "10"),
    ],
)
def test_rows_that_were_not_declared_are_an_error(tmp_path, rows, value):
    with (
        pytest.raises(ValueError, match=value),
        SafetensorsWriter(tmp_path, {"rows": ((10, 3), torch.float32)}) as writer,
    ):
        writer.append("rows", rows)
