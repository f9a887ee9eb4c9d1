"""A run on clips: workers change nothing, cached features come to the same, and a broken clip is a counted fault."""

import json

import pytest

from tests.media.test_video import video_bytes
from tests.train.stand import stand_recipe, write_stand
from vila.core.files import sha256_tree
from vila.train.build import build, model_dir
from vila.train.metrics_log import read_metrics

ANSWER = {"role": "assistant", "content": "yes"}


@pytest.fixture(scope="module")
def stand(tmp_path_factory):
    """The stand with three records about clips; the second shows a picture beside its clip."""
    folder = write_stand(tmp_path_factory.mktemp("stand"), records=9)
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


def test_a_run_on_clips_is_the_same_with_workers_and_near_with_cached_features(stand):
    options = ("budget.tokens=0", "budget.epochs=2")
    alone, helped, cached = (
        stand_recipe(stand, name, *options, *more)
        for name, *more in (("alone",), ("helped", "compute.workers=1"), ("cached", "compute.feature_cache=true"))
    )
    expected = losses(alone)
    assert losses(helped) == expected
    assert sha256_tree(model_dir(helped), "*.safetensors") == sha256_tree(model_dir(alone), "*.safetensors")
    assert losses(cached) == pytest.approx(expected, rel=1e-4)  # measured: 0 in three steps, fp32, torch 2.13


def test_a_broken_clip_takes_its_sample_out_of_the_run(stand):
    broken = stand / "2.mp4"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    try:
        recipe = stand_recipe(stand, "broken", "budget.tokens=0", "budget.epochs=1", "data.max_faults=2")
        build(recipe).train()
    finally:
        broken.write_bytes(whole)
    faults = [json.loads(line) for line in (recipe.output.dir / "faults.jsonl").read_text().splitlines()]
    assert faults and all("sample 'clip2'" in fault["reason"] and "2.mp4" in fault["reason"] for fault in faults)
