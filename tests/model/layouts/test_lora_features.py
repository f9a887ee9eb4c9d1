"""Every feature of PEFT's LoRA is merged to PEFT's logits or refused by name; damaged adapters are named."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from vila.core.errors import LayoutError
from vila.model.layouts import adapter_config
from vila.model.layouts.adapter_config import read_adapter_config
from vila.model.layouts.detect import detect_layout
from vila.model.loading import load_model, save_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
peft = pytest.importorskip("peft")
IDS = torch.randint(3, 200, (1, 12), generator=torch.Generator().manual_seed(0))
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Directories of a model whose head is tied, of one whose head is not, and of one whose Linears have biases."""
    folder = tmp_path_factory.mktemp("bases")
    save_model(*tiny.vila("llama"), folder / "tied")
    save_model(*tiny.vila("llama", tie_word_embeddings=False), folder / "untied")
    save_model(*tiny.vila("qwen2", tie_word_embeddings=False), folder / "biases")
    return folder


def trained(base, folder, **options):
    """Train an adapter on `base`, save it with PEFT, and return the logits of the model."""
    chosen = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **options}
    torch.manual_seed(0)
    model = peft.get_peft_model(load_model(base)[0], peft.LoraConfig(**chosen))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()(input_ids=IDS).logits


def merged(folder, base):
    return load_model(folder, base=base)[0](input_ids=IDS).logits


EXACT = {
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "random": {"init_lora_weights": False},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "dora": {"use_dora": True},
    "dora and pissa": {"use_dora": True, "init_lora_weights": "pissa"},
    "ranks": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 3},
        "alpha_pattern": {"^language_model.model.layers.0.mlp.down_proj": 11.5},
    },
    "ranks and olora": {"rank_pattern": {"q_proj": 2}, "use_rslora": True, "init_lora_weights": "olora"},
    "biases": {"bias": "all"},
    "biases of targets": {"bias": "lora_only"},
    "whole modules": {"modules_to_save": ["projector.0", "model.norm"]},
    "whole head": {"modules_to_save": ["lm_head"]},
    "whole embeddings": {"modules_to_save": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "embeddings, dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "one layer": {"layers_to_transform": [1]},
    "all but one": {"target_modules": "all-linear", "exclude_modules": ".*layers.0.*"},
    "fan_in_fan_out": {"fan_in_fan_out": True},
}


@pytest.mark.parametrize("name", EXACT)
def test_logits_are_those_of_peft(bases, tmp_path, name):
    expected = trained(bases / "tied", tmp_path / "adapter", **EXACT[name])
    # worst of all: 6.0e-6, fp32, torch 2.13, PEFT 0.21, logits up to 5
    torch.testing.assert_close(merged(tmp_path / "adapter", bases / "tied"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("untied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("untied", {"target_modules": ["lm_head"], "init_lora_weights": "pissa"}),
        ("untied", {"trainable_token_indices": [5, 9, 7]}),
        ("untied", {"trainable_token_indices": {"embed_tokens": [5], "lm_head": [7, 9]}}),
        ("biases", {"bias": "all"}),
        ("biases", {"target_modules": ["k_proj"], "lora_bias": True}),
    ],
)
def test_logits_are_those_of_peft_over_other_bases(bases, tmp_path, base, options):
    if "lora_bias" in options:  # the tower's Linears called so have biases too
        options = {**options, "target_modules": r".*self_attn\.(k|q)_proj"}
    expected = trained(bases / base, tmp_path / "adapter", **options)
    torch.testing.assert_close(merged(tmp_path / "adapter", bases / base), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_converted_adapter_is_a_full_checkpoint(bases, tmp_path, init):
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "init_lora_weights": init}
    model = peft.get_peft_model(load_model(bases / "tied")[0], peft.LoraConfig(**options))
    # PEFT would subtract the initial adapter again.
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    expected = model.eval()(input_ids=IDS).logits
    where = str(tmp_path / "initial")
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=where)
    torch.testing.assert_close(merged(tmp_path / "adapter", bases / "tied"), expected, rtol=0, atol=1e-5)


