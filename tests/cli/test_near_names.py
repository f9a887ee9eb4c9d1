"""Wherever a name is accepted, a misspelt one is answered with the name that is meant."""

import re

import pytest

from tests.train.tiny_run import tiny_recipe, write_training_files
from vila.config.load import save_recipe


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("train", "3_sft", "--dry-run"), "small/3_sft"),
        (("train", "Starter/3-SFT", "--dry-run"), "starter/3_sft"),
        (("train", "mine", "--dry-run"), "mine.yaml"),
        (("train", "starter/3_sft", "--dry-run", "data.packing=Row"), "rows"),
        (("train", "starter/3_sft", "--dry-run", "stage.Learning_rate=1", "stage.tun=[llm]"), "tune"),
        (("train", "starter/3_sft", "--slurm", "node=2"), "nodes"),
        (("plan", "vila_7b/3_stf"), "vila_7b/3_sft"),
        (("plan", "vila_7b/3_sft", "--gpus", "8xL4S"), "L40S"),
        (("run", "{model}", "-p", "x", "--template", "Vicuna-V1"), "vicuna_v1"),
        (("run", "{model}", "-p", "x", "--shot", "txt=a"), "text"),
        (("run", "{model}", "-p", "x", "--dtype", "bfloat15"), "bfloat16"),
        (("serve", "{model}", "--device", "gpu"), "cpu"),
        (("chat", "{model}", "--backend", "torch2"), "torch"),
        (("quantize", "{model}", "--output", "{tmp}/x", "--method", "awk"), "awq"),
        (("bench", "decode", "--shape", "vila-7b", "--precision", "int8"), "int4"),
        (("eval", "{model}", "--benchmarks", "mm-bench-cm"), "mmbench_cn"),
        (("score", "text-vqa2", "--data", "no", "--predictions", "no"), "textvqa"),
        (("convert", "{model}", "{tmp}/x", "--layout", "llava_hf"), "llava-hf"),
        (("export", "{model}", "--format", "TensorRT", "--output", "{tmp}/x"), "tensorrt-llm"),
        (("export", "{model}", "--format", "gguf", "--precision", "q4", "--output", "{tmp}/x"), "q4_0"),
        (("bench", "decode", "--shape", "vila7b"), "vila-7b"),
        (("bench", "quality", "{model}", "--output", "{tmp}/x", "--methods", "full,awq-image"), "awq-images"),
        (("data", "check", "{tmp}/data.json", "--format", "LLaVA"), "llava_json"),
        (("data", "index", "{tmp}/data.json", "--format", "web-dataset"), "webdataset"),
        (("data", "check", "{tmp}/data.json", "--format", "mmc4", "--format-option", "Max-Images=2"), "max_images"),
        (("data", "prepare", "m3it", "{tmp}", "--dataset", "vqav2", "--output", "{tmp}/x"), "vqa-v2"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_one_that_is_meant(vila_error, model, tmp_path, monkeypatch, words, meant):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.json").write_text("[]")
    save_recipe(tiny_recipe(write_training_files(tmp_path), "out", "budget.tokens=200"), tmp_path / "mine.yaml")
    error = vila_error(*(word.format(model=model, tmp=tmp_path) for word in words))
    hints = [problem.hint or "" for problem in getattr(error, "problems", (error,))]
    suggested = {name for hint in hints for name in re.findall(r"'([^']+)'", hint.partition("?")[0])}
    assert error.exit_code == 2
    assert meant in suggested
