"""Training on videos: workers change nothing, cached features agree, a broken video is a bad sample."""

import json

import pytest

from tests.media.test_video import video_bytes
from tests.train.tiny_run import tiny_recipe, write_training_files
from vila.core.files import sha256_tree
from vila.train.build import build, model_dir
from vila.train.metrics import read_metrics

ANSWER = {"role": "assistant", "content": "yes"}


@pytest.fixture(scope="module")
def training_files(tmp_path_factory):
    """Training files with three video records; the second has an image, too."""
    folder = write_training_files(tmp_path_factory.mktemp("train"), records=9)
    rows = (folder / "data.jsonl").read_text().splitlines()
    for number in range(3):
        (folder / f"{number}.mp4").write_bytes(video_bytes("mp4", "mpeg4", 6 + number))
        shown = [{"type": "video", "path": f"{number}.mp4", "num_frames": 3}, {"type": "image", "path": "0.png"}]
        question = {"role": "user", "content": [*shown[: 1 + number % 2], "What?"]}
        rows.append(json.dumps({"id": f"clip{number}", "messages": [question, ANSWER]}))
    (folder / "data.jsonl").write_text("".join(row + "\n" for row in rows))
    return folder


def losses(recipe):
    build(recipe).train()
    return [row["loss"] for row in read_metrics(recipe.output.dir / "metrics.jsonl")]


def test_a_run_on_videos_is_the_same_with_workers_and_near_with_cached_features(training_files):
    options = ("budget.tokens=0", "budget.epochs=2")
    alone, helped, cached = (
        tiny_recipe(training_files, name, *options, *more)
        for name, *more in (("alone",), ("helped", "compute.workers=1"), ("cached", "compute.feature_cache=true"))
    )
    expected = losses(alone)
    assert losses(helped) == expected
    assert sha256_tree(model_dir(helped), "*.safetensors") == sha256_tree(model_dir(alone), "*.safetensors")
    assert losses(cached) == pytest.approx(expected, rel=1e-4)  # measured: 0 in three steps, fp32, torch 2.13


def test_a_broken_video_takes_its_sample_out_of_the_run(training_files):
    broken = training_files / "2.mp4"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    try:
        recipe = tiny_recipe(training_files, "broken", "budget.tokens=0", "budget.epochs=1", "data.max_faults=2")
        build(recipe).train()
    finally:
        broken.write_bytes(whole)
    faults = [json.loads(line) for line in (recipe.output.dir / "faults.jsonl").read_text().splitlines()]
    assert faults and all("clip2" in fault["reason"] and str(broken) in fault["reason"] for fault in faults)
