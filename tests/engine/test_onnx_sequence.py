"""The onnx decoder computes what torch computes: in float32, in 4 bits, in every family and way to cut a sequence."""

import sys

import pytest
import torch

from tests.engine.fixtures import MODELS
from tests.engine.onnx_fixtures import IDS, embeds, full, put_back, rounded, torch_engine
from vila.core.errors import ConfigError, ContextOverflowError
from vila.engine.onnx import program as onnx_program
from vila.engine.onnx.sequence import OnnxSequence
from vila.kernels.int4 import Int4Linear, dequantize, quantize
from vila.model.int4_weights import use_int4

EXACT = 1e-4  # worst of these models and four seeds: 1.6e-5, logits up to 8.3; onnxruntime 1.32
SIZE = IDS.shape[1]


@pytest.fixture(scope="module", params=MODELS)
def engine(request):
    return torch_engine(request.param)


def stepped(decoder, engine, first=1):
    """Logits [S, V]: a prompt of `first` tokens, the others one by one."""
    head = decoder.logits_at(embeds(engine)[:, :first], range(first))
    return torch.cat([head, *(decoder.step(int(token))[None] for token in IDS[0, first:])])


def test_a_whole_sequence_has_the_logits_of_torch(engine):
    found = OnnxSequence.of(engine.model, threads=1).logits_at(embeds(engine), range(SIZE))
    assert (found - full(engine)).abs().max() < EXACT


def test_a_prompt_and_steps_have_the_logits_of_torch(engine):
    found = stepped(OnnxSequence.of(engine.model, threads=1), engine, first=20)
    assert (found - full(engine)).abs().max() < EXACT


def test_a_prompt_in_chunks_has_the_logits_of_torch(engine, monkeypatch):
    monkeypatch.setattr(onnx_program, "CHUNK", 11)
    decoder = OnnxSequence.of(engine.model, threads=1)
    places = [0, 3, 10, 11, 40, SIZE - 1]
    found = decoder.logits_at(embeds(engine), places)
    assert (found - full(engine)[places]).abs().max() < EXACT
    decoder.reset()
    assert (decoder.prefill(embeds(engine)) - full(engine)[-1]).abs().max() < EXACT


def test_four_bits_without_rounded_activations_have_the_logits_of_the_rounded_model(engine):
    weights = rounded(engine)
    decoder = OnnxSequence.of(engine.model, weights, threads=1, activation_bits=32)
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
def test_rounded_activations_cost_what_their_bits_cost(bits, least, most):
    # Root mean square of the difference over the spread of the logits, groups of 32, five seeds: 0.031 to 0.036 for 8.
    engine = torch_engine("qwen2")
    weights = rounded(engine)
    fast, exact = (OnnxSequence.of(engine.model, weights, threads=1, activation_bits=b) for b in (bits, 32))
    wanted = stepped(exact, engine, first=7)
    error = (stepped(fast, engine, first=7) - wanted).pow(2).mean().sqrt() / wanted.std()
    assert least < error < most


@pytest.mark.parametrize("group_size", [16, 32, 64, 128])
def test_every_group_size_is_read_as_it_is_stored(group_size):
    engine = torch_engine(hidden_size=128, intermediate_size=384)
    weights = rounded(engine, group_size)
    decoder = OnnxSequence.of(engine.model, weights, threads=1, activation_bits=32)
    put_back(engine, weights)
    assert (stepped(decoder, engine) - full(engine)).abs().max() < EXACT


def test_linears_of_different_kinds_stand_side_by_side():
    engine = torch_engine("qwen2")
    chosen = {
        name: quantize(dequantize(weight), 16) if name.endswith(("k_proj", "up_proj")) else weight
        for name, weight in rounded(engine).items()
        if not name.endswith(("v_proj", "0.mlp.down_proj"))
    }
    decoder = OnnxSequence.of(engine.model, chosen, threads=1, activation_bits=32)
    put_back(engine, chosen)
    assert (stepped(decoder, engine) - full(engine)).abs().max() < EXACT


def test_four_bit_linears_of_the_model_keep_their_codes():
    engine = torch_engine("qwen2")
    names = list(rounded(engine))
    for name in names:
        parent, _, last = name.rpartition(".")
        linear = engine.model.get_submodule(name)
        setattr(engine.model.get_submodule(parent), last, Int4Linear.from_linear(linear, 32))
    decoder = OnnxSequence.of(engine.model, threads=1, activation_bits=32)
    assert (stepped(decoder, engine) - full(engine)).abs().max() < EXACT


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.01), (4, 0.15)])
def test_a_rounded_head_costs_what_its_bits_cost(bits, bound):
    # In five seeds 0.0052 to 0.0055 and 0.078 to 0.082 of the logits' spread.
    engine = torch_engine()
    decoder = OnnxSequence.of(engine.model, head_bits=bits, threads=1, activation_bits=32)
    wanted = full(engine)
    error = (stepped(decoder, engine) - wanted).pow(2).mean().sqrt() / wanted.std()
    assert bound / 20 < error < bound


