"""Logits of OnnxRunner equal those of torch: float32 and INT4 weights, all families, prefills and joint steps."""

import sys

import pytest
import torch

from tests.engine.fixtures import MODELS
from tests.engine.onnx_fixtures import IDS, Decoder, embeds, full, put_back, rounded, torch_engine
from vila.core.errors import ConfigError
from vila.core.optional import MissingExtraError
from vila.engine.attention import ForwardBatch, TokenRange
from vila.engine.backend import new_runner
from vila.engine.runner_onnx import OnnxProgram
from vila.kernels.int4 import Int4Linear, dequantize, quantize
from vila.model.int4_weights import use_int4
from vila.model.loading import save_model

EXACT = 1e-4  # worst of these models and four seeds: 1.6e-5, logits up to 8.3; onnxruntime 1.32
SIZE = IDS.shape[1]


@pytest.fixture(scope="module", params=MODELS)
def engine(request):
    return torch_engine(request.param)


def stepped(decoder, engine, first=1):
    """Logits [S, V]: a prompt of `first` tokens, the others one by one."""
    head = decoder.logits_at(embeds(engine)[:, :first], range(first))
    return torch.cat([head, *(decoder.step(int(token))[None] for token in IDS[0, first:])])


def test_prefill_has_the_logits_of_torch(engine):
    found = Decoder(engine.model, threads=1).logits_at(embeds(engine), range(SIZE))
    assert (found - full(engine)).abs().max() < EXACT


def test_prefill_and_steps_have_the_logits_of_torch(engine):
    found = stepped(Decoder(engine.model, threads=1), engine, first=20)
    assert (found - full(engine)).abs().max() < EXACT


def test_chunked_prefill_has_the_logits_of_torch(engine, monkeypatch):
    monkeypatch.setattr("vila.engine.runner_onnx._CHUNK", 11)
    decoder = Decoder(engine.model, threads=1)
    places = [0, 3, 10, 11, 40, SIZE - 1]
    found = decoder.logits_at(embeds(engine), places)
    assert (found - full(engine)[places]).abs().max() < EXACT
    decoder.length = 0
    assert (decoder.prefill(embeds(engine)) - full(engine)[-1]).abs().max() < EXACT


def test_int4_with_float32_activations_has_the_logits_of_the_dequantized_model(engine):
    weights = rounded(engine)
    decoder = Decoder(engine.model, weights, threads=1, activation_bits=32)
    before = full(engine)
    kept = {name: module.weight.detach().clone() for name, module in engine.model.named_modules() if name in weights}
    put_back(engine, weights)
    try:
        wanted = full(engine)
    finally:
        modules = dict(engine.model.named_modules())
        for name, weight in kept.items():
            modules[name].weight.data = weight
    assert (before - wanted).abs().max() > 0.5
    assert (stepped(decoder, engine, first=20) - wanted).abs().max() < EXACT


@pytest.mark.parametrize(("bits", "least", "most"), [(8, 1e-2, 0.06), (16, 1e-7, 1e-3)])
def test_error_of_quantized_activations_by_bits(bits, least, most):
    # Root mean square of the difference over the spread of the logits, groups of 32, five seeds: 0.031 to 0.036 for 8.
    engine = torch_engine("qwen2")
    weights = rounded(engine)
    fast, exact = (Decoder(engine.model, weights, threads=1, activation_bits=b) for b in (bits, 32))
    wanted = stepped(exact, engine, first=7)
    error = (stepped(fast, engine, first=7) - wanted).pow(2).mean().sqrt() / wanted.std()
    assert least < error < most


@pytest.mark.parametrize("group_size", [16, 32, 64, 128])
def test_every_group_size(group_size):
    engine = torch_engine(hidden_size=128, intermediate_size=384)
    weights = rounded(engine, group_size)
    decoder = Decoder(engine.model, weights, threads=1, activation_bits=32)
    put_back(engine, weights)
    assert (stepped(decoder, engine) - full(engine)).abs().max() < EXACT


def test_linears_of_different_formats_in_one_block():
    engine = torch_engine("qwen2")
    chosen = {
        name: quantize(dequantize(weight), 16) if name.endswith(("k_proj", "up_proj")) else weight
        for name, weight in rounded(engine).items()
        if not name.endswith(("v_proj", "0.mlp.down_proj"))
    }
    decoder = Decoder(engine.model, chosen, threads=1, activation_bits=32)
    put_back(engine, chosen)
    assert (stepped(decoder, engine) - full(engine)).abs().max() < EXACT


