"""Search files, ours and those of the AWQ release; damaged and foreign files are refused by name."""

import json
import zipfile
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.quant.models import loud, random_rows
from vila.core.errors import LayoutError
from vila.kernels.int4 import quantize
from vila.quant.apply import apply_search
from vila.quant.awq_cache import AwqSearch, load_search, read_awq_cache, read_search, save_search, write_awq_cache
from vila.quant.awq_search import search_model
from vila.quant.quant_config import QuantConfig
from vila.quant.resume_state import read_int4_block, write_int4_block


@pytest.fixture(scope="module")
def found():
    return search_model(loud(layers=2)[0], random_rows(), QuantConfig(group_size=16))


def test_a_search_reads_as_it_was_written(found, tmp_path):
    save_search(found, tmp_path / "search.safetensors")
    again = load_search(tmp_path / "search.safetensors")
    assert again.settings == found.settings
    assert [(one.fold, one.linears, one.metadata) for one in again.scales] == [
        (one.fold, one.linears, one.metadata) for one in found.scales
    ]
    assert all(torch.equal(a.scale_I, b.scale_I) for a, b in zip(again.scales, found.scales, strict=True))
    assert all(torch.equal(a.limit_OG, b.limit_OG) for a, b in zip(again.clips, found.clips, strict=True))
    save_search(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "search.safetensors").read_bytes()


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_file_that_is_no_search_is_named(tmp_path, content):
    path = tmp_path / "search.safetensors"
    path.write_bytes(content)
    with pytest.raises(LayoutError) as caught:
        load_search(path)
    assert caught.value.file == str(path)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "[]",
        "{",
        "null",
        '{"scales": [{"fold": "x"}]}',
        '{"scales": [], "clips": [], "facts": null}',
        '{"scales": [], "clips": [null], "facts": {}}',
        '{"scales": [], "clips": ["a"], "facts": {}}',
        '{"scales": [], "clips": ["nan"], "facts": {}}',
        '{"scales": [{"fold": "nan", "linears": ["b"], "facts": {}}], "clips": [], "facts": {}}',
        '{"scales": [{"fold": "b", "linears": [], "facts": {}}], "clips": [], "facts": {}}',
        '{"scales": [{"fold": "b", "linears": [null], "facts": {}}], "clips": [], "facts": {}}',
    ],
)
def test_a_header_that_is_no_search_is_named(tmp_path, header):
    path = tmp_path / "search.safetensors"
    tensors = {"clip/a": torch.zeros(1), "clip/nan": torch.full((1, 1), torch.nan), "scale/b": torch.ones(2)}
    tensors["scale/nan"] = torch.full((1,), torch.nan)
    save_file(tensors, path, metadata=None if header is None else {"vila_search": header})
    with pytest.raises(LayoutError) as caught:
        load_search(path)
    assert caught.value.file == str(path)


@pytest.mark.parametrize("damage", ["codes", "group", "header", "cut"])
def test_a_rounded_block_that_is_damaged_is_named(tmp_path, damage):
    path = tmp_path / "00000.safetensors"
    weight = quantize(torch.randn(4, 32), 16)
    write_int4_block({"a": weight}, "key", path)
    assert read_int4_block(path)[1] == "key"
    tensors, sizes = load_file(path), {"a": 16}
    if damage == "codes":
        tensors["a/codes"] = tensors["a/codes"][:3].contiguous()
    if damage == "group":
        sizes = {"a": None}
    header = "{" if damage == "header" else json.dumps({"key": "key", "group_sizes": sizes})
    save_file(tensors, path, metadata={"vila_rounded_block": header})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LayoutError) as caught:
        read_int4_block(path)
    assert caught.value.file == str(path)


def as_original(found, prefix="model."):
    """The form of the original's awq_cache files."""

    def name(ours):
        return prefix + ours.removeprefix("model.")

    return {
        "scale": [(name(one.fold), tuple(map(name, one.linears)), one.scale_I) for one in found.scales],
        "clip": [(name(one.linear), one.limit_OG[..., None]) for one in found.clips],
    }


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "llm.model."])
def test_search_files_of_the_awq_release_have_the_same_effect(found, prefix, tmp_path):
    path = tmp_path / "llava-w4-g16.pt"
    torch.save(as_original(found, prefix), path)
    read = read_awq_cache(path)
    assert read.settings == {"source": "llava-w4-g16.pt", "group_size": 16}
    ours, theirs = loud(layers=2)[0], loud(layers=2)[0]
    apply_search(ours, found)
    apply_search(theirs, read)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in theirs.state_dict().items())