def test_a_model_in_bfloat16_is_computed_in_float32_from_its_own_values():
    engine = torch_engine()
    engine.model.to(torch.bfloat16)
    decoder = OnnxSequence.of(engine.model, threads=1)
    engine.model.float()
    assert (stepped(decoder, engine) - full(engine)).abs().max() < EXACT


def test_forks_go_on_apart_from_the_same_beginning(engine):
    decoder = OnnxSequence.of(engine.model, threads=1)
    decoder.prefill(embeds(engine)[:, :30])
    other = decoder.fork()
    for token in (7, 8, 9):
        decoder.step(token)
    found = torch.stack([other.step(int(token)) for token in IDS[0, 30:]])
    assert (found - full(engine)[30:]).abs().max() < EXACT
    assert (decoder.length, other.length) == (33, SIZE)


def test_going_back_forgets_what_came_after(engine):
    decoder = OnnxSequence.of(engine.model, threads=1)
    decoder.prefill(embeds(engine)[:, :30])
    for token in (7, 8, 9):
        decoder.step(token)
    decoder.reset(30)
    found = torch.stack([decoder.step(int(token)) for token in IDS[0, 30:]])
    assert (found - full(engine)[30:]).abs().max() < EXACT
    with pytest.raises(ConfigError, match=f"{SIZE + 1} of {SIZE}"):
        decoder.reset(SIZE + 1)


def test_logits_of_a_step_are_not_overwritten_by_the_next():
    engine = torch_engine()
    decoder = OnnxSequence.of(engine.model, threads=1)
    first = decoder.step(5)
    kept = first.clone()
    decoder.step(6)
    assert torch.equal(first, kept)


def test_a_step_reads_the_weights_at_their_bits():
    engine = torch_engine()
    # Two blocks: queries and outputs, keys and values, three of the MLP; five norms; the head.
    values, norms, head = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 64), 5 * 64, 259 * 64
    assert OnnxSequence.of(engine.model, threads=1).program.weight_bytes == 4 * (values + norms + head)
    # Codes, float32 scales and a nibble of zero for 32 inputs.
    four_bit = OnnxSequence.of(engine.model, rounded(engine), threads=1)
    assert four_bit.program.weight_bytes == values // 2 + values // 32 * 4 + values // 64 + 4 * (norms + head)


def test_a_full_cache_refuses_more():
    engine = torch_engine()
    decoder = OnnxSequence.of(engine.model, threads=1, capacity=40)
    with pytest.raises(ContextOverflowError, match=r"\b48\b.*\b40\b"):
        decoder.prefill(embeds(engine))
    decoder.prefill(embeds(engine)[:, :40])
    with pytest.raises(ContextOverflowError, match=r"\b40\b.*\b1\b.*\b40\b"):
        decoder.step(1)


def test_without_onnxruntime_the_error_says_what_to_install(monkeypatch):
    engine = torch_engine()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"pip install 'vila-vlm\[onnx\]'"):
        OnnxSequence.of(engine.model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"hidden_size": 32}, "head width 8"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type='dynamic'"),
    ],
)
def test_what_the_graph_cannot_compute_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        OnnxSequence.of(torch_engine(**changes).model)


def test_a_block_with_other_parts_is_refused():
    engine = torch_engine()
    engine.model.language_model.model.layers[0].self_attn.q_norm = torch.nn.LayerNorm(16)
    with pytest.raises(ConfigError, match=r"self_attn\.q_norm"):
        OnnxSequence.of(engine.model)


def test_replaced_linears_need_no_values_and_others_do():
    engine = torch_engine()
    weights = rounded(engine)
    wanted = stepped(OnnxSequence.of(engine.model, weights, threads=1), engine)
    for name in weights:
        linear = engine.model.get_submodule(name)
        linear.weight = torch.nn.Parameter(linear.weight.detach().to("meta"))
    assert torch.equal(stepped(OnnxSequence.of(engine.model, weights, threads=1), engine), wanted)
    del weights[name]
    with pytest.raises(ConfigError, match="not on a CPU"):
        OnnxSequence.of(engine.model, weights)


def test_weights_that_do_not_fit_are_named_all_at_once():
    engine = torch_engine()
    name = "language_model.model.layers.0.mlp.down_proj"
    wrong = {"nobody": quantize(torch.ones(64, 64), 32), name: quantize(torch.ones(64, 32), 32)}
    with pytest.raises(ConfigError, match=r"(?s)'nobody'.*64 x 32.*64 x 64"):
        OnnxSequence.of(engine.model, wrong)


@pytest.mark.parametrize("options", [{"threads": -1}, {"capacity": -1}, {"head_bits": 5}, {"activation_bits": 4}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))}={next(iter(options.values()))}"):
        OnnxSequence.of(torch_engine().model, **options)


def test_joined_weights_are_in_memory_once():
    engine = torch_engine()
    use_int4(engine.model, rounded(engine))
    attention = engine.model.get_decoder().layers[0].self_attn
    before = [layer.weight for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    OnnxSequence.of(engine.model, threads=1)
    after = [layer.weight for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert all(torch.equal(one.codes, other.codes) for one, other in zip(before, after, strict=True))
    assert all(torch.equal(dequantize(one), dequantize(other)) for one, other in zip(before, after, strict=True))
    assert len({weight.codes.untyped_storage().data_ptr() for weight in after}) == 1
