"""An adapter directory is one model for PEFT, for our loader and for `vila convert`, the projector included."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.model.layouts.published import FIXTURES
from tests.train.test_lora import adapted, learn, logits
from vila.cli.main import main
from vila.config.schema import Lora
from vila.core.errors import LayoutError
from vila.model.layouts.detect import detect_layout
from vila.model.loading import load_model, save_model
from vila.train.lora import adapter_parameters, add_adapters, save_adapter
from vila.train.optimizer import select_trainable

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def written(folder, family="llama", base="base", model=None, processor=None):
    """Write `base` and `adapter` below `folder`; return the logits of the trained model."""
    save_model(*tiny.vila(family), folder / "base")
    learnt, own = adapted(family)
    save_adapter(model or learnt, processor or own, folder / "adapter", base)
    return folder / "adapter", logits(learnt, own)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A directory shared by the tests that do not change it."""
    folder = tmp_path_factory.mktemp("shared")
    return written(folder, base=str(folder / "base"))


def edit(folder, **facts):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


@pytest.mark.parametrize("family", tiny.FAMILIES)
class TestEveryFamily:
    def test_peft_reads_the_directory(self, family, tmp_path):
        from peft import PeftModel

        adapter, expected = written(tmp_path, family)
        base, processor = load_model(tmp_path / "base")
        wrapped = PeftModel.from_pretrained(base, adapter)
        torch.testing.assert_close(logits(wrapped, processor), expected, rtol=0, atol=1e-6)
        merged = wrapped.merge_and_unload()
        torch.testing.assert_close(logits(merged, processor), expected, rtol=0, atol=1e-5)

    def test_loading_merges(self, family, tmp_path):
        adapter, expected = written(tmp_path, family)
        model, processor = load_model(adapter)
        # worst of 3 families: 3.1e-6, fp32, torch 2.13, logits up to 4.7
        torch.testing.assert_close(logits(model, processor), expected, rtol=0, atol=1e-5)
        assert not [name for name in model.state_dict() if "lora" in name]


def test_the_directory_holds_adapters_projector_and_processor_only(shared):
    adapter, _ = shared
    assert {path.name for path in adapter.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    names = set(load_file(adapter / "adapter_model.safetensors"))
    stem = "base_model.model.language_model.model.layers"
    assert {name for name in names if not name.startswith(stem)} == {
        f"base_model.model.projector.{layer}.{leaf}" for layer in (0, 2) for leaf in ("weight", "bias")
    }
    assert f"{stem}.1.mlp.down_proj.lora_B.weight" in names
    assert len(names) == 2 * 7 * 2 + 4


def test_peft_alone_finds_the_base(shared):
    from peft import AutoPeftModel

    adapter, expected = shared
    model = AutoPeftModel.from_pretrained(adapter, import_allowlist=["vila.model.modeling"])
    torch.testing.assert_close(logits(model, tiny.vila()[1]), expected, rtol=0, atol=1e-6)


def test_image_mode_and_template_are_the_adapters(tmp_path):
    model, processor = adapted()
    model.config.template = processor.template = "vicuna_v1"
    model.config.vision_spec = processor.vision_spec = {**processor.vision_spec, "image_mode": "resize"}
    adapter, _ = written(tmp_path, model=model, processor=processor)
    loaded, own = load_model(adapter)
    assert (own.template, loaded.config.template, own.spec.image_mode) == ("vicuna_v1", "vicuna_v1", "resize")
    assert load_model(tmp_path / "base")[1].template == "starter_qa"


def test_a_base_in_another_layout(tmp_path):
    save_model(*tiny.vila(tower="clip"), tmp_path / "native")
    save_model(*load_model(tmp_path / "native"), tmp_path / "base", "llava-hf")
    model, processor = load_model(tmp_path / "base")
    add_adapters(model, Lora(rank=2), seed=1)
    learn(model)
    save_adapter(model, processor, tmp_path / "adapter", "base")
    loaded, own = load_model(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, own), logits(model, processor), rtol=0, atol=1e-5)