def test_an_untied_head_stays_untied_when_saved(bases, tmp_path):
    expected = trained(bases / "tied", tmp_path / "adapter", modules_to_save=["embed_tokens"])
    save_model(*load_model(tmp_path / "adapter", base=bases / "tied"), tmp_path / "merged")
    torch.testing.assert_close(load_model(tmp_path / "merged")[0](input_ids=IDS).logits, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def plain(bases, tmp_path_factory):
    """A directory with an ordinary adapter over the tied base."""
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    trained(bases / "tied", folder)
    return folder


@pytest.fixture
def copy(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "adapter")


def edit(folder, **facts):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def refused(folder, base):
    with pytest.raises(LayoutError) as caught:
        detect_layout(folder).open(folder, base)
    return caught.value


REFUSED = {
    "init_lora_weights": ["pissa_niter_4", "corda", "loftq", "lora_ga", "PISSA_NITER", "of tomorrow", 3, []],
    "layer_replication": [[[0, 2], [0, 2]]],
    "target_parameters": [["experts.gate_up_proj"], 3],
    "megatron_config": [{"a": 1}],
    "alora_invocation_tokens": [[5, 6]],
    "use_qalora": [True],
    "velora_config": [{"scale": 1.0}],
    "kasa_config": [{"beta": 1e-4}],
    "monteclora_config": [{"num_samples": 8}],
    "use_bdlora": [{"nblocks": 2}],
    "arrow_config": [{"top_k": 3}],
    "enable_lora": [[True, False]],
    "feature_of_tomorrow": [True, 1, "x", [0], {"a": None}],
    "peft_type": [*(kind for kind in peft.PeftType if kind != "LORA"), None, 3, "lora", ["LORA"]],
    "r": [0, -1, None, True, 4.0, "4", 2**40, []],
    "lora_alpha": [None, True, "6", math.nan, math.inf, [], 1e300],
    "use_rslora": ["false", 1],
    "use_dora": ["false", 1, True],
    "rank_pattern": [3, [], {"q_proj": 0}, {"q_proj": None}, {"q_proj": 2.5}, {"(": 2}, {"(?i)q_proj": 2}],
    "alpha_pattern": [3, {"q_proj": "x"}, {"(a+)+": 3}, {".*.*.*.*x": 3}, {"(.*)*x": 3}, {"a" * 501: 3}],
    "bias": ["some", True],
    "lora_bias": [],
    "modules_to_save": [3, "projector", [3], [""]],
    "trainable_token_indices": [3, ["a"], [-1], [1, 1], {"embed_tokens": 3}, {"embed_tokens": [True]}],
    "ensure_weight_tying": ["x"],
    "base_model_name_or_path": [3, []],
    "revision": [3],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in REFUSED.items() for value in values])
def test_other_features_and_values_are_refused_by_name(bases, copy, key, value):
    edit(copy, **{key: value})
    error = refused(copy, bases / "tied")
    assert error.file == str(copy / CONFIG)
    assert error.field.partition(".")[0] == key


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", POINTER, b"\xff"])
def test_a_config_that_is_not_an_object_is_named(bases, copy, content):
    (copy / CONFIG).write_bytes(content)
    assert refused(copy, bases / "tied").file == str(copy / CONFIG)


def test_every_option_of_the_installed_peft_is_known():
    options = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    known = {*adapter_config.HANDLED, *adapter_config.WITHOUT_EFFECT, *REFUSED}
    assert options <= known


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"target_modules": ["lm_head"], "init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"trainable_token_indices": [5, 7]}, "trainable_token_indices"),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, "ensure_weight_tying"),
    ],
)
def test_what_changes_embeddings_and_head_together_is_refused(bases, tmp_path, options, field):
    trained(bases / "tied", tmp_path / "adapter", **options)
    error = refused(tmp_path / "adapter", bases / "tied")
    assert (error.file, error.field) == (str(tmp_path / "adapter" / CONFIG), field)


def test_a_bias_without_one_in_the_base_is_refused(bases, tmp_path):
    trained(bases / "tied", tmp_path / "adapter", lora_bias=True)
    assert refused(tmp_path / "adapter", bases / "tied").file == str(tmp_path / "adapter" / WEIGHTS)


FIRST = "base_model.model.language_model.model.layers.0.mlp.down_proj.lora_A.weight"


