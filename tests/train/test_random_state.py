"""Random numbers: their state comes back exactly, and no two ranks, steps or seeds draw the same."""

import random

import numpy as np
import pytest
import torch

from tests.train.finish import on_step
from tests.train.ranks import run_ranks
from tests.train.tiny_run import tiny_recipe, write_training_files
from vila.train.build import build
from vila.train.random_state import random_state, seed_everything, set_random_state


@pytest.mark.parametrize("spare", [False, True])
def test_random_states_come_back_exactly(spare):
    seed_everything(3, 1, 0)
    if spare:  # Python and NumPy make normal numbers in pairs, and keep the second one.
        random.gauss(0, 1)
        np.random.standard_normal()
    kept = {name: value.clone() for name, value in random_state().items()}
    drawn = [draw() for _ in range(2)]
    set_random_state(kept)
    assert [draw() for _ in range(2)] == drawn
    set_random_state(kept)
    assert all(torch.equal(value, kept[name]) for name, value in random_state().items())


def draw():
    return torch.rand(3).tolist(), random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.rand()


def test_ranks_and_steps_draw_different_numbers():
    drawn = set()
    for numbers in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]:
        seed_everything(*numbers)
        drawn.add(str(draw()))
    assert len(drawn) == 4


def numbers_in_training(folder, out):
    drawn = []
    run = build(tiny_recipe(folder, out, "budget.tokens=400"))
    run.trainer.callbacks.append(on_step(lambda trainer, facts: drawn.append(str(draw()))))
    run.trainer.run()
    run.trainer.checkpointer.writer.wait()
    return drawn


def test_ranks_of_a_run_draw_different_numbers(tmp_path):
    training_files = write_training_files(tmp_path)
    ours, theirs = run_ranks(2, numbers_in_training, training_files, "drawn")
    assert ours
    assert not set(ours) & set(theirs)
