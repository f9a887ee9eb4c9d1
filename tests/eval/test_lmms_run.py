"""lmms-eval on a local task with a tiny model; needs lmms-eval (see docs/judge.md)."""

import json
import os
import subprocess
import sys

import pytest

from tests import tiny
from vila.core.types import Message
from vila.engine.engine import Engine
from vila.model.loading import save_model

pytestmark = pytest.mark.slow
pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; see docs/judge.md")

TASK = """
task: local_shapes
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/test.jsonl}}
test_split: test
output_type: generate_until
doc_to_visual: !function shapes.visual
doc_to_text: !function shapes.text
doc_to_target: answer
generation_kwargs: {max_new_tokens: 8}
process_results: !function shapes.results
metric_list: [{metric: exact, aggregation: mean, higher_is_better: true}]
"""
FUNCTIONS = """
from PIL import Image

def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"] + "\\nAnswer the question using a single word or phrase."

def results(doc, results):
    return {"exact": float(results[0] == doc["answer"])}
"""


def test_lmms_eval_answers_equal_the_engines(tmp_path):
    save_model(*tiny.vila(template="chatml", seed=1), tmp_path / "model")
    engine = Engine.load(tmp_path / "model", dtype="float32")
    rows, wanted = [], []
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(tiny.image(number).source)
        asked = f"what is {number}?\nAnswer the question using a single word or phrase."
        wanted.append(engine.generate([Message.of("user", tiny.image(number), f"\n{asked}")], max_new_tokens=8))
        answer = wanted[-1] if number < 3 else "something else"
        rows.append({"image": str(tmp_path / f"{number}.png"), "question": f"what is {number}?", "answer": answer})
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "local_shapes.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    (tmp_path / "task" / "shapes.py").write_text(FUNCTIONS)
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "lmms_eval", "eval", "--model", "vila_native", "--tasks", "local_shapes"]
    command += [
        "--model_args",
        f"pretrained={tmp_path / 'model'},dtype=float32",
        "--include_path",
        str(tmp_path / "task"),
    ]
    command += ["--batch_size", "2", "--device", "cpu", "--log_samples", "--output_path", str(tmp_path / "out")]
    offline = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=offline, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("*samples_local_shapes.jsonl")
    (results,) = (tmp_path / "out").rglob("*_results.json")
    answers = {row["doc_id"]: row["filtered_resps"] for row in map(json.loads, samples.read_text().splitlines())}
    assert len(set(wanted)) > 1  # the images matter
    assert [answers[number] for number in range(5)] == wanted
    assert json.loads(results.read_text())["results"]["local_shapes"]["exact,none"] == pytest.approx(3 / 5)
