"""TinyChatEngine exports read by an independent reader, and unsupported models."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig

from tests import tiny
from tests.export.gguf_fixtures import GOLDEN, seeing
from tests.export.readers.tinychatengine_folder import q4_0_step, read_floats, read_int4, read_vocabulary
from vila.core.errors import LayoutError
from vila.export.base import ExportOptions, write_export
from vila.export.source import open_source
from vila.export.tinychatengine import TARGET, llm_problems, quantize_for_engine, vision_problems
from vila.model.config import VilaConfig
from vila.model.loading import save_model
from vila.model.weights import published_state_dict

LINEARS = ("gate_proj", "up_proj", "down_proj", *(f"self_attn/{kind}_proj" for kind in "qkvo"))
POSITIONS, WIDTH = 512, 16


@pytest.fixture(scope="module")
def model():
    """A CLIP model with every Linear's inputs a multiple of 128, and the engine's kind of projector."""
    one, processor = seeing("clip", select_layer=-2)
    text = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8}
    whole = tiny.vila(tie_word_embeddings=False, **text)[0]
    one.config.text_config, one.config.tie_word_embeddings = whole.config.text_config, False
    torch.manual_seed(0)
    return type(one)(one.config).eval(), processor


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """Folders by precision, written past the check of sizes: the compiled-in ones make files of 27 GB."""
    folder = tmp_path_factory.mktemp("engine")
    one, processor = model
    processor.tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizers" / "vicuna_v15_legacy_false")
    save_model(one, processor, folder / "model")
    source = open_source(folder / "model")
    out = {}
    for precision in TARGET.precisions:
        out[precision] = folder / precision
        out[precision].mkdir()
        TARGET.write(source, out[precision], ExportOptions(precision))
    return out


def linear(state, index, name):
    inside = name.replace("/", ".") if name.startswith("self_attn") else f"mlp.{name}"
    return state[f"language_model.model.layers.{index}.{inside}.weight"].numpy()


def test_every_float_is_in_its_file(model, written):
    state = published_state_dict(model[0])
    root = written["fp32"] / "models" / "VILA_7B"
    vocab = state["language_model.lm_head.weight"].shape[0]
    assert np.array_equal(read_floats(root / "lm_head.bin", vocab, 128), state["language_model.lm_head.weight"])
    decoder = root / "decoder"
    embeddings = read_floats(decoder / "embed_tokens" / "weight.bin", vocab, 128)
    assert np.array_equal(embeddings, state["language_model.model.embed_tokens.weight"])
    assert np.array_equal(read_floats(decoder / "norm" / "weight.bin", 128), state["language_model.model.norm.weight"])
    for index in range(2):
        layer = decoder / f"layer{index}"
        for name in LINEARS:
            weight = linear(state, index, name)
            assert np.array_equal(read_floats(layer / name / "weight.bin", *weight.shape), weight), name
        for norm in ("input_layernorm", "post_attention_layernorm"):
            wanted = state[f"language_model.model.layers.{index}.{norm}.weight"]
            assert np.array_equal(read_floats(layer / norm / "weight.bin", 128), wanted)
        assert read_floats(layer / "self_attn" / "qk_bmm" / "alpha.bin", 1)[0] == pytest.approx(1 / math.sqrt(WIDTH))
    names = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert len(names) == 3 + 2 * (len(LINEARS) + 2 + 3)


def test_the_rotary_tables_equal_those_of_the_model(model, written):
    layer = written["fp32"] / "models" / "VILA_7B" / "decoder" / "layer1" / "self_attn" / "rotary_emb"
    decoder = model[0].language_model.model
    wanted = decoder.rotary_emb(torch.zeros(1), torch.arange(POSITIONS)[None])
    for name, table in zip(("cos", "sin"), wanted, strict=True):
        found = read_floats(layer / f"{name}_cached.bin", POSITIONS, WIDTH)
        # float32 angles up to 512, of which a rounding differs: 6e-5 at most.
        assert np.abs(found - table[0].numpy()).max() < 2e-4


@pytest.mark.parametrize("precision", ["qm_x86", "qm_arm"])
def test_cpu_linears_are_quantized_bit_by_bit(model, written, precision):
    state = published_state_dict(model[0])
    root = written[precision] / "INT4" / "models" / "VILA_7B"
    for index in range(2):
        for name in LINEARS:
            weight = linear(state, index, name)
            found = read_int4(root / "decoder" / f"layer{index}" / name, precision, *weight.shape)
            assert np.array_equal(found, q4_0_step(weight)), name
    head = state["language_model.lm_head.weight"].numpy()
    assert np.array_equal(read_int4(root / "lm_head", precision, *head.shape), q4_0_step(head))
    assert not (root / "lm_head.bin").exists()
    assert (root / "decoder" / "embed_tokens" / "weight.bin").stat().st_size == head.size * 4


def test_cuda_linears_have_float16_scales_and_tables(model, written):
    state = published_state_dict(model[0])
    root = written["qm_cuda"] / "INT4" / "models" / "VILA_7B"
    for name in LINEARS:
        weight = linear(state, 0, name)
        found = read_int4(root / "decoder" / "layer0" / name, "qm_cuda", *weight.shape)
        step = np.repeat(np.abs(weight.reshape(len(weight), -1, 128)).max(2), 128, 1) / 8
        assert (np.abs(found - weight) <= step * 1.01).all() and np.abs(found - weight).max() > 0
    attention = root / "decoder" / "layer1" / "self_attn"
    assert read_floats(attention / "qk_bmm" / "alpha_half.bin", 1, half=True)[0] == np.float16(1 / math.sqrt(WIDTH))
    cos = read_floats(attention / "rotary_emb" / "cos_cached_half.bin", POSITIONS, WIDTH, half=True)
    assert np.array_equal(cos[0], np.ones(WIDTH))
    assert not (attention / "rotary_emb" / "cos_cached.bin").exists()


@pytest.mark.parametrize("precision", ["fp32", "qm_arm"])
def test_the_vision_part_is_always_float32(model, written, precision):
    state = published_state_dict(model[0])
    root = written[precision] / "models" / "CLIP_ViT_Large"
    # The tiny tower has 4 blocks, of which even the last is written: the engine takes 23.
    tower = {name.removeprefix("vision_tower."): value.numpy() for name, value in state.items() if "vision" in name}
    kernel = read_floats(root / "embeddings" / "patch_embedding" / "weight.bin", 64, 14, 14, 3)
    assert np.array_equal(kernel.transpose(0, 3, 1, 2), tower["embeddings.patch_embedding.weight"])
    positions = read_floats(root / "embeddings" / "position_embedding" / "weight.bin", 17, 64)
    assert np.array_equal(positions, tower["embeddings.position_embedding.weight"])
    token = read_floats(root / "embeddings" / "class_embedding" / "weight.bin", 64)
    assert np.array_equal(token, tower["embeddings.class_embedding"])
    assert np.array_equal(read_floats(root / "pre_layernorm" / "bias.bin", 64), tower["pre_layrnorm.bias"])
    for index in range(4):
        layer, begin = root / "encoder" / f"layer{index}", f"encoder.layers.{index}."
        for place in ("self_attn/q_proj", "self_attn/out_proj", "layer_norm1", "mlp_fc1", "mlp_fc2"):
            for leaf in ("weight", "bias"):
                wanted = tower[f"{begin}{place.replace('mlp_', 'mlp.').replace('/', '.')}.{leaf}"]
                assert np.array_equal(read_floats(layer / place / f"{leaf}.bin", *wanted.shape), wanted)
        assert read_floats(layer / "self_attn" / "qk_bmm" / "alpha.bin", 1)[0] == 0.25
    for index in (0, 2):
        wanted = state[f"projector.{index}.weight"].numpy()
        assert np.array_equal(read_floats(root / f"mm_projector_{index}" / "weight.bin", *wanted.shape), wanted)
    assert read_floats(root / "image_processor" / "image_mean.bin", 3) == pytest.approx(model[1].spec.mean)


def test_the_vocabulary_has_printed_bytes(written):
    words = read_vocabulary(written["fp32"] / "models" / "llama_vocab.bin", 259)
    assert [word for word, _ in words[:3]] == [" \u2047 ".encode(), b"", b""]
    assert [word for word, _ in words[3:]] == [bytes([number]) for number in range(256)]


def test_the_quantization_uses_the_whole_range():
    """A group's greatest magnitude is code 0 exactly; its opposite would be 16 and is cut to 15."""
    row = torch.zeros(1, 32)
    row[0, 3], row[0, 7] = -4.0, 4.0
    weight = quantize_for_engine(row, 32)
    assert weight.scales.tolist() == [[0.5]]
    from vila.kernels.int4 import dequantize

    values = dequantize(weight)[0]
    assert values[3] == -4.0 and values[7] == 3.5 and values[0] == 0
    assert (dequantize(quantize_for_engine(torch.zeros(1, 32), 32)) == 0).all()