def test_int4_linears_of_the_model_keep_their_codes():
    engine = torch_engine("qwen2")
    names = list(rounded(engine))
    for name in names:
        parent, _, last = name.rpartition(".")
        linear = engine.model.get_submodule(name)
        setattr(engine.model.get_submodule(parent), last, Int4Linear.from_linear(linear, 32))
    decoder = Decoder(engine.model, threads=1, activation_bits=32)
    assert (stepped(decoder, engine) - full(engine)).abs().max() < EXACT


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.01), (4, 0.15)])
def test_error_of_a_quantized_head_by_bits(bits, bound):
    # In five seeds 0.0052 to 0.0055 and 0.078 to 0.082 of the logits' spread.
    engine = torch_engine()
    decoder = Decoder(engine.model, head_bits=bits, threads=1, activation_bits=32)
    wanted = full(engine)
    error = (stepped(decoder, engine) - wanted).pow(2).mean().sqrt() / wanted.std()
    assert bound / 20 < error < bound


def test_bfloat16_model_is_computed_in_float32():
    engine = torch_engine()
    engine.model.to(torch.bfloat16)
    decoder = Decoder(engine.model, threads=1)
    engine.model.float()
    assert (stepped(decoder, engine) - full(engine)).abs().max() < EXACT


def test_weight_bytes_of_a_step():
    engine = torch_engine()
    # Two blocks: queries and outputs, keys and values, three of the MLP; five norms; the head.
    values, norms, head = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 64), 5 * 64, 259 * 64
    assert Decoder(engine.model, threads=1).program.weight_bytes == 4 * (values + norms + head)
    # Codes, float32 scales and a nibble of zero for 32 inputs.
    four_bit = Decoder(engine.model, rounded(engine), threads=1)
    assert four_bit.program.weight_bytes == values // 2 + values // 32 * 4 + values // 64 + 4 * (norms + head)


def test_missing_onnxruntime_names_the_extra(monkeypatch):
    engine = torch_engine()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError) as caught:
        Decoder(engine.model)
    assert "vila-vlm[onnx]" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"hidden_size": 32}, "head width 8"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type='dynamic'"),
    ],
)
def test_unsupported_models_are_rejected(changes, message):
    with pytest.raises(ConfigError, match=message):
        Decoder(torch_engine(**changes).model)


def test_block_with_additional_layers_is_rejected():
    engine = torch_engine()
    engine.model.language_model.model.layers[0].self_attn.q_norm = torch.nn.LayerNorm(16)
    with pytest.raises(ConfigError, match=r"self_attn\.q_norm"):
        Decoder(engine.model)


def test_replaced_linears_need_no_values():
    engine = torch_engine()
    weights = rounded(engine)
    wanted = stepped(Decoder(engine.model, weights, threads=1), engine)
    for name in weights:
        linear = engine.model.get_submodule(name)
        linear.weight = torch.nn.Parameter(linear.weight.detach().to("meta"))
    assert torch.equal(stepped(Decoder(engine.model, weights, threads=1), engine), wanted)
    del weights[name]
    with pytest.raises(ConfigError, match="not on a CPU"):
        Decoder(engine.model, weights)


def test_invalid_weights_are_reported_together():
    engine = torch_engine()
    name = "language_model.model.layers.0.mlp.down_proj"
    wrong = {"nobody": quantize(torch.ones(64, 64), 32), name: quantize(torch.ones(64, 32), 32)}
    with pytest.raises(ConfigError, match=r"(?s)'nobody'.*64 x 32.*64 x 64"):
        Decoder(engine.model, wrong)


@pytest.mark.parametrize(("field", "value"), [("threads", -1), ("head_bits", 5), ("activation_bits", 4)])
def test_invalid_options_are_rejected(field, value):
    with pytest.raises(ConfigError) as caught:
        OnnxProgram(torch_engine().model, **{field: value})
    assert field in str(caught.value)
    assert str(value) in str(caught.value)


