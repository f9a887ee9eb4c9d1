"""How progress is shown: on 80 columns, in a log, and how long it says that work will take."""

import io
from contextlib import suppress

import pytest
from rich.console import Console

from vila.cli import progress
from vila.cli.progress import Screen, write_count, write_facts
from vila.core.errors import Interrupted
from vila.core.progress import task

STEP = {"step": 12345, "loss": 1.23456, "lr": 1.874e-5, "tokens/s": 8123.4, "MFU": 0.4123, "GiB": 71.34}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_facts_are_written_for_readers():
    assert write_facts(STEP) == "step 12,345  loss 1.235  lr 1.87e-5  8,123 tokens/s  MFU 41.2 %  71.34 GiB"
    assert write_facts({"exact": "81.2%", "lr": 0.0, "loss": 12.0}) == "exact 81.2%  lr 0  loss 12"


@pytest.mark.parametrize(
    ("done", "total", "unit", "text"),
    [
        (45, 100, "%", "45 %"),
        (4567, 10000, "%", "45.7 %"),
        (1200, 9673, "questions", "1,200/9,673 questions"),
        (1200, None, "files", "1,200 files"),
    ],
)
def test_counts_are_written_for_readers(done, total, unit, text):
    assert write_count(done, total, unit) == text


def test_a_step_of_training_fits_80_columns():
    console = Console(width=80, force_terminal=True, file=io.StringIO(), color_system=None)
    screen = Screen(console)
    name = "vila_1_5_13b_3_sft_lora"
    screen.started(name, 100, "%")
    screen.advanced(name, 45, **STEP)
    with console.capture() as drawn:
        for part in screen._bars.get_renderables():
            console.print(part)
    lines = drawn.get().splitlines()
    assert len(lines) == 2 and all(len(line.rstrip()) <= 80 for line in lines)
    assert name in lines[0] and "45 %" in lines[0]
    assert lines[1].strip() == write_facts(STEP)


def test_work_inside_other_work_leaves_no_bar_behind():
    screen = Screen(Console(width=80, force_terminal=True, file=io.StringIO()))
    screen.started("training", 100, "%")
    for _ in range(3):
        screen.started("evaluation", 10, "questions")
        screen.advanced("evaluation", 10)
        screen.finished("evaluation")
    screen.finished("training")
    assert [task.description for task in screen._bars.tasks] == ["training"]


def test_a_log_has_lines_with_facts_and_the_time_left(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    out = io.StringIO()
    screen = Screen(Console(width=80, file=out))
    screen.started("training", 100, "%")
    for _ in range(5):
        screen.advanced("training", 1, step=3, loss=2.5)
        clock.now += 10
    screen.finished("training")
    lines = out.getvalue().splitlines()
    assert lines[0] == "training ..." and lines[-1] == "training: done in 50 s"
    assert lines[1] == "training: 3 %  step 3  loss 2.5  16\N{NO-BREAK SPACE}min 10\N{NO-BREAK SPACE}s left"
    assert len(lines) == 4  # one in 15 seconds, not one for each step


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "done in"),
        (Interrupted("x"), "stopped after"),
        (KeyboardInterrupt(), "stopped after"),
        (OSError(), "failed after"),
    ],
)
def test_the_last_line_of_a_log_has_the_outcome(error, outcome):
    out = io.StringIO()
    with suppress(Interrupted, KeyboardInterrupt, OSError), task(Screen(Console(width=80, file=out)), "training"):
        if error:
            raise error
    assert out.getvalue().splitlines()[-1] == f"training: {outcome} 0 s"


def test_progress_of_an_earlier_run_does_not_count_for_the_time_left(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    out = io.StringIO()
    screen = Screen(Console(width=80, file=out))
    screen.started("training", 1000)
    for amount in (500, 1, 1):
        screen.advanced("training", amount)
        clock.now += 20
    assert out.getvalue().splitlines()[-1] == "training: 502/1,000  2\N{NO-BREAK SPACE}h 46\N{NO-BREAK SPACE}min left"


def test_without_a_total_no_time_is_shown(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    out = io.StringIO()
    screen = Screen(Console(width=80, file=out))
    screen.started("files", unit="files")
    for _ in range(3):
        screen.advanced("files")
        clock.now += 20
    assert out.getvalue().splitlines()[-1] == "files: 3 files"
