"""Weights read in chunks, with an AWQ search applied, equal those of the model in memory."""

from dataclasses import replace

import pytest
import torch

from tests.export.models import random_search, write_model, write_search
from vila.core.errors import LayoutError
from vila.export.source import ExportSource, open_source
from vila.model.loading import load_model, open_checkpoint
from vila.model.weights import published_state_dict
from vila.quant.apply import apply_search
from vila.quant.awq_cache import AwqSearch, ChannelScale, save_search


def all_weights(source, **options):
    return {name: torch.cat(list(source.rows(name, **options))) for name in source.tensors}


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 24])
def test_chunks_make_up_every_weight(tmp_path, chunk_bytes):
    model, _ = write_model(tmp_path / "m")
    found = all_weights(open_source(tmp_path / "m"), chunk_bytes=chunk_bytes)
    expected = published_state_dict(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_search_applied_in_chunks_equals_that_of_the_model_in_memory_bit_by_bit(tmp_path, family, dtype):
    heads = {"num_key_value_heads": 4} if family == "llama" else {}
    model, _ = write_model(tmp_path / "m", family, dtype=dtype, **heads)
    search = write_search(tmp_path, model)
    found = all_weights(open_source(tmp_path / "m", search=search), chunk_bytes=1)
    plain = published_state_dict(model)
    apply_search(model, random_search(model))
    expected = published_state_dict(model)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    changed = {name.split(".")[-2] for name, tensor in expected.items() if not torch.equal(plain[name], tensor)}
    assert {"input_layernorm", "q_proj", "up_proj", "down_proj"} <= changed


def test_the_last_rows_of_a_longer_weight_are_divided_in_every_chunk():
    from vila.export.source import Fold

    fold, weight = Fold("outputs", torch.tensor([2.0, 4.0, 8.0])), torch.ones(5, 2)
    parts = [fold(weight[start : start + 2], start, 5) for start in (0, 2, 4)]
    assert torch.cat(parts)[:, 0].tolist() == [1, 1, 0.5, 0.25, 0.125]


def test_a_search_of_another_model_is_an_error(tmp_path):
    model, _ = write_model(tmp_path / "m")
    search = write_search(tmp_path, write_model(tmp_path / "other", hidden_size=96)[0])
    with pytest.raises(LayoutError) as caught:
        open_source(tmp_path / "m", search=search)
    assert "96 channels" in caught.value.problem and caught.value.hint
    bad = AwqSearch((ChannelScale("model.layers.0.input_layernorm", (), torch.full((64,), float("nan"))),), ())
    with pytest.raises(LayoutError):
        all_weights(ExportSource(**vars(open_checkpoint(tmp_path / "m")), search=bad))


def test_a_value_that_is_not_finite_in_float16_is_an_error(tmp_path):
    model, processor = write_model(tmp_path / "m")
    with torch.no_grad():
        model.language_model.model.norm.weight[3] = 1e5
    from vila.model.loading import save_model

    save_model(model, processor, tmp_path / "m")
    source = open_source(tmp_path / "m")
    with pytest.raises(LayoutError) as caught:
        source.read("language_model.model.norm.weight", torch.float16)
    assert caught.value.field == "language_model.model.norm.weight"


def test_other_layouts_are_read_too(tmp_path):
    from vila.model.loading import save_model

    model, processor = write_model(tmp_path / "m")
    save_model(model, processor, tmp_path / "hf", layout="llava-hf")
    again, _ = load_model(tmp_path / "hf")
    found = all_weights(open_source(tmp_path / "hf"))
    assert all(torch.equal(found[name], tensor) for name, tensor in published_state_dict(again).items())


def test_a_search_with_negative_limits_is_an_error(tmp_path):
    model, _ = write_model(tmp_path / "m")
    found = random_search(model)
    first = found.clips[0]
    save_search(replace(found, clips=(replace(first, limit_OG=-first.limit_OG),)), tmp_path / "search.safetensors")
    with pytest.raises(LayoutError) as caught:
        open_source(tmp_path / "m", search=tmp_path / "search.safetensors")
    assert first.linear in caught.value.problem
