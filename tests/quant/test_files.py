"""Search files: ours, and those of the original release; damaged and foreign ones are refused by name."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tests.quant.models import loud, random_rows
from vila.core.errors import LayoutError
from vila.quant.apply import apply_search
from vila.quant.awq_cache import read_awq_cache, read_search, write_awq_cache
from vila.quant.block_search import SearchOptions
from vila.quant.result import Search, load_search, save_search
from vila.quant.search import search_model


@pytest.fixture(scope="module")
def found():
    return search_model(loud(layers=2)[0], random_rows(), SearchOptions(group_size=16))


def test_a_search_reads_as_it_was_written(found, tmp_path):
    save_search(found, tmp_path / "search.safetensors")
    again = load_search(tmp_path / "search.safetensors")
    assert again.facts == found.facts
    assert [(one.fold, one.linears, one.facts) for one in again.scales] == [
        (one.fold, one.linears, one.facts) for one in found.scales
    ]
    assert all(torch.equal(a.scale_I, b.scale_I) for a, b in zip(again.scales, found.scales, strict=True))
    assert all(torch.equal(a.limit_OG, b.limit_OG) for a, b in zip(again.clips, found.clips, strict=True))
    save_search(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "search.safetensors").read_bytes()


def test_what_is_no_search_is_refused(tmp_path):
    path = tmp_path / "search.safetensors"
    path.write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(LayoutError, match=r"search.safetensors: cannot be read as safetensors"):
        load_search(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(LayoutError, match="holds tensors, but no search"):
        load_search(path)
    save_file({"a": torch.zeros(1)}, path, metadata={"vila_search": '{"scales": [{"fold": "x"}]}'})
    with pytest.raises(LayoutError, match="its header does not fit its tensors"):
        load_search(path)


def as_original(found, prefix="model."):
    """The form of the original's awq_cache files."""

    def name(ours):
        return prefix + ours.removeprefix("model.")

    return {
        "scale": [(name(one.fold), tuple(map(name, one.linears)), one.scale_I) for one in found.scales],
        "clip": [(name(one.linear), one.limit_OG[..., None]) for one in found.clips],
    }


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "llm.model."])
def test_search_files_of_the_original_do_what_ours_do(found, prefix, tmp_path):
    path = tmp_path / "llava-w4-g16.pt"
    torch.save(as_original(found, prefix), path)
    read = read_awq_cache(path)
    assert read.facts == {"source": "llava-w4-g16.pt", "group_size": 16}
    ours, theirs = loud(layers=2)[0], loud(layers=2)[0]
    apply_search(ours, found)
    apply_search(theirs, read)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in theirs.state_dict().items())


def test_a_search_is_written_as_the_original_writes_it(found, tmp_path):
    path = tmp_path / "tiny-w4-g16.pt"
    write_awq_cache(found, path)
    held = torch.load(path, weights_only=True)
    wanted = as_original(found)
    assert list(held) == ["scale", "clip"]
    for mine, theirs in zip(held["scale"] + held["clip"], wanted["scale"] + wanted["clip"], strict=True):
        assert mine[:-1] == theirs[:-1]
        assert torch.equal(mine[-1], theirs[-1].half())
    write_awq_cache(found, tmp_path / "again.pt")
    assert (tmp_path / "again.pt").read_bytes() == path.read_bytes()
    read = read_search(path)
    assert [one.linears for one in read.scales] == [one.linears for one in found.scales]
    write_awq_cache(read, tmp_path / "again.pt")
    assert (tmp_path / "again.pt").read_bytes() == path.read_bytes()


def test_a_value_that_float16_cannot_hold_is_named_and_nothing_is_written(found, tmp_path):
    large = Search((replace(found.scales[0], scale_I=found.scales[0].scale_I * 1e6),), ())
    with pytest.raises(LayoutError, match=r"model.layers.0.input_layernorm: .* does not fit float16"):
        write_awq_cache(large, tmp_path / "x.pt")
    assert not list(tmp_path.iterdir())


class Payload:
    """A pickle of it runs code."""

    def __reduce__(self):
        return print, ("ran",)


def test_files_that_run_code_or_hold_something_else_are_refused(found, tmp_path, capsys):
    good = as_original(found)
    path = tmp_path / "cache.pt"
    wrong = {
        "holds more than tensors and plain values": {"scale": [Payload()], "clip": []},
        "no AWQ search": {"model.embed_tokens.weight": torch.zeros(2)},
        "holds neither scales nor limits": {"scale": [], "clip": []},
        "not as the original writes": {"scale": [("model.layers.0.x",)], "clip": []},
        "names nothing in a decoder block": {"scale": [("model.norm", ("lm_head",), torch.ones(2))], "clip": []},
        "are not finite": {"scale": [(*good["scale"][0][:2], torch.full((32,), torch.nan))], "clip": []},
        "have shape": {"scale": [], "clip": [("model.layers.0.x", torch.ones(2, 3, 4))]},
        "no floating-point tensor of 3": {"scale": [], "clip": [("model.layers.0.x", torch.ones(2, 3))]},
    }
    for message, content in wrong.items():
        torch.save(content, path)
        with pytest.raises(LayoutError, match=message):
            read_awq_cache(path)
    assert "ran" not in capsys.readouterr().out
    torch.save(good, path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(LayoutError, match="cache.pt: cannot be read"):
        read_awq_cache(path)
    path.write_text("hello")
    with pytest.raises(LayoutError, match=r"cache.pt: (cannot be read|holds more)"):
        read_awq_cache(path)
    with pytest.raises(LayoutError, match="missing.pt: cannot be read"):
        read_awq_cache(tmp_path / "missing.pt")
