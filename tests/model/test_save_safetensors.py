"""Weights are written one by one, and the bytes are those of safetensors' own writer."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from vila.core.errors import LayoutError
from vila.model.save_weights import LazyTensor, as_float16, write_file, write_weights

KINDS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16)
WIDE = (torch.int32, torch.float32, torch.float64, torch.int64)


def test_bytes_are_those_of_safetensors(tmp_path):
    tensors = {f"{n}.{kind}": torch.arange(2 * n + 3).to(kind) for n, kind in enumerate((*KINDS, *WIDE))}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), 'name \u00e9 "quoted"': torch.ones(3, 3)}
    tensors["turned"] = torch.arange(12.0).reshape(3, 4).T
    write_file(tensors, tmp_path / "ours")
    save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_tensors_are_made_when_their_turn_comes_and_forgotten(tmp_path):
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


def test_what_is_made_must_be_what_was_announced(tmp_path):
    with pytest.raises(RuntimeError) as caught:
        write_file({"a": LazyTensor((2,), torch.float32, lambda: torch.zeros(3))}, tmp_path / "a")
    assert "[3]" in str(caught.value) and "[2]" in str(caught.value)


def test_half_precision_casts_and_refuses_what_does_not_fit(tmp_path):
    tensors = as_float16({"a": torch.tensor([0.1]), "n": torch.tensor([7]), "big": torch.tensor([70000.0])})
    assert tensors["n"].dtype == torch.int64
    write_file({name: tensors[name] for name in "an"}, tmp_path / "a")
    assert load_file(tmp_path / "a")["a"].dtype == torch.float16
    with pytest.raises(LayoutError) as caught:
        write_file(tensors, tmp_path / "b")
    assert caught.value.field == "big"


def test_a_type_that_files_do_not_know_is_named(tmp_path):
    with pytest.raises(LayoutError) as caught:
        write_file({"z": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "a")
    assert (caught.value.field, caught.value.value) == ("z", "torch.complex64")
