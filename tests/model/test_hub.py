"""Hub ids: only needed files are downloaded, revisions are pinned, a second call needs no network."""

import pytest
from huggingface_hub import constants

from tests.hub_stub import REPOSITORY, hub
from tests.model.layouts.published import FIXTURES
from vila.core.errors import DownloadError, LayoutError
from vila.model.hub import local_folder, needed_files
from vila.model.loading import load_model


@pytest.fixture(scope="module")
def revisions(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    old, new = FIXTURES["v15-odd-grid"](root / "old").folder, FIXTURES["v15-even-grid"](root / "new").folder
    # What a published repository holds besides, and nobody needs.
    for name in ("README.md", "trainer_state.json", "optimizer.pt", "llm/pytorch_model.bin", "images/demo.png"):
        (new / name).parent.mkdir(exist_ok=True)
        (new / name).write_bytes(b"not needed")
    return {"main": new, "v0": old}


def point_at(monkeypatch, address):
    """Set the endpoint, as HF_ENDPOINT does before huggingface_hub is imported."""
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def stub(revisions, tmp_path, monkeypatch):
    with hub(revisions) as (address, record):
        point_at(monkeypatch, address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield record


def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_only_the_needed_files_are_fetched_and_only_once(stub, monkeypatch):
    model, _ = load_model(REPOSITORY)
    assert model.config.vision_config.image_size == 56
    assert sorted(stub.fetched) == [
        "config.json",
        "llm/config.json",
        "llm/model.safetensors",
        "llm/special_tokens_map.json",
        "llm/tokenizer.model",
        "llm/tokenizer_config.json",
        "mm_projector/config.json",
        "mm_projector/model.safetensors",
        "vision_tower/config.json",
        "vision_tower/model.safetensors",
        "vision_tower/preprocessor_config.json",
    ]
    stub.fetched.clear()
    local_folder(REPOSITORY)
    assert stub.fetched == []
    offline(monkeypatch)
    asked = stub.requests
    again, _ = load_model(REPOSITORY)
    assert again.config.vision_config.image_size == 56
    assert stub.requests == asked


def test_a_revision_is_pinned(stub):
    model, _ = load_model(REPOSITORY, revision="v0")
    assert model.config.vision_config.image_size == 70
    with pytest.raises(DownloadError) as caught:
        load_model(REPOSITORY, revision="v9")
    assert (caught.value.file, caught.value.field, caught.value.value) == ("owner/tiny", "revision", "v9")


def test_missing_repositories_are_errors(stub, monkeypatch):
    with pytest.raises(DownloadError) as caught:
        load_model("owner/other")
    assert caught.value.file == "owner/other"
    with pytest.raises(LayoutError) as caught:
        load_model("nowhere")
    assert caught.value.file == "nowhere"
    offline(monkeypatch)
    with pytest.raises(DownloadError) as caught:
        load_model(REPOSITORY)
    assert caught.value.file == REPOSITORY and "HF_HUB_OFFLINE" in caught.value.problem


def test_without_a_hub_a_cached_model_still_loads(stub, monkeypatch):
    local_folder(REPOSITORY)
    point_at(monkeypatch, "http://127.0.0.1:9")
    assert load_model(REPOSITORY)[0].config.vision_config.image_size == 56
    with pytest.raises(DownloadError) as caught:
        load_model("owner/other")
    assert caught.value.file == "owner/other"


def test_one_weight_format_and_its_index_are_downloaded():
    names = ["config.json", "tokenizer.model", "README.md", "flax_model.msgpack", "tf_model.h5", "model.onnx"]
    shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"]
    assert needed_files([*names, *shards]) == ["config.json", "tokenizer.model", *shards]
    safe = ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    assert needed_files([*names, *shards, *safe]) == ["config.json", "tokenizer.model", *safe]
    stage_1 = ["config.json", "mm_projector.bin", "checkpoint-100/mm_projector.bin"]
    assert needed_files(stage_1) == stage_1[:2]


def test_a_tinychat_file_is_downloaded_if_there_are_no_other_weights():
    names = ["config.json", "llm/config.json", "llm/x-w4-g128-awq-v2.pt", "llm/optimizer.pt", "quant_config.json"]
    assert sorted(needed_files(names)) == sorted(set(names) - {"llm/optimizer.pt"})
    assert needed_files(["llm/model.safetensors", "llm/x-w4-g128-awq-v2.pt"]) == ["llm/model.safetensors"]


def test_a_run_directory_resolves_to_its_model(tmp_path):
    run = tmp_path / "checkpoints" / "mine"
    FIXTURES["v15-even-grid"](run / "model")
    assert local_folder(run) == run
    (run / "recipe.yaml").write_text("name: mine\n")
    assert local_folder(run) == run / "model"