class TestDamagedWeights:
    def rewrite(self, folder, change):
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)

    @pytest.mark.parametrize(
        "tensor",
        [
            torch.empty(0),  # DeepSpeed ZeRO-3 without gathering
            torch.zeros(0, 64),
            torch.zeros(()),
            torch.zeros(64),
            torch.zeros(4, 64, 1, 1),
            torch.zeros(5, 64),
            torch.zeros(4, 63),
            torch.zeros(4, 64, dtype=torch.int32),
        ],
        ids=lambda tensor: f"{tensor.dtype} {list(tensor.shape)}",
    )
    def test_of_another_shape_or_dtype(self, bases, copy, tensor):
        self.rewrite(copy, lambda tensors: {**tensors, FIRST: tensor})
        error = refused(copy, bases / "tied")
        assert (error.file, error.field) == (str(copy / WEIGHTS), FIRST)
        assert ("ZeRO-3" in (error.hint or "")) == (not tensor.numel())

    @pytest.mark.parametrize("rank", [2, 8])
    def test_of_another_rank_than_the_config(self, bases, copy, rank):
        edit(copy, r=rank)
        assert refused(copy, bases / "tied").file == str(copy / WEIGHTS)

    def test_of_half_a_pair(self, bases, copy):
        self.rewrite(copy, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != FIRST})
        error = refused(copy, bases / "tied")
        assert error.file == str(copy / WEIGHTS)
        assert FIRST.replace("lora_A", "lora_B") in error.problem

    def test_of_another_kind(self, bases, copy):
        name = FIRST.replace("lora_A.weight", "lora_diag")
        self.rewrite(copy, lambda tensors: {**tensors, name: torch.ones(4)})
        assert name in refused(copy, bases / "tied").problem

    def test_that_are_there_twice(self, bases, copy):
        name = FIRST.replace("lora_A", "lora_A.default")
        self.rewrite(copy, lambda tensors: {**tensors, name: tensors[FIRST].clone()})
        assert refused(copy, bases / "tied").file == str(copy / WEIGHTS)

    def test_with_the_name_of_the_adapter_inside(self, bases, plain, copy):
        self.rewrite(copy, lambda ts: {name.replace(".weight", ".default.weight"): t for name, t in ts.items()})
        assert torch.equal(merged(copy, bases / "tied"), merged(plain, bases / "tied"))

    def test_that_are_not_there(self, bases, copy):
        self.rewrite(copy, lambda tensors: {"x": torch.ones(1)})
        assert refused(copy, bases / "tied").file == str(copy / WEIGHTS)
        (copy / WEIGHTS).write_bytes(b"\x02\0\0\0\0\0\0\0{}")
        assert refused(copy, bases / "tied").file == str(copy / WEIGHTS)
        (copy / WEIGHTS).unlink()
        assert refused(copy, bases / "tied").file == str(copy)

    @pytest.mark.parametrize("name", [WEIGHTS, "adapter_model.bin"])
    def test_that_are_a_git_lfs_pointer(self, bases, copy, name):
        (copy / WEIGHTS).unlink()
        (copy / name).write_bytes(POINTER)
        assert "git lfs pull" in refused(copy, bases / "tied").hint

    def test_rows_past_the_vocabulary(self, bases, tmp_path):
        trained(bases / "untied", tmp_path / "adapter", trainable_token_indices=[5, 7])
        for rows in ([5, 100_000], [5], [5, 7, 9]):
            edit(tmp_path / "adapter", trainable_token_indices=rows)
            assert refused(tmp_path / "adapter", bases / "untied").file == str(tmp_path / "adapter" / WEIGHTS)


def test_a_scale_follows_its_patterns(copy):
    edit(copy, rank_pattern={"layers.0.mlp.down_proj": 16}, alpha_pattern={"down_proj": 8}, use_rslora=True)
    config = read_adapter_config(copy)
    assert config.scale_of("language_model.model.layers.0.mlp.down_proj") == 2.0
    assert config.scale_of("language_model.model.layers.1.mlp.down_proj") == 4.0
    assert config.scale_of("language_model.model.layers.1.mlp.up_down_proj") == 3.0
