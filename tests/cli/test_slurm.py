"""`vila train --slurm`: what the script says, what is refused, and two simulated nodes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.printed import words
from tests.train.tiny_run import tiny_recipe, write_training_files
from vila.config.load import save_recipe
from vila.core.errors import MISSING, ConfigError
from vila.train.build import build, is_finished
from vila.train.metrics import read_metrics
from vila.train.slurm import parse_job, render_script

# As Slurm starts a batch script, the tasks of a step, and says which machines a job has; all of them this one.
SBATCH = """#!/bin/bash
nodes=$(sed -n 's/^#SBATCH --nodes=//p' "$1")
export SLURM_JOB_ID=7 SLURM_JOB_NODELIST="n[1-$nodes]" SLURM_NNODES=$nodes
echo "Submitted batch job 7"
bash "$1" >> "$SLURM_STAND/job.log" 2>&1 &
echo $! > "$SLURM_STAND/batch.pid"
"""
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
for node in $(seq 0 $((SLURM_NNODES - 1))); do
    SLURM_NODEID=$node SLURM_PROCID=$node "$@" &
    echo $! >> "$SLURM_STAND/tasks"
done
status=0
for pid in $(jobs -p); do wait "$pid" || status=$?; done
exit $status
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf '127.0.0.1\\n127.0.0.1\\n'; else echo "$*" >> "$SLURM_STAND/requeued"; fi
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder with stand-ins for Slurm's commands, first on PATH."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STAND", str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(os.path.abspath, filter(None, sys.path))))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return folder


def test_a_job_is_read_with_the_defaults_of_a_node_of_eight():
    job = parse_job("nodes=16,time=1-12:00:00, partition=batch")
    assert (job.nodes, job.gpus, job.world, job.time, job.partition) == (16, 8, 128, "1-12:00:00", "batch")
    assert parse_job("nodes=2,gpus=0").world == 2


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("", "--slurm", ""),
        ("gpus=8", "--slurm", "gpus=8"),
        ("nodes=0", "--slurm nodes", "0"),
        ("nodes=two", "--slurm nodes", "two"),
        ("nodes=2,gpus=-1", "--slurm gpus", "-1"),
        ("nodes=2,partitoin=x", "--slurm", "partitoin"),
        ("nodes=2,nodes=3", "--slurm nodes", MISSING),
        ("nodes=2,account=", "--slurm", "account="),
        ("nodes=2,account=a b", "--slurm account", "a b"),
    ],
)
def test_a_wrong_job_is_named_with_field_and_value(text, field, value):
    with pytest.raises(ConfigError) as refused:
        parse_job(text)
    assert (refused.value.field, refused.value.value) == (field, value)


def test_the_script_asks_slurm_for_what_was_asked_and_is_a_shell_script(tmp_path):
    job = parse_job("nodes=16,gpus=4,partition=batch,account=me,time=24:00:00,grace=120")
    words = ["train", "vila_7b/1_align", "model.llm=a b", "name='it'"]
    script = render_script(job, name="vila_7b/1_align", folder=tmp_path / "run", arguments=words)
    asked = dict(
        line.removeprefix("#SBATCH --").split("=", 1)
        for line in script.splitlines()
        if line.startswith("#SBATCH --") and "=" in line
    )
    assert asked == {
        "job-name": "vila_7b_1_align", "nodes": "16", "ntasks-per-node": "1", "gpus-per-node": "4",
        "cpus-per-task": "32", "partition": "batch", "account": "me", "time": "24:00:00",
        "output": f"{tmp_path}/run/slurm-%j.log", "open-mode": "append", "signal": "USR1@120",
    }  # fmt: skip
    assert "#SBATCH --requeue" in script.splitlines()
    assert "@" not in script.replace("USR1@120", "").replace('"$@"', "")
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_the_words_of_the_command_reach_every_node_unchanged(slurm, tmp_path):
    """With another Python in place of torchrun's, which prints what it was started with."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/bash\nprintf "%s|" "$@" >> "$SLURM_STAND/words.$SLURM_NODEID"\n')
    fake.chmod(0o755)
    words = ["train", "x.yaml", "model.llm=a b", "name='it'", 'data.mixture=[{path: "$HOME"}]']
    script = render_script(parse_job("nodes=2,gpus=0,port=29555"), name="x", folder=tmp_path / "run", arguments=words)
    (tmp_path / "job").write_text(script.replace(f"python={sys.executable}", f"python={fake}"))
    subprocess.run(["sbatch", str(tmp_path / "job")], check=True, capture_output=True)
    wait_for(lambda: not running(slurm), 10)
    for node in (0, 1):
        said = (slurm / f"words.{node}").read_text().split("|")
        start = ["-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1"]
        assert said[:5] == start
        assert said[5:7] == ["--master-addr=127.0.0.1", "--master-port=29555"]
        assert said[8:-1] == ["-m", "vila.cli.main", *words]
    assert not (slurm / "requeued").exists()


