"""What `vila bench decode` measures: the right bytes, the right backend, and answers that can be compared."""

import json

import pytest
import torch

from vila.bench.decode import (
    Load,
    Result,
    Spread,
    agreement,
    compare,
    device_table,
    measure,
    reference_logits,
    result_table,
    step_bytes,
    subject_of,
)
from vila.bench.model_shapes import SHAPES, random_model, text_config
from vila.core.errors import ConfigError
from vila.model.int4_weights import int4_weights

SHORT = Load(context=6, batch=2, tokens=5, runs=2, check=24)
TINY = SHAPES["tiny"]


def model(**options):
    return random_model(TINY, torch.float32, context=64, **options)


@pytest.mark.parametrize(("name", "billions"), [("vila-7b", 6.74), ("vila-13b", 13.02), ("tinyllama", 1.10)])
def test_shapes_have_the_sizes_of_the_models_they_are_named_after(name, billions):
    shape = SHAPES[name]
    width, kv = shape.width, shape.width // shape.heads * shape.kv_heads
    block = 2 * width * width + 2 * width * kv + 3 * width * shape.mlp + 2 * width
    heads = shape.vocab * width * (1 if shape.tied else 2)
    assert (shape.layers * block + heads + width) / 1e9 == pytest.approx(billions, abs=0.005)
    assert text_config(shape, 99).max_position_embeddings == 99


def test_random_weights_are_the_same_every_time_and_in_the_type_asked_for():
    ids = torch.arange(20)[None]
    for options in ({}, {"group_size": 64}):
        one, other = (model(**options)(input_ids=ids).logits for _ in range(2))
        assert torch.equal(one, other)
        assert 0.01 < one.std() < 100
    half = random_model(TINY, torch.bfloat16, context=64)
    assert {value.dtype for value in half.language_model.parameters()} == {torch.bfloat16}
    assert len(int4_weights(model(group_size=64))) == 7 * TINY.layers


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError) as caught:
        random_model(SHAPES["smollm"], torch.float32, group_size=128)
    assert (caught.value.field, caught.value.value) == ("group_size", 128)


def test_a_step_reads_blocks_norm_and_head_once():
    block = 4 * 128 * 128 - 2 * 128 * 64 + 3 * 128 * 256
    dense = 2 * (block + 2 * 128) + 128 + 512 * 128
    assert step_bytes(model()) == 4 * dense
    four_bit = 2 * (block // 2 + block // 64 * 3) + 4 * (2 * 2 * 128 + 128 + 512 * 128)
    assert step_bytes(model(group_size=64)) == four_bit


@pytest.mark.parametrize(
    ("options", "group_size", "precision", "backend"),
    [
        ({}, 0, "float32", "torch"),
        ({"cuda_graph": True}, 0, "float32", "torch, CUDA graphs"),
        ({"backend": "torch"}, 64, "int4", "torch, "),
        ({"backend": "onnx"}, 0, "float32", "onnx, 32-bit head"),
        ({}, 64, "int4", "onnx, 8-bit head, 8-bit activations"),
        (
            {"head_bits": 32, "backend": "onnx", "activation_bits": 16},
            64,
            "int4",
            "onnx, 32-bit head, 16-bit activations",
        ),
    ],
)
def test_every_backend_is_measured_and_compared(options, group_size, precision, backend, monkeypatch):
    monkeypatch.setattr("vila.bench.decode.read_bandwidth", lambda device: 1e9)
    subject = subject_of(model(group_size=group_size), "tiny", **options)
    assert subject.precision == precision
    assert subject.backend.startswith(backend)
    found = measure(subject, SHORT)
    assert found.load == SHORT
    assert found.decode.minimum <= found.decode.median <= found.decode.maximum
    assert found.step_bytes > subject.step_bytes
    assert found.of_limit == pytest.approx(found.step_bytes / (found.step_ms / 1e3) / 1e9)
    assert found.agreement.tokens == 24
    assert found.agreement.same_clear == 1
    rounds = backend.endswith("8-bit activations")
    assert (found.agreement.error > 1e-3) == rounds
    json.dumps(found.facts())


def test_a_step_of_the_measured_run_computes_what_the_reference_does():
    subject = subject_of(model(), "tiny")
    found = agreement(subject.model, subject.new_runner(1)[0], 30, text=list(range(40, 71)))
    assert (found.tokens, found.same, found.same_clear) == (30, 1, 1)
    assert abs(found.nll_change) < 1e-5


def test_the_reference_multiplies_by_itself_and_leaves_the_backend_as_it_was():
    four_bit = model(group_size=64)
    exact = reference_logits(four_bit, list(range(20)))
    subject = subject_of(four_bit, "tiny", backend="torch")
    assert torch.allclose(reference_logits(four_bit, list(range(20))), exact)
    assert subject.backend == subject_of(four_bit, "tiny", backend="torch").backend


def test_agreement_is_counted_where_the_lead_is_clear_and_everywhere():
    exact = torch.tensor([[3.0, 0.0, 0.0, 0.0], [1.0, 0.99, 0.0, 0.0]])
    fast = exact + torch.tensor([[0.0, 0.0, 0.02, -0.02], [-0.02, 0.02, 0.0, 0.0]])
    found = compare(fast, exact, torch.tensor([0, 1]))
    assert (found.same, found.clear, found.same_clear) == (0.5, 0.5, 1)
    assert found.error == pytest.approx(0.0142 / exact.std().item(), rel=0.01)
    assert found.nll_change == pytest.approx(-0.01, abs=1e-3)


def test_impossible_loads_are_refused_all_at_once():
    with pytest.raises(ConfigError) as caught:
        Load(context=0, tokens=1)
    assert len(caught.value.problems) == 2


def result(title, precision, rate, batch=1, context=16):
    spread = Spread(rate, rate, rate)
    load = Load(context=context, batch=batch)
    return Result(title, precision, "torch", "cpu", load, spread, spread, spread, 1.0, 10, 1e10, 0.5, None, None)


def test_the_table_of_devices_holds_what_was_published_and_leaves_empty_what_was_not_measured():
    text = device_table(
        [
            result("VILA-7B", "int4", 7.25),
            result("VILA-7B", "int4", 30.0, batch=4),
            result("VILA-7B", "int4", 6.0, context=640),
            result("VILA-13B", "bfloat16", 1.0),
            result("SmolLM2-135M", "int4", 200.0),
        ],
        "a laptop",
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert rows[0] == [
        "tokens/s", "weights", "A100 (published)", "RTX 4090 (published)", "Orin (published)", "a laptop (measured)",
    ]  # fmt: skip
    assert rows[2:] == [
        ["VILA-7B", "fp16", "81.6", "58.5", "11.5", ""],
        ["VILA-7B", "int4", "155.3", "168.1", "35.6", "7.2"],
        ["VILA-13B", "fp16", "48.5", "out of memory", "6.1", "1.0"],
        ["VILA-13B", "int4", "102.1", "99.0", "17.5", ""],
    ]


def test_every_line_of_the_results_has_all_cells():
    lines = result_table([result("VILA-7B", "int4", 7.25)]).splitlines()
    assert lines[0] == "Memory bandwidth: 10.0 GB/s."
    assert len({line.count("|") for line in lines[2:]}) == 1
