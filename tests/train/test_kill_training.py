"""A run that is killed at random moments resumes to the same losses and weights, bit for bit."""

import random
import shutil
import signal
import time

import pytest

from tests.train.finish import assert_identical, finish
from tests.train.ranks import run_ranks
from tests.train.tiny_run import write_training_files

MOMENTS = 20
# A checkpoint after every step, beside training: about half of the moments lie within a save.
SAVES = ("batch.rows=4", "budget.tokens=6000", "output.checkpoint_every_steps=1")


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_runs_that_are_killed_at_random_moments_resume_bit_for_bit(tmp_path, world):
    training_files = write_training_files(tmp_path)
    run_ranks(world, finish, training_files, "warm", SAVES)
    began = time.monotonic()
    through = run_ranks(world, finish, training_files, "through", SAVES)[0]
    whole_s = time.monotonic() - began
    moments, reached, cut_short = random.Random(world), set(), 0
    for number in range(MOMENTS):
        out, share = f"killed-{number}", moments.uniform(0.2, 0.95)
        # On a machine that is busy with other things a run may be over before its time: then it is cut off earlier.
        while (
            run_ranks(world, finish, training_files, out, SAVES, kill_after_s=share * whole_s)
            != [-signal.SIGKILL] * world
        ):
            share *= 0.8
            shutil.rmtree(training_files / out)
        left = [path.name for path in (training_files / out).glob("checkpoint/*")]
        reached.add(max([name for name in left if not name.startswith(".")], default=""))
        cut_short += any(name.endswith(".partial") for name in left)
        assert_identical(run_ranks(world, finish, training_files, out, SAVES)[0], through)
        assert not list((training_files / out).rglob("*.partial"))
    assert len(reached) > MOMENTS // 4
    assert cut_short  # some of them in the middle of a save