def test_dry_run_prints_the_script_and_leaves_nothing(vila, tmp_path):
    code, out, _ = vila("train", "vila_7b/2_pretrain", f"output.dir={tmp_path / 'run'}", "--slurm", "nodes=16",
                        "--allow-changes", "data", "--dry-run")  # fmt: skip
    assert code == 0
    assert out.startswith("#!/bin/bash\n")
    command = f"train vila_7b/2_pretrain output.dir={tmp_path / 'run'} --allow-changes data"
    assert command in [line.strip() for line in out.splitlines()]
    assert not (tmp_path / "run").exists()


def test_the_example_of_the_documentation_gets_a_script_and_a_smaller_micro_batch(vila, tmp_path):
    code, out, err = vila(
        "train", "vila_7b/3_sft", f"output.dir={tmp_path / 'run'}", "--slurm", "nodes=16", "--dry-run"
    )
    assert code == 0
    assert out.startswith("#!/bin/bash\n")
    assert words(err) >= {"batch.micro=16", "1"}


def test_a_batch_that_the_processes_cannot_share_is_refused_before_it_is_submitted(vila_error, slurm):
    error = vila_error("train", "vila_7b/2_pretrain", "--slurm", "nodes=3")
    assert (type(error), error.field, error.value, error.expected) == (ConfigError, "batch", 1024, "1008 or 1032")
    assert not (slurm / "job.log").exists()


def test_without_slurm_the_remedy_is_named(vila_error, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    error = vila_error("train", "vila_7b/1_align", "--slurm", "nodes=1")
    assert (type(error), error.field) == (ConfigError, "--slurm")
    assert "sbatch" in words(error.problem) and "--dry-run" in words(error.hint)


def test_the_error_of_a_refused_job_has_slurm_s_words(vila_error, slurm, tmp_path):
    (slurm / "sbatch").write_text("#!/bin/bash\necho 'invalid partition specified: x' >&2\nexit 1\n")
    given = (f"output.dir={tmp_path / 'run'}", "--slurm", "nodes=1,partition=x")
    error = vila_error("train", "vila_7b/1_align", *given)
    assert (type(error), error.file) == (ConfigError, str(tmp_path / "run" / "train.sbatch"))
    assert error.problem.count("invalid partition specified: x") == 1


def test_a_finished_run_is_not_submitted(vila, slurm, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "finished.json").write_text("{}")
    code, out, _ = vila("train", "vila_7b/1_align", f"output.dir={tmp_path / 'run'}", "--slurm", "nodes=1")
    assert code == 0
    assert str(tmp_path / "run" / "model") in words(out)
    assert not (slurm / "job.log").exists()


@pytest.mark.slow
def test_two_nodes_make_one_run_with_the_losses_of_one_process(vila, slurm, tmp_path):
    folder = write_training_files(tmp_path)
    alone = tiny_recipe(folder, "alone", "budget.tokens=600")
    build(alone).train()
    together = tiny_recipe(folder, "together", "budget.tokens=600")
    submitted(vila, slurm, together, tmp_path)
    wait_for(lambda: not running(slurm), 120)
    assert is_finished(together), (slurm / "job.log").read_text()
    assert not (slurm / "requeued").exists()
    ours, theirs = (read_metrics(recipe.output.dir / "metrics.jsonl") for recipe in (together, alone))
    assert len(theirs) >= 3
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_job_with_a_stop_signal_saves_and_resumes(vila, slurm, tmp_path, number, requeued):
    recipe = tiny_recipe(write_training_files(tmp_path), "out", "budget.tokens=40_000")
    submitted(vila, slurm, recipe, tmp_path)
    metrics = recipe.output.dir / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 5, 120)
    for task in (slurm / "tasks").read_text().split():
        os.kill(int(task), number)  # Slurm signals the tasks of a step, and nothing below them
    wait_for(lambda: not running(slurm), 60)
    said = (slurm / "job.log").read_text()
    # Only a job whose time is up is put back by its script; a preempted one by Slurm.
    assert (slurm / "requeued").exists() == requeued, said
    stopped = read_metrics(metrics)[-1]["step"]
    assert not is_finished(recipe)
    submitted(vila, slurm, recipe, tmp_path)
    wait_for(lambda: not running(slurm), 180)
    said = (slurm / "job.log").read_text()
    assert is_finished(recipe), said
    assert re.search(rf"after step {stopped}\b", said)
    steps = [row["step"] for row in read_metrics(metrics)]
    assert steps == list(range(1, len(steps) + 1))


def submitted(vila, slurm, recipe, folder):
    """Submit a recipe to two nodes of one process."""
    save_recipe(recipe, folder / f"{recipe.output.dir.name}.yaml")
    port = 20000 + os.getpid() % 20000
    code, out, err = vila("train", folder / f"{recipe.output.dir.name}.yaml", "--slurm", f"nodes=2,gpus=0,port={port}")
    assert (code, out) == (0, f"Submitted batch job 7: {recipe.output.dir}/train.sbatch\n"), err


def running(slurm):
    """Whether the batch script still runs."""
    state = Path(f"/proc/{(slurm / 'batch.pid').read_text().strip()}/stat")
    return state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(true, limit_s):
    """Wait until something is true, at most so long."""
    end = time.monotonic() + limit_s
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    assert true()
