"""The mmproj file: names, sizes, the layer that is used, and the linear projector as two layers."""

import numpy as np
import pytest
import torch

from tests.export.gguf_fixtures import MEAN, STD, export, seeing
from tests.export.readers.gguf_file import F16, F32, read_gguf
from vila.export.gguf_mmproj import mmproj_problems
from vila.model.weights import published_state_dict

BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
OUTSIDE = {
    "v.class_embd": "embeddings.class_embedding",
    "v.patch_embd.weight": "embeddings.patch_embedding.weight",
    "v.patch_embd.bias": "embeddings.patch_embedding.bias",
    "v.position_embd.weight": "embeddings.position_embedding.weight",
    "v.pre_ln.weight": "pre_layrnorm.weight",
    "v.pre_ln.bias": "pre_layrnorm.bias",
}


def theirs(name):
    """A weight of ours by llama.cpp's name."""
    if name.startswith("mm."):
        return f"projector.{name.removeprefix('mm.')}"
    if name in OUTSIDE:
        return f"vision_tower.{OUTSIDE[name]}"
    _, _, index, kind, leaf = name.split(".")
    return f"vision_tower.encoder.layers.{index}.{BLOCK[kind]}.{leaf}"


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize(("select_layer", "blocks"), [(-2, 3), (-1, 4), (2, 2)])
def test_the_file_has_the_used_blocks_and_the_projector(tmp_path, tower, select_layer, blocks):
    model, processor = seeing(tower, select_layer=select_layer)
    file = read_gguf(export(tmp_path, model, processor, "gguf") / "mmproj-f16.gguf")
    state = published_state_dict(model)
    wanted = {"v.patch_embd.weight", "v.position_embd.weight"}
    wanted |= {"v.class_embd", "v.pre_ln.weight", "v.pre_ln.bias"} if tower == "clip" else {"v.patch_embd.bias"}
    wanted |= {f"v.blk.{i}.{kind}.{leaf}" for i in range(blocks) for kind in BLOCK for leaf in ("weight", "bias")}
    wanted |= {f"mm.{index}.{leaf}" for index in (0, 2) for leaf in ("weight", "bias")}
    assert file.tensors.keys() == wanted
    for name, values in file.tensors.items():
        exact = state[theirs(name)].numpy()
        half = exact.ndim > 1 and name != "v.position_embd.weight"
        assert file.types[name] == (F16 if half else F32), name
        assert np.array_equal(values, exact.astype(np.float16) if half else exact), name
    assert file.metadata["clip.vision.block_count"] == blocks
    assert file.metadata["clip.vision.feature_layer"] == [blocks]


def test_metadata_equal_the_config_of_the_tower(tmp_path):
    facts = read_gguf(export(tmp_path, *seeing("clip"), "gguf") / "mmproj-f16.gguf").metadata
    wanted = {
        "general.architecture": "clip",
        "clip.has_vision_encoder": True,
        "clip.has_text_encoder": False,
        "clip.has_llava_projector": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": False,
        "clip.vision.image_size": 56,
        "clip.vision.patch_size": 14,
        "clip.vision.embedding_length": 64,
        "clip.vision.feed_forward_length": 128,
        "clip.vision.projection_dim": 512,
        "clip.vision.attention.head_count": 4,
    }
    assert {key: facts[key] for key in wanted} == wanted
    assert facts["clip.vision.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    assert facts["clip.vision.image_mean"] == pytest.approx(MEAN)
    assert facts["clip.vision.image_std"] == pytest.approx(STD)


def test_siglip_metadata_select_the_tanh_gelu(tmp_path):
    facts = read_gguf(export(tmp_path, *seeing("siglip"), "gguf") / "mmproj-f16.gguf").metadata
    assert facts["clip.use_gelu"] is True
    assert facts["clip.vision.attention.layer_norm_epsilon"] == pytest.approx(1e-6)


@pytest.mark.parametrize("projector", ["linear", "mlp1x_gelu", "identity"])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_a_linear_projector_is_exact_in_spite_of_the_gelu(tmp_path, projector, approximate):
    if projector == "identity":
        model, processor = seeing("siglip", "linear")
        model.config.projector_type, model.config.vision_config.hidden_size = "identity", 32
        model.config.vision_config.num_attention_heads = 4
        model = type(model)(model.config).eval()
    else:
        model, processor = seeing("siglip", projector)
    file = read_gguf(export(tmp_path, model, processor, "gguf") / "mmproj-f16.gguf")
    mm = {name: torch.from_numpy(values) for name, values in file.tensors.items() if name.startswith("mm.")}
    features = torch.randn(5, model.config.vision_width, generator=torch.Generator().manual_seed(0))
    hidden = torch.nn.functional.gelu(features @ mm["mm.0.weight"].T + mm["mm.0.bias"], approximate=approximate)
    with torch.no_grad():
        half = model.projector.half().float()
        wanted = half(features) if projector != "identity" else features
    # float32, worst of both approximations: 9e-7 of values up to 4.
    assert torch.allclose(hidden @ mm["mm.2.weight"].T + mm["mm.2.bias"], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("tower", "change", "reason"),
    [
        ("clip", {"select_feature": "cls_patch"}, "'patch'"),
        ("clip", {"projector_type": "mlp3x_gelu"}, "'mlp3x_gelu'"),
        ("siglip", {"projector_type": "mlp_downsample"}, "mlp2x_gelu, linear, mlp1x_gelu, identity"),
        ("siglip", {"s2_scales": [56, 112]}, "S2 features"),
    ],
)
def test_unsupported_towers_and_projectors_have_a_reason(tower, change, reason):
    config = seeing(tower)[0].config
    assert mmproj_problems(config) == []
    for key, value in change.items():
        setattr(config, key, value)
    (only,) = mmproj_problems(config)
    assert reason in only


def test_the_readme_has_the_defects_that_concern_the_model(tmp_path):
    clip = (export(tmp_path / "a", *seeing("clip", "linear"), "gguf") / "README.md").read_text()
    siglip = (export(tmp_path / "b", *seeing("siglip"), "gguf") / "README.md").read_text()
    assert "25814" in clip and "25814" not in siglip
    assert "[W; -W]" in clip and "[W; -W]" not in siglip
    assert "--mmproj out/mmproj-f16.gguf" in clip
