"""Code inside a checkpoint is never run, and the user is never asked to allow it."""

import ast
import json
from pathlib import Path

import pytest

import vila
from tests import tiny
from tests.model.layouts.published import FIXTURES
from vila.core.errors import LayoutError
from vila.model.loading import load_model, open_checkpoint, save_model

LOADERS = ("from_pretrained", "from_config")
SOURCES = sorted(Path(vila.__file__).parent.rglob("*.py"))


def loading_calls():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOADERS:
                yield path.name, node


def test_every_loading_call_has_trust_remote_code_false():
    calls = list(loading_calls())
    assert calls
    wrong = [
        f"{name}:{node.lineno}"
        for name, node in calls
        if not any(
            word.arg == "trust_remote_code" and isinstance(word.value, ast.Constant) and word.value.value is False
            for word in node.keywords
        )
    ]
    assert not wrong, "give trust_remote_code=False"


def edit(file, **changes):
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**content, **changes}))


def plant(folder, name):
    """Add a module that creates a file when it is imported, and the `auto_map` that names it."""
    mark = folder / "ran"
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')\n")
    maps = {
        "config.json": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M", "AutoModel": "code.M"},
        "tokenizer_config.json": {"AutoTokenizer": [None, "code.T"]},
        "processor_config.json": {"AutoProcessor": "code.P"},
    }
    edit(folder / name, auto_map=maps[name])
    return mark


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "processor_config.json"])
@pytest.mark.parametrize("tokenizer_class", [None, "CodeTokenizer"])
def test_an_auto_map_is_ignored_or_rejected_without_a_prompt(tmp_path, monkeypatch, name, tokenizer_class):
    def asked(*_):
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", asked)
    save_model(*tiny.vila(), tmp_path / "model")
    mark = plant(tmp_path / "model", name)
    if tokenizer_class:
        edit(tmp_path / "model" / "tokenizer_config.json", tokenizer_class=tokenizer_class)
    try:
        load_model(tmp_path / "model")
    except LayoutError as error:
        assert error.file
    assert not mark.exists()


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_attn_implementation_internal"])
def test_an_attention_implementation_of_a_checkpoint_is_dropped(tmp_path, part, key):
    save_model(*tiny.vila(), tmp_path / "model")
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    content[part][key] = content[key] = "kernels-of/nobody"
    (tmp_path / "model" / "config.json").write_text(json.dumps(content))
    model, _ = load_model(tmp_path / "model")
    assert getattr(model.config, part)._attn_implementation == "sdpa"


def test_an_attention_implementation_of_a_published_config_is_dropped(tmp_path):
    written = FIXTURES["v1-mlp2x"](tmp_path)
    edit(written.folder / "config.json", attn_implementation="flash_attention_9", auto_map={"AutoConfig": "code.C"})
    assert open_checkpoint(written.folder).config.text_config._attn_implementation is None