def test_a_published_base(tmp_path):
    where = FIXTURES["v1-mlp2x"](tmp_path)
    model, processor = load_model(where.folder, template="vicuna_v1")
    add_adapters(model, Lora(rank=2), seed=1)
    learn(model)
    save_adapter(model, processor, tmp_path / "adapter", str(where.folder))
    ids = torch.tensor([[1, 5, 9, 11]])
    loaded, own = load_model(tmp_path / "adapter")
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert own.template == "vicuna_v1"


def test_an_adapter_on_an_adapter(tmp_path):
    first, before = written(tmp_path)
    model, processor = load_model(first)
    add_adapters(model, Lora(rank=2), seed=1)
    learn(model)
    expected = logits(model, processor)
    assert (expected - before).abs().max() > 0.01
    save_adapter(model, processor, tmp_path / "second", str(first))
    loaded, _ = load_model(tmp_path / "second")
    torch.testing.assert_close(logits(loaded, processor), expected, rtol=0, atol=1e-5)


def test_a_trained_tower_is_included(tmp_path):
    model, processor = tiny.vila()
    save_model(model, processor, tmp_path / "base")
    add_adapters(model, Lora(rank=2), seed=1)
    select_trainable(model, ("vision", "projector", "llm"), adapters=set(adapter_parameters(model)))
    learn(model.eval())
    save_adapter(model, processor, tmp_path / "adapter", "base")
    loaded, _ = load_model(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, processor), logits(model, processor), rtol=0, atol=1e-5)
    for name, tensor in model.vision_tower.state_dict().items():
        assert torch.equal(loaded.vision_tower.state_dict()[name], tensor)


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_directories_written_by_peft_are_read(tmp_path, rank_stabilised):
    from peft import LoraConfig, get_peft_model

    model, processor = tiny.vila()
    save_model(model, processor, tmp_path / "base")
    chosen = {"target_modules": ["up_proj"], "modules_to_save": ["projector"], "use_rslora": rank_stabilised}
    wrapped = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **chosen))
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded, own = load_model(tmp_path / "adapter", base=tmp_path / "base")
    torch.testing.assert_close(logits(loaded, own), logits(wrapped.eval(), processor), rtol=0, atol=1e-5)
    assert own.template == "starter_qa"