@pytest.fixture
def vila_7b():
    llm = LlamaConfig(rms_norm_eps=1e-5, vocab_size=32000)
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    tower = CLIPVisionConfig(**large, image_size=336, patch_size=14)
    return VilaConfig(vision_config=tower, text_config=llm, projector_type="mlp2x_gelu", select_layer=-2)


def test_vila_7b_is_supported(vila_7b):
    assert llm_problems(vila_7b.text_config) == vision_problems(vila_7b) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"projector_type": "linear"}, "'linear'"),
        ({"projector_type": "mlp_downsample"}, "'mlp_downsample'"),
        ({"select_layer": -3}, "23 blocks"),
        ({"select_feature": "cls_patch"}, "select_feature"),
        ({"s2_scales": [336, 672]}, "S2 features"),
    ],
)
def test_unsupported_vision_parts_have_a_reason(vila_7b, change, reason):
    for key, value in change.items():
        setattr(vila_7b, key, value)
    (only,) = vision_problems(vila_7b)
    assert reason in only


def test_the_sizes_of_13b_are_not_supported(vila_7b):
    llm = vila_7b.text_config
    llm.hidden_size, llm.intermediate_size, llm.num_hidden_layers = 5120, 13824, 40
    llm.num_attention_heads = llm.num_key_value_heads = 40
    assert any("5120" in reason for reason in vision_problems(vila_7b))
    assert any("hidden_size 5120" in reason and "4096" in reason for reason in llm_problems(llm))
    assert len(llm_problems(llm)) == 5
    assert "'qwen2'" in llm_problems(tiny.text_config("qwen2"))[0]


def test_an_unsupported_model_is_an_error_before_anything_is_written(tmp_path):
    save_model(*tiny.vila(), tmp_path / "model")
    with pytest.raises(LayoutError) as caught:
        write_export(open_source(tmp_path / "model"), "tinychatengine", tmp_path / "out")
    assert "hidden_size 32" in caught.value.problem and "SentencePiece" in caught.value.problem
    assert not (tmp_path / "out").exists()
