"""An epoch visits every sample once; the last step is smaller, on any number of ranks."""

import json
from collections import Counter

import pytest

from tests.train.finish import assert_identical, finish, stop_after
from tests.train.ranks import run_ranks
from tests.train.tiny_run import tiny_recipe, write_training_files
from vila.core.errors import Interrupted, TrainingError
from vila.core.reading import read_json
from vila.train.build import build
from vila.train.metrics import read_metrics

RECORDS = 30
UNPACKED = ("data.packing=none", "batch.rows=0", "batch.samples=4", "budget.tokens=0")
PACKED = ("data.packing=rows", "batch.rows=2", "budget.tokens=0")


@pytest.fixture(scope="module")
def training_files(tmp_path_factory):
    return write_training_files(tmp_path_factory.mktemp("train"), records=RECORDS)


def positions_of(run):
    """How often each global position was trained on; filled while the run trains."""
    seen = Counter()
    step = run.trainer.data.streams.step

    def listen():
        rows = step()
        seen.update(position for row in rows for position in row.positions)
        return rows

    run.trainer.data.streams.step = listen
    return seen


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packing", [UNPACKED, PACKED, (*UNPACKED, "data.packing=grouped")])
@pytest.mark.parametrize(("epochs", "visits"), [(1, 30), (2, 60), (0.5, 15), (0.1, 3)])
def test_each_sample_is_trained_on_once_in_an_epoch(training_files, packing, epochs, visits, workers):
    name = f"once-{workers}-{len(packing)}-{packing[0][-4:]}-{epochs}"
    options = (*packing, f"budget.epochs={epochs}", f"compute.workers={workers}")
    run = build(tiny_recipe(training_files, name, *options))
    seen = positions_of(run)
    run.train()
    assert seen == Counter(range(visits))
    assert run.trainer.progress.samples == visits
    finished = read_json(run.folder / "finished.json")
    assert finished["passes"] == pytest.approx(epochs)
    if packing is UNPACKED:
        assert run.trainer.progress.step == -(-visits // 4)


def test_the_rate_falls_to_zero_at_the_end_of_the_last_sample(training_files):
    run = build(tiny_recipe(training_files, "rate", *UNPACKED, "budget.epochs=1"))
    run.train()
    rows = read_metrics(run.folder / "metrics.jsonl")
    assert len(rows) == 8
    assert sum(row["tokens"] for row in rows) == run.trainer.progress.tokens
    assert rows[-1]["lr"] < 0.05 * max(row["lr"] for row in rows)
    assert run.trainer.schedule.budget_fraction(run.trainer.progress) == 1


def test_samples_that_are_dropped_or_unreadable_are_visits_of_the_epoch_and_not_replaced(training_files, tmp_path):
    lines = (training_files / "data.jsonl").read_text().splitlines()
    long = {"id": "long", "messages": [{"role": "user", "content": "q" * 300}, {"role": "assistant", "content": "a"}]}
    lines[3], lines[7] = json.dumps(long), '{"id": "broken"}'
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    mixture = f"data.mixture=[{{format: messages, path: {tmp_path / 'data.jsonl'}, image_root: {training_files}}}]"
    options = (*UNPACKED, "budget.epochs=2", mixture, "data.overlong=drop", "data.max_faults=1")
    run = build(tiny_recipe(training_files, "dropped", *options))
    run.train()
    progress = run.trainer.progress
    assert (progress.samples, progress.dropped, progress.unreadable) == (56, 2, 2)
    assert read_json(run.folder / "finished.json")["passes"] == 2


def test_nothing_but_unreadable_samples_at_the_end_is_no_step(training_files, tmp_path):
    lines = (training_files / "data.jsonl").read_text().splitlines()
    (tmp_path / "data.jsonl").write_text("\n".join([lines[2]] * 4 + ['{"id": "broken"}'] * 2) + "\n")
    mixture = f"data.mixture=[{{format: messages, path: {tmp_path / 'data.jsonl'}}}]"
    options = ("data.packing=none", "batch.rows=0", "batch.samples=1", "budget.tokens=0", "budget.epochs=3")
    run = build(tiny_recipe(training_files, "broken", *options, mixture, "data.max_faults=2"))
    run.train()
    assert (run.trainer.progress.step, run.trainer.progress.samples, run.trainer.progress.unreadable) == (12, 12, 6)


@pytest.mark.parametrize("options", [UNPACKED, PACKED], ids=["unpacked", "packed"])
def test_a_run_that_is_stopped_before_its_short_last_step_resumes_bit_for_bit(training_files, options):
    out, options = f"stop-{len(options)}", (*options, "budget.epochs=3", "batch.micro=2")
    through = finish(training_files, f"{out}-through", options)
    last = through[0][-1]["step"]
    with pytest.raises(Interrupted):
        build(tiny_recipe(training_files, out, *options), callbacks=[stop_after(last - 1)]).train()
    assert_identical(finish(training_files, out, options), through)


def losses(training_files, out, *options):
    """Train; loss and norm of each step, and the samples trained on."""
    run = build(tiny_recipe(training_files, out, *options))
    run.train()
    rows = read_metrics(run.folder / "metrics.jsonl")
    return [(row["loss"], row["grad_norm"]) for row in rows], run.trainer.progress.samples


@pytest.mark.parametrize(
    ("sharding", "tune"), [("full", "[vision, projector, llm]"), ("replicate", "[projector, llm]")]
)
def test_ranks_whose_data_end_first_take_part_in_the_last_step(training_files, sharding, tune):
    # 29 samples, 4 a step on 2 ranks: the last step has one, on the first rank.
    mixture = f"data.mixture=[{{format: messages, path: {training_files / 'data.jsonl'}, max_samples: 29}}]"
    options = (*UNPACKED, "budget.epochs=1", mixture, f"stage.tune={tune}", "stage.llm_parts=[]")
    out = f"ranks-{sharding}-{len(tune)}"
    alone, samples = losses(training_files, f"{out}-alone", *options)
    results = run_ranks(2, losses, training_files, out, *options, f"compute.sharding={sharding}")
    assert samples == 29
    assert all(result[1] == 29 for result in results)
    for (loss, norm), (other_loss, other_norm) in zip(results[0][0], alone, strict=True):
        # As in test_fsdp: float32 sums in another order.
        assert loss == pytest.approx(other_loss, rel=1e-5)
        assert norm == pytest.approx(other_norm, rel=1e-3)


def test_a_run_without_a_readable_sample_is_an_error_and_writes_no_model(tmp_path):
    training_files = write_training_files(tmp_path)
    (training_files / "data.jsonl").write_text('{"id": "0", "messages": [{"role": "user", "content": "a \\ud83d"}]}\n')
    recipe = tiny_recipe(
        training_files, "none", "batch.rows=1", "budget.tokens=0", "budget.epochs=1", "data.max_faults=10"
    )
    with pytest.raises(TrainingError) as caught:
        build(recipe).train()
    assert caught.value.file == str(training_files / "none" / "faults.jsonl")
    assert not (training_files / "none" / "model").exists()