def test_fused_weights_are_in_memory_once():
    engine = torch_engine()
    use_int4(engine.model, rounded(engine))
    attention = engine.model.get_decoder().layers[0].self_attn
    before = [layer.weight for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    Decoder(engine.model, threads=1)
    after = [layer.weight for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert all(torch.equal(one.codes, other.codes) for one, other in zip(before, after, strict=True))
    assert all(torch.equal(dequantize(one), dequantize(other)) for one, other in zip(before, after, strict=True))
    assert len({weight.codes.untyped_storage().data_ptr() for weight in after}) == 1


ROWS = {0: 20, 1: 32, 3: 7}
"""Tokens of the prompt in each row of four; row 2 is empty."""


@pytest.fixture
def filled():
    engine = torch_engine()
    runner, _ = new_runner(engine.model, 4, program=OnnxProgram(engine.model, threads=1))
    chunks = [TokenRange(row, 0, [0] * count, embeds(engine)[0, :count], []) for row, count in ROWS.items()]
    runner.forward(ForwardBatch(chunks))
    return runner, full(engine)


def step(row):
    return TokenRange(row, ROWS[row], [int(IDS[0, ROWS[row]])])


def decode(runner, *rows):
    return runner.forward(ForwardBatch([step(row) for row in rows])).clone()


def test_rows_of_different_lengths_decode_together(filled):
    runner, wanted = filled
    found = decode(runner, 0, 1, 3)
    for logits, count in zip(found, ROWS.values(), strict=True):
        assert torch.allclose(logits, wanted[count], atol=1e-4)


def test_rows_between_decoding_rows_keep_their_content(filled):
    runner, wanted = filled
    before = [both[:, 1].clone() for both in runner.cache.buffers]
    decode(runner, 0, 3)
    assert all(torch.equal(both[:, 1], kept) for both, kept in zip(runner.cache.buffers, before, strict=True))
    assert torch.allclose(decode(runner, 1)[0], wanted[ROWS[1]], atol=1e-4)


def test_prefill_chunk_beside_a_decode_step(filled):
    runner, wanted = filled
    rest = embeds(torch_engine())[0, 32:40]
    found = runner.forward(ForwardBatch([step(3), TokenRange(1, 32, [0] * 8, rest, [7])]))
    assert torch.allclose(found, wanted[[7, 39]], atol=1e-4)


def test_number_of_bindings_is_bounded(filled, monkeypatch):
    monkeypatch.setattr("vila.engine.runner_onnx._BINDINGS", 2)
    runner, wanted = filled
    for rows in ((0,), (1,), (3,), (0, 1), (0,)):
        assert torch.allclose(decode(runner, *rows)[0], wanted[ROWS[rows[0]]], atol=1e-4)
    assert len(runner._bindings) == 2


def test_failed_run_restores_the_other_rows(filled, monkeypatch):
    runner, wanted = filled

    def broken(self, lengths):
        for both in runner.cache.buffers:
            both[:, :, :, 0] = torch.nan
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr("vila.engine.runner_onnx._Binding.run", broken)
        with pytest.raises(RuntimeError):
            decode(runner, 0, 3)
    torch.testing.assert_close(decode(runner, 1)[0], wanted[ROWS[1]], rtol=1e-4, atol=1e-4)


def int4_model(name="llama"):
    engine = torch_engine(name)
    use_int4(engine.model, rounded(engine))
    return engine


@pytest.mark.parametrize("options", [{}, {"head_bits": 8}, {"activation_bits": 16}, {"activation_bits": 32}])
def test_released_weights_do_not_change_logits(options):
    engine = int4_model("qwen2")
    wanted = stepped(Decoder(engine.model, threads=1, **options), engine, first=20)
    released = Decoder(engine.model, threads=1, release=True, **options)
    assert torch.equal(stepped(released, engine, first=20), wanted)
    # At least the repacked codes are freed.
    assert not any(
        name.endswith(".values") for name, array in released.program._arrays.items() if array.dtype == "uint8"
    )


def test_released_weights_of_several_formats_do_not_change_logits():
    engine = torch_engine("qwen2")
    # Block 1 has a group size and a dense layer that block 0, which is probed, does not have.
    chosen = {
        name: quantize(dequantize(weight), 16) if "layers.1" in name and name.endswith("o_proj") else weight
        for name, weight in rounded(engine).items()
        if not name.endswith("1.mlp.down_proj")
    }
    use_int4(engine.model, chosen)
    wanted = stepped(Decoder(engine.model, threads=1), engine, first=20)
    released = Decoder(engine.model, threads=1, release=True)
    assert torch.equal(stepped(released, engine, first=20), wanted)
    assert {"block_1.out.values", "block_1.down.values"} <= released.program._arrays.keys()


def test_arrays_that_the_session_reads_are_kept(monkeypatch):
    engine = int4_model()
    monkeypatch.setattr(OnnxProgram, "_reads", lambda self, names, cache: any("scales" in name for name in names))
    decoder = Decoder(engine.model, threads=1, release=True)
    kinds = {name.rpartition(".")[2] for name in decoder.program._arrays}
    assert "scales" in kinds
    assert not kinds & {"zeros"}


def test_probe_notices_arrays_that_the_session_reads(monkeypatch):
    program = OnnxProgram(int4_model().model, threads=1)
    # A kernel that reads an array; those of the installed version read none.
    monkeypatch.setattr(program, "_probe", lambda cache: program._arrays["cos"].copy())
    before = program._arrays["cos"].copy()
    assert program._reads(["cos"], (1, 2, 80, 16))
    assert (program._arrays["cos"] == before).all()


def test_released_model_cannot_be_run_or_saved(tmp_path):
    engine = int4_model()
    OnnxProgram(engine.model, threads=1, release=True)
    with pytest.raises(ConfigError) as caught:
        engine.model(input_ids=IDS)
    assert "backend='torch'" in caught.value.hint
    with pytest.raises(ConfigError):
        save_model(engine.model, engine.processor, tmp_path / "saved", "awq-hf")
    assert not (tmp_path / "saved").exists()
