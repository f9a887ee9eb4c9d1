"""An export is complete or absent, replaces only exports, and has a README.md."""

import errno
import os
import shutil
import signal

import pytest
import torch

from tests.export.models import write_model
from tests.other_process import killed_writer
from tests.pages import numbers
from vila.core.errors import ConfigError, LayoutError, UnknownNameError, VilaError
from vila.core.reading import read_json
from vila.export.base import EXPORTS, METADATA_FILE, OPTIONS, ExportOptions, write_export
from vila.export.source import open_source
from vila.model.save_weights import SafetensorsWriter


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "m"
    write_model(folder)
    return folder


@pytest.mark.parametrize("name", list(EXPORTS))
def test_every_target_has_summary_verification_and_readme(model, name):
    target = EXPORTS[name]
    assert target.name == name
    assert target.precisions
    assert target.options <= set(OPTIONS)
    assert target.verification
    assert (target.summary + target.verification).isascii()
    options = ExportOptions(next(iter(target.precisions)), group_size=32 if "group_size" in target.options else 0)
    readme = target.readme(open_source(model), options)
    assert readme.commands
    assert readme.versions
    assert all("{out}" in lines or "engines" in lines or "make" in lines for _, lines in readme.commands)


def test_the_readme_has_model_commands_versions_and_defects(model, tmp_path):
    write_export(open_source(model), "compressed-tensors", tmp_path / "out", ExportOptions(group_size=32))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "vllm serve out\n" in text
    assert "`starter_qa`" in text
    for title in ("How to run it", "Versions", "Known defects"):
        assert f"## {title}" in text
    metadata = read_json(tmp_path / "out" / METADATA_FILE)
    assert (metadata["format"], metadata["precision"], metadata["group_size"]) == ("compressed-tensors", "int4", 32)


def test_only_an_export_is_replaced_and_only_with_overwrite(model, tmp_path):
    source, out = open_source(model), tmp_path / "out"
    out.mkdir()
    write_export(source, "safetensors", out)
    with pytest.raises(ConfigError) as caught:
        write_export(source, "safetensors", out)
    assert caught.value.file == str(out) and "--overwrite" in caught.value.hint
    (out / "stale").touch()
    write_export(source, "safetensors", out, overwrite=True)
    assert not (out / "stale").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for path in (tmp_path / "mine", tmp_path / "mine" / "thesis.tex", model):
        with pytest.raises(ConfigError) as caught:
            write_export(source, "safetensors", path, overwrite=True)
        assert caught.value.file == str(path)
    assert (tmp_path / "mine" / "thesis.tex").exists() and (model / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("error", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "No space left on device"), VilaError)],
)
def test_an_interrupt_or_a_full_disk_leaves_nothing_and_keeps_the_previous_export(
    model, tmp_path, monkeypatch, error, raised
):
    source, out = open_source(model), tmp_path / "out"
    write_export(source, "safetensors", out)
    before = (out / "model.safetensors").read_bytes()
    appended, append = [], SafetensorsWriter.append

    def fail_later(self, name, rows):
        appended.append(name)
        if len(appended) > 20:
            raise error
        append(self, name, rows)

    monkeypatch.setattr(SafetensorsWriter, "append", fail_later)
    with pytest.raises(raised):
        write_export(source, "safetensors", out, ExportOptions("float16"), overwrite=True)
    assert len(appended) > 20
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "model.safetensors").read_bytes() == before


def test_unknown_names_have_similar_names(model, tmp_path):
    source = open_source(model)
    with pytest.raises(UnknownNameError) as caught:
        write_export(source, "compressed", tmp_path / "out")
    assert "compressed-tensors" in caught.value.near
    with pytest.raises(UnknownNameError) as caught:
        write_export(source, "compressed-tensors", tmp_path / "out", ExportOptions("int8"))
    assert caught.value.name == "int8"
    with pytest.raises(LayoutError) as refused:
        write_export(source, "safetensors", tmp_path / "out", ExportOptions(tp_size=2))
    assert "--tp-size" in refused.value.problem and "tensorrt-llm-legacy" in refused.value.problem
    assert not list(tmp_path.iterdir())


