"""Every reader on mutated inputs gives a VilaError that names the file, or a result, in bounded time and memory.

`VILA_MUTATIONS` is the number of inputs (2,000 by default), `VILA_MUTATION_SEED` another set of them.
"""

import os
import random

import pytest

from tests.mutation.mutate import BYTE_MUTATIONS, VALUE_MUTATIONS
from tests.mutation.run import run_inputs
from tests.mutation.targets import targets

INPUTS = int(os.environ.get("VILA_MUTATIONS", "2000"))
TARGETS = targets()


@pytest.mark.parametrize("count", [1, pytest.param(-(-INPUTS // len(TARGETS)), marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_mutated_input_is_read_or_rejected_by_name(target, count, tmp_path):
    outcomes = run_inputs(target, range(count), tmp_path)
    assert len(outcomes) == count
    faults = [outcome for outcome in outcomes if outcome.is_fault]
    assert not faults, "\n\n".join(f"{f.kind} seed {f.seed} {f.change} {f.file}\n{f.text}" for f in faults)


@pytest.mark.parametrize("mutation", [*BYTE_MUTATIONS, *VALUE_MUTATIONS], ids=lambda one: one.__name__)
def test_mutation_is_a_function_of_its_seed(mutation):
    raw = b'{"a": [1, 2, {"b": "text"}], "c": null}'
    first, second = (mutation(raw, random.Random(5)) for _ in range(2))
    assert first == second
