"""The original's three training scripts, by their names and positional arguments, over `vila train`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from scripts.make_eval_data import make_eval_data
from tests.config.tiny_inputs import write_data, write_parts
from vila.model.loading import load_model

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts" / "v1_5" / "paper"
NEVER = ("SLURM_JOB_NUM_NODES", "SLURM_PROCID", "SLURM_JOB_NODELIST", "BATCH_SIZE", "ACC_STEP", "CUDA_VISIBLE_DEVICES")
PRINT = '#!/bin/bash\nprintf "%s\\n" "$(basename "$0")" "$@"\n'


def program(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.fixture
def call(tmp_path):
    """Call a script in an empty directory with fake commands that print their arguments."""
    bin_folder = tmp_path / "bin"
    for name in ("vila", "torchrun"):
        program(bin_folder, name, PRINT)
    program(bin_folder, "nvidia-smi", "#!/bin/bash\nexit 9\n")
    program(bin_folder, "scontrol", '#!/bin/bash\n[ "$*" = "show hostnames n[1-16]" ] && printf "n1\\nn2\\n"\n')
    work = tmp_path / "work"
    work.mkdir()

    def run(name, *arguments, **variables):
        environment = {key: value for key, value in os.environ.items() if key not in NEVER}
        environment |= {"PATH": f"{bin_folder}:{os.environ['PATH']}"} | variables
        command = ["bash", str(SCRIPTS / name), *map(str, arguments)]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.splitlines(), done.stderr

    run.work, run.bin = work, bin_folder
    return run


def finished(folder, llm=""):
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"name": "x", "model": {"path": "", "llm": llm}}))


def test_stage_1_has_the_original_defaults(call):
    code, lines, _ = call("1_mm_align.sh")
    assert code == 0
    assert lines == ["vila", "train", "vila_7b/1_align", "name='llava-v1.5-7b-mm-align'",
                     "model.llm=lmsys/vicuna-7b-v1.5", "output.dir=checkpoints/llava-v1.5-7b-mm-align"]  # fmt: skip


def test_stage_2_works_in_code_path_on_the_output_of_stage_1(call, tmp_path):
    code_path = tmp_path / "code"
    finished(code_path / "checkpoints" / "align", llm="some/base")
    code, lines, _ = call("2_pretrain_mmc4_coyo.sh", code_path, "some/base", "align", "pre", "seed=3")
    assert code == 0
    assert lines == ["vila", "train", "vila_7b/2_pretrain", "name='pre'", "model.path=checkpoints/align/model",
                     "output.dir=checkpoints/pre", "seed=3"]  # fmt: skip


@pytest.mark.parametrize("stage2", ["pre", "checkpoints/pre", "checkpoints/pre/model", "./checkpoints/pre"])
def test_stage_3_takes_the_name_the_run_or_the_model(call, stage2):
    finished(call.work / "checkpoints" / "pre")
    code, lines, _ = call("3_sft.sh", stage2, "sft")
    assert code == 0
    assert lines[:4] == ["vila", "train", "vila_7b/3_sft", "name='sft'"]
    assert Path(lines[4].removeprefix("model.path=")) == Path("checkpoints/pre/model")


def test_batch_size_accumulates_to_the_same_global_batch_and_acc_step_changes_it(call):
    assert call("1_mm_align.sh", "b", "o", BATCH_SIZE="4")[1][3:4] == ["batch.micro=4"]
    _, lines, _ = call("1_mm_align.sh", "b", "o", ACC_STEP="2", BATCH_SIZE="4")
    assert lines[3:5] == ["batch.micro=4", "batch.samples=8"]
    lines = call("1_mm_align.sh", "b", "o", ACC_STEP="2", SLURM_JOB_NUM_NODES="2", NPROC_PER_NODE="8")[1]
    assert "batch.samples=1024" in lines  # 32 as the script has it, two times, on 16 GPUs


ON_SLURM = {"SLURM_JOB_NUM_NODES": "16", "SLURM_PROCID": "3", "SLURM_JOB_NODELIST": "n[1-16]", "MASTER_PORT": "7"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, [1, 0, 8, "127.0.0.1", 25001]),
        ({"CUDA_VISIBLE_DEVICES": "2,5"}, [1, 0, 2, "127.0.0.1", 25001]),
        ({"NPROC_PER_NODE": "4"}, [1, 0, 4, "127.0.0.1", 25001]),
        (ON_SLURM, [16, 3, 8, "n1", 7]),
    ],
)
def test_slurm_and_the_available_gpus_determine_the_number_of_processes(call, variables, expected):
    program(call.bin, "nvidia-smi", '#!/bin/bash\nfor i in $(seq 8); do echo "GPU $i: x"; done\n')
    code, lines, _ = call("1_mm_align.sh", "b", "o", **variables)
    names = ("nnodes", "node-rank", "nproc-per-node", "master-addr", "master-port")
    assert code == 0
    assert lines[:6] == ["torchrun", *(f"--{name}={value}" for name, value in zip(names, expected, strict=True))]
    assert lines[6:9] == ["--no-python", "vila", "train"]


def test_dry_run_asks_vila_alone(call):
    lines = call("1_mm_align.sh", VILA_DRY_RUN="1", NPROC_PER_NODE="8")[1]
    assert (lines[0], lines[-1]) == ("vila", "--dry-run")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("2_pretrain_mmc4_coyo.sh", (".", "b", "align"), "CODE_PATH BASE_MODEL STAGE1 OUTPUT"),
        ("3_sft.sh", ("pre",), "STAGE2 OUTPUT"),
        ("3_sft.sh", ("none", "sft"), "no trained model there, nor in checkpoints/none; the stage before has not"),
        ("2_pretrain_mmc4_coyo.sh", (".", "other/base", "align", "pre"), "trained with some/base, not with other/base"),
        ("2_pretrain_mmc4_coyo.sh", (".", "b", "old", "pre"), "vila convert checkpoints/old checkpoints/old/model"),
    ],
)
def test_missing_files_are_reported_and_nothing_runs(call, name, arguments, message):
    finished(call.work / "checkpoints" / "align", llm="some/base")
    (call.work / "checkpoints" / "old").mkdir()
    for file in ("mm_projector.bin", "config.json"):
        (call.work / "checkpoints" / "old" / file).touch()
    code, lines, errors = call(name, *arguments)
    assert (code, lines) == (2, [])
    assert message in errors


@pytest.mark.slow
def test_the_three_scripts_train_one_model_after_the_other(call, tmp_path):
    parts, data = write_parts(tmp_path), write_data(tmp_path)
    program(call.bin, "vila", f'#!/bin/bash\nexec {sys.executable} -m vila.cli.main "$@"\n')
    small = ["batch.samples=4", "batch.micro=1", "compute.workers=0"]

    def sets(*formats):
        entries = [{"format": name, "path": str(data[name]), "image_root": str(tmp_path)} for name in formats]
        return [f"data.mixture={entries}", *small]

    align = [parts / "llm", "align", f"model.vision={parts / 'clip'}", "model.image_size=28", *sets("llava_json")]
    for name, arguments in (
        ("1_mm_align.sh", align),
        ("2_pretrain_mmc4_coyo.sh", [call.work, parts / "llm", "align", "pre", *sets("mmc4", "coyo")]),
        ("3_sft.sh", ["pre", "sft", *sets("llava_json", "vflan")]),
    ):
        code, _, errors = call(name, *arguments, PYTHONPATH=os.pathsep.join(sys.path))
        assert code == 0, errors
    model, _ = load_model(call.work / "checkpoints" / "sft" / "model")
    assert model.config.template == "vicuna_v1"
    code, _, errors = call("3_sft.sh", "pre", "sft", *sets("llava_json", "vflan"), PYTHONPATH=os.pathsep.join(sys.path))
    assert code == 0
    assert "already trained" in errors
    # What was trained is evaluated on all ten benchmarks, and the servers' files are collected.
    make_eval_data(call.work / "playground" / "data" / "eval")
    scripts = ROOT / "scripts" / "v1_5" / "eval"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PATH": f"{call.bin}:{os.environ['PATH']}"}
    for command in (
        ["bash", scripts / "eval_all.sh", "checkpoints/sft", "mine"],
        [sys.executable, scripts / "copy_predictions.py", "mine"],
    ):
        done = subprocess.run(command, cwd=call.work, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    out = call.work / "eval_output" / "mine"
    assert (out / "report.html").is_file()
    scored = json.loads((out / "eval.json").read_text())
    assert len(scored["benchmarks"]) == 10 and not scored["left_out"]
    upload = call.work / "playground" / "data" / "predictions_upload" / "mine"
    assert {path.parent.name for path in upload.glob("*/mine-*")} >= {"vqav2", "vizwiz", "mmbench", "mmbench_cn"}
