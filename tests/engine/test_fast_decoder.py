"""Steps by the fast_decoder decoder are those of the model's own, and nothing else in the process notices."""

import threading

import pytest
import torch

from tests.engine.fixtures import MODELS, QUESTIONS, endless
from vila.engine.backend import choose_fast_decoder
from vila.engine.engine import Engine
from vila.engine.fast_decoder import _NATIVE, FastDecoder, unsupported_reason
from vila.kernels.int4 import Int4Linear, quantize

DRAWN = {"max_new_tokens": 12, "temperature": 1.5, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.3}


def fast_decoder(engine: Engine) -> Engine:
    """The same model, its steps taken leanly."""
    twin = Engine(engine.model, engine.processor, fast_decoder=FastDecoder(engine.model))
    twin._stop_ids = engine._stop_ids
    return twin


@pytest.fixture(scope="module", params=MODELS)
def engine(request):
    engine = endless(request.param)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in engine.model.language_model.named_parameters():
            if name.endswith(("proj.bias", "norm.weight")):
                parameter.normal_(1, 0.5, generator=generator)
    return engine


class Alone:
    """Attention among the tokens of one line."""

    def attend(self, layer, query_HTE, key_GTE, value_GTE, scale, window):
        age = torch.arange(query_HTE.shape[1])[:, None] - torch.arange(key_GTE.shape[1])
        seen = (age >= 0) & (age < (window or 10**6))
        options = {"attn_mask": seen, "scale": scale, "enable_gqa": True}
        out = torch.nn.functional.scaled_dot_product_attention(query_HTE, key_GTE, value_GTE, **options)
        return out.transpose(0, 1)


def logits(model, ids):
    decoder = FastDecoder(model)
    embeds_TD = model.get_input_embeddings()(ids)
    return decoder.logits(decoder.states(embeds_TD, torch.arange(len(ids)), Alone()))


@torch.no_grad()
def test_a_line_of_tokens_has_the_logits_of_the_model(engine):
    ids = torch.randint(0, 259, (40,), generator=torch.Generator().manual_seed(2))
    wanted = engine.model(input_ids=ids[None], use_cache=False).logits[0]
    assert torch.allclose(logits(engine.model, ids), wanted, atol=2e-5)


@torch.no_grad()
def test_in_16_bits_it_is_as_near_to_the_exact_numbers_as_the_model(engine):
    ids = torch.randint(0, 259, (40,), generator=torch.Generator().manual_seed(2))
    exact = engine.model(input_ids=ids[None], use_cache=False).logits[0]
    engine.model.to(torch.bfloat16)
    try:
        own = engine.model(input_ids=ids[None], use_cache=False).logits[0].float()
        found = logits(engine.model, ids)
        # One token at a time goes through other products.
        alone = logits(engine.model, ids[:1])
    finally:
        engine.model.to(torch.float32)
    assert (found - exact).norm() < 1.3 * (own - exact).norm()
    assert torch.allclose(alone, found[:1], atol=0.05)


def test_answers_about_text_and_pictures_are_equal_alone_and_in_a_batch(engine):
    ours = fast_decoder(engine)
    assert ours.complete(QUESTIONS, max_new_tokens=12) == engine.complete(QUESTIONS, max_new_tokens=12)
    assert ours.complete(QUESTIONS, **DRAWN, seed=3) == engine.complete(QUESTIONS, **DRAWN, seed=3)
    for question in QUESTIONS[:4]:
        assert ours.generate(question, max_new_tokens=12) == engine.generate(question, max_new_tokens=12)


def test_weights_may_change_in_place():
    engine = endless()
    ours = fast_decoder(engine)
    before = ours.generate(QUESTIONS[1], max_new_tokens=8)
    with torch.no_grad():
        engine.model.get_output_embeddings().weight.mul_(-1)
    assert ours.generate(QUESTIONS[1], max_new_tokens=8) == engine.generate(QUESTIONS[1], max_new_tokens=8) != before


def test_the_library_for_matrices_is_on_again_whoever_leaves_last():
    assert torch.backends.mkldnn.enabled
    inside, leave = threading.Barrier(2), threading.Barrier(2)

    def other():
        with _NATIVE:
            inside.wait()
            leave.wait()

    thread = threading.Thread(target=other)
    with _NATIVE:
        thread.start()
        inside.wait()
    assert not torch.backends.mkldnn.enabled
    leave.wait()
    thread.join()
    assert torch.backends.mkldnn.enabled


def test_models_that_it_cannot_compute_are_left_alone():
    assert unsupported_reason(endless().model) == ""
    assert "hidden_act='gelu'" in unsupported_reason(endless(hidden_act="gelu").model)
    hooked = endless().model
    hooked.get_decoder().layers[1].mlp.register_forward_hook(lambda *_: None)
    assert unsupported_reason(hooked) == "hooks on its blocks"
    rounded = endless().model
    mlp = rounded.get_decoder().layers[0].mlp
    mlp.up_proj = Int4Linear.from_weight(quantize(mlp.up_proj.weight.detach(), 16))
    assert unsupported_reason(rounded) == "linear layers of type Int4Linear"
    assert choose_fast_decoder(rounded) is None
    with pytest.raises(ValueError, match="Int4Linear"):
        FastDecoder(rounded)
