"""The chunked loss equals plain cross entropy on all logits and reaches all trainable parameters."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from tests.train.test_packed_loss import ROWS, build, features
from vila.chat.tokenize import IGNORE
from vila.data.collate import collate
from vila.train import loss
from vila.train.loss import LossModule, head_loss, linear_cross_entropy
from vila.train.optimizer import select_trainable


def drawn(tokens, width=16, vocab=37, dtype=torch.float32, bias=False):
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype).requires_grad_()
    some = torch.randn(vocab, generator=generator, dtype=dtype).requires_grad_() if bias else None
    return hidden, weight, some, torch.randint(0, vocab, (tokens,), generator=generator)


def of_chunks(monkeypatch, tokens, vocab=37):
    monkeypatch.setattr(loss, "_CHUNK_BYTES", 4 * vocab * tokens)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 16, 100])
@pytest.mark.parametrize("tokens", [1, 7, 50])
def test_values_and_gradients_equal_cross_entropy_on_all_logits(monkeypatch, tokens, chunk, bias):
    of_chunks(monkeypatch, chunk)
    hidden, weight, some, targets = drawn(tokens, bias=bias)
    learning = [t for t in (hidden, weight, some) if t is not None]
    each = F.cross_entropy(F.linear(hidden, weight, some), targets, reduction="none")
    total, losses = linear_cross_entropy(hidden, weight, some, targets)
    assert total.item() == pytest.approx(each.sum().item(), rel=1e-6)
    assert not losses.requires_grad and torch.allclose(losses, each, rtol=1e-5, atol=1e-6)
    wanted, ours = (torch.autograd.grad(t / 7, learning) for t in (each.sum(), total))
    for one, other in zip(wanted, ours, strict=True):
        # Worst of these cases: 3.2e-7, torch 2.13.
        assert (one - other).norm() <= 1e-5 * one.norm()


@pytest.mark.parametrize("chunk", [2, 100])
def test_gradients_are_those_of_finite_differences(monkeypatch, chunk):
    of_chunks(monkeypatch, chunk, vocab=5)
    hidden, weight, some, targets = drawn(5, width=3, vocab=5, dtype=torch.float64, bias=True)
    assert torch.autograd.gradcheck(lambda *t: linear_cross_entropy(*t, targets)[0], (hidden, weight, some))


def test_without_tokens_the_loss_is_zero_and_reaches_everything():
    hidden, weight, some, targets = drawn(0, bias=True)
    total, losses = linear_cross_entropy(hidden, weight, some, targets)
    assert total.item() == 0 and losses.shape == (0,)
    gradients = torch.autograd.grad(total, (hidden, weight, some))
    assert [g.shape for g in gradients] == [(0, 16), (37, 16), (37,)] and not any(g.any() for g in gradients)


def test_only_trainable_weights_get_a_gradient():
    hidden, weight, _, targets = drawn(7)
    total, _ = linear_cross_entropy(hidden, weight.detach(), None, targets)
    total.backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        still, _ = linear_cross_entropy(hidden, weight, None, targets)
    assert not still.requires_grad and still.item() == total.item()


def test_the_softmax_of_bfloat16_is_float32_and_its_gradients_keep_the_scale(monkeypatch):
    of_chunks(monkeypatch, 2)
    hidden, weight, _, targets = drawn(200, dtype=torch.bfloat16)
    exact = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    total, losses = linear_cross_entropy(hidden, weight, None, targets)
    assert total.dtype == losses.dtype == torch.float32
    logits = F.linear(hidden, weight).float()
    assert total.item() == pytest.approx(F.cross_entropy(logits, targets, reduction="sum").item(), rel=1e-5)
    # 1 / 125.5 is rounded by 0.34 % in bfloat16: all gradients together must not be.
    ours = torch.autograd.grad(total / 125.5, (hidden, weight))
    wanted = torch.autograd.grad(F.cross_entropy(F.linear(*exact), targets, reduction="sum") / 125.5, exact)
    for one, other in zip(wanted, ours, strict=True):
        assert other.dtype == torch.bfloat16
        # Worst of both: 4.0e-3, the rounding of single numbers, and 5.3e-4 along the gradient; torch 2.13.
        assert (one - other).norm() < 4.5e-3 * one.norm()
        assert (other.float() * one).sum() / (one * one).sum() == pytest.approx(1, abs=1e-3)


class Sizes(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            self.largest = max(self.largest, one.numel() if isinstance(one, torch.Tensor) else 0)
        return out


def test_logits_of_all_tokens_never_exist_together(monkeypatch):
    of_chunks(monkeypatch, 10, vocab=500)
    hidden, weight, _, targets = drawn(300, vocab=500)
    with Sizes() as seen:
        linear_cross_entropy(hidden, weight, None, targets)[0].backward()
    assert seen.largest == weight.numel() < 300 * 500


class Adapted(nn.Linear):
    """A head that a plain use of its weight would get wrong."""

    def forward(self, hidden):
        return super().forward(hidden) * 0.5


@pytest.mark.parametrize("tokens", [0, 5, 40])
def test_a_head_that_is_no_plain_linear_is_called(monkeypatch, tokens):
    of_chunks(monkeypatch, 16)
    hidden, weight, _, targets = drawn(tokens)
    head = Adapted(16, 37, bias=False)
    head.weight = nn.Parameter(weight.detach().clone())
    total, losses = head_loss(head, hidden, targets)
    logits = F.linear(hidden, weight) * 0.5
    wanted = F.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(losses, wanted, rtol=1e-5) and total.item() == pytest.approx(wanted.sum().item(), rel=1e-6)
    total.backward()
    reference = torch.autograd.grad(wanted.sum(), (hidden, weight))
    assert torch.allclose(hidden.grad, reference[0], atol=1e-6)
    assert torch.allclose(head.weight.grad, reference[1], atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_loss_of_a_model_equals_that_of_all_its_logits(family, tied):
    model, processor, row = build(family, ROWS["no, one and three images"], tie_word_embeddings=tied)
    batch = collate([row])
    objective, media = LossModule(model), features(model, processor, batch.media)
    total, by_source = objective(batch, features=media)
    assert by_source is None and total.dtype == torch.float32
    total.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model.get_output_embeddings()(objective.hidden_states(batch, features=media))
    wanted = F.cross_entropy(logits[0, :-1], batch.labels[0, 1:], ignore_index=IGNORE, reduction="sum")
    wanted.backward()
    assert total.item() == pytest.approx(wanted.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            # Worst of these cases: 6.7e-7, fp32, torch 2.13.
            assert (ours[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight or not tied


def test_losses_by_source_are_sums_over_the_tokens_of_each():
    model, _, row = build("llama", ROWS["three texts"])
    batch = collate([row[:2], row[2:]])
    sources = torch.zeros_like(batch.ids)
    sources[0, len(row[0]) : len(row[0]) + len(row[1])] = 2
    sources[1] = 1
    objective = LossModule(model)
    total, by_source = objective(batch, data_set_ids=sources, num_data_sets=4)
    assert by_source.dtype == torch.float32 and not by_source.requires_grad
    alone = [objective(collate([[one]]))[0].item() for one in (row[0], row[2], row[1])]
    assert by_source.tolist() == pytest.approx([*alone, 0], rel=1e-5)
    assert total.item() == pytest.approx(sum(alone), rel=1e-6)


def learners(model, total):
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {n: g for n, g in zip(parameters, gradients, strict=True) if g is not None}


@pytest.mark.parametrize("tune", [["vision", "projector", "llm"], ["projector", "llm"], ["projector"]])
def test_a_batch_without_images_reaches_what_others_reach_and_changes_nothing(tune):
    model, processor, row = build("llama", ROWS["no, one and three images"])
    select_trainable(model, tune)
    objective = LossModule(model)
    stand_in = processor.pixels([tiny.image(9)])
    images = collate([[row[1]]])
    shown, _ = objective(images, pixels=processor.pixels(list(images.media)))
    batch = collate([[row[0]]])
    alone, _ = objective(batch)
    idle, _ = objective(batch, pixels=stand_in, dummy_vision=True)
    assert idle.item() == alone.item()
    reached = learners(model, idle)
    assert reached.keys() == learners(model, shown).keys()
    assert any(name.startswith("vision_tower") for name in reached) == ("vision" in tune)
    for name, gradient in reached.items():
        assert gradient.any() == name.startswith("language_model") or not gradient.any(), name


def test_a_dummy_image_that_is_not_finite_has_no_effect():
    model, _, row = build("llama", ROWS["three texts"])
    objective, batch = LossModule(model), collate([row])
    wild = torch.full((1, 4, 16), torch.inf)
    assert objective(batch, features=wild, dummy_vision=True)[0].item() == objective(batch)[0].item()


@pytest.mark.parametrize("head", ["plain", "adapted"])
def test_a_batch_without_supervision_reaches_everything_with_zeros(head):
    model, processor, row = build("qwen2", ROWS["no, one and three images"], tie_word_embeddings=False)
    if head == "adapted":
        model.language_model.lm_head.__class__ = Adapted
    batch = collate([row])
    objective, media = LossModule(model), features(model, processor, batch.media)
    usual = learners(model, objective(batch, features=media)[0])
    sources = torch.zeros_like(batch.ids)
    bare = replace(batch, labels=torch.full_like(batch.labels, IGNORE))
    total, by_source = objective(bare, features=media, data_set_ids=sources, num_data_sets=2)
    assert total.item() == 0 and by_source.tolist() == [0, 0]
    zeros = learners(model, total)
    assert zeros.keys() == usual.keys()
    assert not any(gradient.any() for gradient in zeros.values())


def test_a_frozen_llm_still_teaches_the_projector():
    model, processor, row = build("llama", ROWS["no, one and three images"])
    select_trainable(model, ["projector"])
    batch = collate([row])
    total, _ = LossModule(model)(batch, features=features(model, processor, batch.media))
    assert set(learners(model, total)) == {n for n, _ in model.named_parameters() if n.startswith("projector.")}
