"""Rows of a pool that grow together by onnxruntime, and those between them that do not."""

import pytest
import torch

from tests.engine.onnx_fixtures import IDS, embeds, full, torch_engine
from vila.engine.onnx.program import OnnxProgram
from vila.engine.onnx.runner import OnnxRunner
from vila.engine.ragged_attention import TokenRange

ROWS = {0: 20, 1: 32, 3: 7}
"""Tokens of the prompt in each row of four; row 2 is empty."""


@pytest.fixture
def run():
    engine = torch_engine()
    run = OnnxRunner(engine.model, engine._features, 4 * 64, OnnxProgram(engine.model, threads=1))
    run.pool.divide(4)
    pieces = [(TokenRange(row, 0, count), embeds(engine)[0, :count]) for row, count in ROWS.items()]
    run.forward([], pieces, [])
    return run, full(engine)


def grow(run, *rows):
    return run.forward([(TokenRange(row, ROWS[row], 1), int(IDS[0, ROWS[row]])) for row in rows], [], [])


def test_rows_of_different_lengths_grow_together(run):
    run, wanted = run
    found = grow(run, 0, 1, 3)
    for logits, count in zip(found, ROWS.values(), strict=True):
        assert torch.allclose(logits, wanted[count], atol=1e-4)


def test_rows_that_rest_keep_what_they_have(run):
    run, wanted = run
    before = [both[:, 1].clone() for both in run.pool.buffers]
    grow(run, 0, 3)
    assert all(torch.equal(both[:, 1], kept) for both, kept in zip(run.pool.buffers, before, strict=True))
    assert torch.allclose(grow(run, 1)[0], wanted[ROWS[1]], atol=1e-4)


def test_a_prompt_goes_on_piece_by_piece_beside_steps(run):
    run, wanted = run
    rest = embeds(torch_engine())[0, 32:40]
    found = run.forward([(TokenRange(3, 7, 1), int(IDS[0, 7]))], [(TokenRange(1, 32, 8), rest)], [0])
    assert torch.allclose(found, wanted[[7, 39]], atol=1e-4)


def test_no_more_rows_stay_bound_than_are_worth_it(run, monkeypatch):
    monkeypatch.setattr("vila.engine.onnx.runner._BINDINGS", 2)
    run, wanted = run
    for rows in ((0,), (1,), (3,), (0, 1), (0,)):
        assert torch.allclose(grow(run, *rows)[0], wanted[ROWS[rows[0]]], atol=1e-4)
    assert len(run._bindings) == 2


def test_a_run_that_fails_leaves_the_resting_rows_as_they_were(run, monkeypatch):
    run, wanted = run

    def broken(self, lengths):
        for both in run.pool.buffers:
            both[:, :, :, 0] = torch.nan
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr("vila.engine.onnx.program.Binding.run", broken)
        with pytest.raises(RuntimeError):
            grow(run, 0, 3)
    torch.testing.assert_close(grow(run, 1)[0], wanted[ROWS[1]], rtol=1e-4, atol=1e-4)