def test_all_reasons_are_reported_at_once(tmp_path):
    write_model(tmp_path / "m", tower="siglip", hidden_size=80)
    source = open_source(tmp_path / "m")
    with pytest.raises(LayoutError) as refused:
        write_export(source, "compressed-tensors", tmp_path / "out", ExportOptions(tp_size=2))
    assert {3, 128, 80} <= set(numbers(refused.value.problem))  # reasons, group size, inputs
    assert all(name in refused.value.problem for name in ("--tp-size", "siglip_vision_model"))
    assert not (tmp_path / "out").exists()


def test_weights_are_read_in_chunks(model, monkeypatch):
    seen = []
    source = open_source(model)
    monkeypatch.setattr(torch, "cat", lambda *_: pytest.fail("a whole weight was put together"))
    for name in source.tensors:
        seen += [len(run) for run in source.rows(name, torch.float16, chunk_bytes=1) if run.dim() == 2]
    assert max(seen) == 64


@pytest.fixture
def vila(capsys):
    """Calls the command: exit status, standard output, standard error on one line."""
    from vila.cli.main import main

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        out, err = capsys.readouterr()
        return ended.value.code, out, " ".join(err.split())

    before = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, before)


def test_a_terminated_command_leaves_nothing(vila, model, tmp_path, monkeypatch):
    monkeypatch.setattr(SafetensorsWriter, "append", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    code, _, err = vila("export", model, "--format", "safetensors", "--output", tmp_path / "out")
    assert (code, err.endswith("stopped")) == (130, True)
    assert not list(tmp_path.iterdir())


def test_the_command_lists_formats_and_writes_an_export(vila, model, tmp_path):
    code, out, _ = vila("export", "--list")
    assert code == 0
    assert all(name in out for name in EXPORTS)
    code, out, _ = vila("export", model, "--format", "safetensors", "--output", tmp_path / "out")
    assert code == 0
    assert str(tmp_path / "out") in out
    assert (tmp_path / "out" / "README.md").is_file()
    code, _, err = vila("export", model, "--format", "safetensors")
    assert (code, "--output" in err) == (2, True)
    flags = ("--format", "compressed-tensors", "--output", tmp_path / "b")
    code, _, err = vila("export", model, *flags, "--group-size", 128)
    assert code == 1
    assert "--group-size" in err and {32, 64} <= set(numbers(err))
    assert not (tmp_path / "b").exists()
    code, _, err = vila("export", model, *flags)
    assert code == 0
    assert 64 in numbers(err)
    config = read_json(tmp_path / "b" / "config.json")["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 64


def test_the_previous_export_is_restored_after_a_kill(model, tmp_path):
    source, out = open_source(model), tmp_path / "out"
    write_export(source, "safetensors", out)
    (out / "mine").touch()
    killed_writer(out, replaced=True)
    # What was there before the kill is not replaced without being asked for either.
    with pytest.raises(ConfigError):
        write_export(source, "safetensors", out)
    assert (out / "mine").exists()
    write_export(source, "safetensors", out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def free_space(monkeypatch, num_bytes):
    """Let the disk have that much room."""
    total, used, _ = shutil.disk_usage(".")
    usage = type(shutil.disk_usage("."))(total, used, num_bytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_too_little_disk_space_is_an_error_before_weights_are_read(model, tmp_path, monkeypatch):
    source = open_source(model)
    least = source.min_llm_bytes
    assert 0 < least < source.num_bytes
    free_space(monkeypatch, least - 1)
    monkeypatch.setattr(type(source), "rows", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ConfigError) as caught:
        write_export(source, "safetensors", tmp_path / "out")
    assert (caught.value.field, caught.value.value) == ("--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_only_the_vision_tower_is_written_without_the_llm():
    assert [name for name in EXPORTS if not EXPORTS[name].has_llm] == ["onnx"]