def test_a_search_is_written_as_the_awq_release_writes_it(found, tmp_path):
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
    large = AwqSearch((replace(found.scales[0], scale_I=found.scales[0].scale_I * 1e6),), ())
    with pytest.raises(LayoutError) as caught:
        write_awq_cache(large, tmp_path / "x.pt")
    assert caught.value.field == "model.layers.0.input_layernorm"
    assert not list(tmp_path.iterdir())


class Payload:
    """A pickle of it runs code."""

    def __reduce__(self):
        return print, ("ran",)


SCALE = ("model.layers.0.input_layernorm", ("model.layers.0.self_attn.q_proj",), torch.ones(32))
CLIP = ("model.layers.0.self_attn.q_proj", torch.ones(2, 3, 1))


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({"scale": [Payload()], "clip": []}, None),
        ({"model.embed_tokens.weight": torch.zeros(2)}, None),
        ({"scale": [], "clip": []}, None),
        ({"scale": None, "clip": []}, None),
        ({"scale": {"a": 1}, "clip": []}, None),
        ([SCALE], None),
        ({"scale": [("model.layers.0.x",)], "clip": []}, "scale[0]"),
        ({"scale": [SCALE, None], "clip": []}, "scale[1]"),
        ({"scale": [()], "clip": []}, "scale[0]"),
        ({"scale": [(SCALE[0], "model.layers.0.x", SCALE[2])], "clip": []}, "scale[0]"),
        ({"scale": [(SCALE[0], (), SCALE[2])], "clip": []}, "scale[0]"),
        ({"scale": [(SCALE[0], (None,), SCALE[2])], "clip": []}, "scale[0]"),
        ({"scale": [("model.norm", ("lm_head",), torch.ones(2))], "clip": []}, "scale[0]"),
        ({"scale": [(*SCALE[:2], torch.full((32,), torch.nan))], "clip": []}, "scale[0]"),
        ({"scale": [(*SCALE[:2], torch.ones(0))], "clip": []}, "scale[0]"),
        ({"scale": [(*SCALE[:2], torch.ones(32).int())], "clip": []}, "scale[0]"),
        ({"scale": [(*SCALE[:2], torch.ones(2, 16))], "clip": []}, "scale[0]"),
        ({"scale": [], "clip": [(CLIP[0], torch.ones(2, 3, 4))]}, "clip[0]"),
        ({"scale": [], "clip": [(CLIP[0], torch.ones(2, 3))]}, "clip[0]"),
        ({"scale": [], "clip": [(CLIP[0], torch.ones(2, 0, 1))]}, "clip[0]"),
        ({"scale": [], "clip": [CLIP, (*CLIP, 3)]}, "clip[1]"),
        ({"scale": [SCALE] * 100_000, "clip": []}, "scale["),
    ],
)
def test_files_that_run_code_or_hold_something_else_are_refused(tmp_path, capsys, content, field):
    path = tmp_path / "cache.pt"
    torch.save(content, path)
    with pytest.raises(LayoutError) as caught:
        read_awq_cache(path)
    assert caught.value.file == str(path)
    assert (caught.value.field or "").startswith(field or "")
    assert "ran" not in capsys.readouterr().out


def test_damaged_files_are_named(found, tmp_path):
    path = tmp_path / "cache.pt"
    torch.save(as_original(found), path)
    whole = path.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    for content in (whole[:500], b"hello", b"", pointer):
        path.write_bytes(content)
        with pytest.raises(LayoutError) as caught:
            read_awq_cache(path)
        assert caught.value.file == str(path)
    with pytest.raises(LayoutError) as caught:
        read_search(tmp_path / "missing.pt")
    assert caught.value.file == str(tmp_path / "missing.pt")


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path):
    torch.save({"scale": [(*SCALE[:2], torch.zeros(5_000_000))], "clip": []}, tmp_path / "cache.pt")
    with (
        zipfile.ZipFile(tmp_path / "cache.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    with pytest.raises(LayoutError) as caught:
        read_awq_cache(tmp_path / "bomb.pt")
    assert caught.value.file == str(tmp_path / "bomb.pt")