class TestWhereTheBaseIs:
    def test_a_relative_path_is_resolved_from_here_and_from_parents(self, tmp_path, monkeypatch):
        adapter, _ = written(tmp_path / "runs" / "deep", base="runs/deep/base")
        monkeypatch.chdir(tmp_path / "runs" / "deep")
        load_model(adapter)
        monkeypatch.chdir(tmp_path)
        load_model("runs/deep/adapter")

    def test_a_missing_base_is_an_error_with_a_hint(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        adapter, expected = written(tmp_path)
        (tmp_path / "base").rename(tmp_path / "moved")
        with pytest.raises(LayoutError) as caught:
            load_model(adapter)
        assert (caught.value.file, caught.value.value) == (str(adapter / "adapter_config.json"), "base")
        loaded, processor = load_model(adapter, base=tmp_path / "moved")
        torch.testing.assert_close(logits(loaded, processor), expected, rtol=0, atol=1e-5)

    def test_an_adapter_without_a_named_base(self, tmp_path):
        adapter, _ = written(tmp_path, base="")
        with pytest.raises(LayoutError) as caught:
            load_model(adapter)
        assert caught.value.field == "base_model_name_or_path"
        load_model(adapter, base=tmp_path / "base")

    def test_it_is_not_the_adapter_itself(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        adapter, _ = written(tmp_path, base="adapter")
        with pytest.raises(LayoutError) as caught:
            load_model(adapter)
        assert caught.value.value == "adapter"

    def test_it_is_not_an_adapter_whose_base_this_one_is(self, tmp_path):
        adapter, _ = written(tmp_path)
        second = shutil.copytree(adapter, tmp_path / "second")
        edit(adapter, base_model_name_or_path=str(second))
        edit(second, base_model_name_or_path=str(adapter))
        with pytest.raises(LayoutError) as caught:
            load_model(adapter)
        assert caught.value.field == "base_model_name_or_path"

    @pytest.mark.parametrize("base", ["\0", "~nobody-here/base", "a/" * 3000, "x" * 300])
    def test_it_is_not_a_valid_path(self, tmp_path, base):
        adapter, _ = written(tmp_path)
        edit(adapter, base_model_name_or_path=base)
        with pytest.raises(LayoutError) as caught:
            load_model(adapter)
        assert caught.value.file == str(adapter / "adapter_config.json")


class TestAnotherModel:
    @pytest.mark.parametrize(
        ("family", "text", "reason"),
        [
            ("llama", {"num_hidden_layers": 3}, "text_config.num_hidden_layers is 3, the adapter's 2"),
            ("llama", {"num_hidden_layers": 1}, "text_config.num_hidden_layers is 1, the adapter's 2"),
            ("qwen2", {}, "text_config.model_type is 'qwen2', the adapter's 'llama'"),
        ],
    )
    def test_is_refused_as_base(self, shared, tmp_path, family, text, reason):
        adapter, _ = shared
        save_model(*tiny.vila(family, **text), tmp_path / "other")
        with pytest.raises(LayoutError) as caught:
            load_model(adapter, base=tmp_path / "other")
        assert (
            caught.value.file == str(tmp_path / "other")
            and reason in caught.value.problem
            and "--model-base" in caught.value.hint
        )

    def test_unmatched_weights_are_listed(self, tmp_path):
        adapter, _ = written(tmp_path)
        tensors = load_file(adapter / "adapter_model.safetensors")
        stem = "base_model.model."
        tensors[f"{stem}projector.9.weight"] = tensors.pop(f"{stem}projector.2.weight")
        tensors[f"{stem}language_model.lm_head.weight"] = torch.zeros(3, 3)
        save_file(tensors, adapter / "adapter_model.safetensors")
        with pytest.raises(LayoutError) as caught:
            load_model(adapter)
        assert f"{stem}projector.9.weight" in caught.value.problem
        assert f"{stem}language_model.lm_head.weight" in caught.value.problem


class TestCommands:
    def call(self, capsys, *arguments):
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        out, err = capsys.readouterr()
        assert ended.value.code == 0, err
        return out

    def test_convert_merges(self, shared, tmp_path, capsys):
        adapter, expected = shared
        self.call(capsys, "convert", adapter, tmp_path / "merged", "--layout", "native")
        assert detect_layout(tmp_path / "merged").name == "native"
        model, processor = load_model(tmp_path / "merged")
        torch.testing.assert_close(logits(model, processor), expected, rtol=0, atol=1e-5)

    def test_info_reports_an_adapter(self, shared, capsys):
        facts = json.loads(self.call(capsys, "info", shared[0], "--json"))
        assert (facts["layout"], facts["template"]) == ("adapter", "starter_qa")
        assert facts["parameters"] == sum(p.numel() for p in tiny.vila()[0].parameters())

    def test_run_equals_the_merged_model(self, shared, tmp_path, capsys):
        save_model(*load_model(shared[0]), tmp_path / "merged")
        flags = ("-p", "what?", "--max-new-tokens", 4, "--dtype", "float32", "--json")
        answers = [
            json.loads(self.call(capsys, "run", folder, *flags))["text"] for folder in (shared[0], tmp_path / "merged")
        ]
        assert answers[0] == answers[1]


def test_an_upstream_lora_directory_has_its_own_layout(tmp_path):
    assert detect_layout(FIXTURES["v1-lora"](tmp_path).folder).name == "llava-v1"
