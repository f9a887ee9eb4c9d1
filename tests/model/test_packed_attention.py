"""Packed attention equals attention with an explicit mask, and changes nothing else of the model."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from vila.core.errors import DataError
from vila.model.modeling import segment_mask
from vila.model.packed_attention import (
    attend_sdpa,
    attend_varlen,
    attention_layout,
    enable_packed_attention,
    packed_attention,
)

# A number is a chain; a tuple is a prefix and its branches; None ends a row; negative is padding.
ROWS = {
    "one sample": [7],
    "equal neighbours": [5, 5, 5, 3, 3],
    "a prefix with branches": [4, (6, 3, 1, 5), 2, (3, 3)],
    "a prefix as long as its neighbours": [4, 4, (4, 4, 4), 4],
    "long branches": [(20, 100, 60, 30, 40, 90), 10],
    "rows with padding": [5, (4, 2, 3), 2, None, 9, -7, None, 1, 1, -14],
    "a row of padding": [8, None, -8],
    "a sample longer than several windows": [700, 30],
}


def described(name):
    rows, segments, parents, number = [[]], [[]], [[]], 0
    for item in ROWS[name]:
        if item is None:
            rows.append([]), segments.append([]), parents.append([])
            number = 0
            continue
        lengths = item if isinstance(item, tuple) else (abs(item),)
        first = number
        for place, length in enumerate(lengths):
            padding = not isinstance(item, tuple) and item < 0
            segments[-1] += [-1 if padding else number] * length
            parents[-1] += [first if place else -1] * length
            before = lengths[0] if place else 0
            rows[-1] += range(before, before + length)
            number += not padding
    return torch.tensor(segments), torch.tensor(parents), torch.tensor(rows)


def drawn(segments, heads=4, groups=2, width=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    B, S = segments.shape
    shapes = [(B, S, heads, width), (B, S, groups, width), (B, S, groups, width)]
    # As blocks make them: heads last in memory, then transposed.
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def masked(query, key, value, segments, parents, positions, window):
    """The reference: one explicit mask, every pair of tokens."""
    seen = segment_mask(segments, parents)
    if window is not None:
        seen = seen & (positions[:, None, :, None] - positions[:, None, None, :] < window)
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=seen, enable_gqa=True
    )
    return out.transpose(1, 2)


def varlen_reference(query, key, value, queries, ends, max_queries, max_keys, *, scale, window_size):
    """Reference of a variable-length kernel: the queries are the last ones of their keys."""
    assert max_queries == queries.diff().max() and max_keys == ends.diff().max() and window_size[1] == 0
    groups, out = query.shape[1] // key.shape[1], []
    for number in range(len(queries) - 1):
        q = query[queries[number] : queries[number + 1]]
        k, v = (t[ends[number] : ends[number + 1]].repeat_interleave(groups, 1) for t in (key, value))
        age = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        seen = (age >= 0) & (age <= (window_size[0] if window_size[0] >= 0 else len(k)))
        one = F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v)), attn_mask=seen, scale=scale)
        out.append(one.transpose(0, 1))
    return torch.cat(out)


def attended(query, key, value, layout, window, how):
    places = [t.flatten(0, 1) for t in (query, key, value)]
    window = layout.effective_window(window)
    out = attend_varlen(*places, layout, window, None, varlen_reference) if how == "varlen" else None
    out = attend_sdpa(*places, layout, window) if out is None else out
    return out.unflatten(0, layout.shape)


# Worst of these cases: 7.2e-7 and 7.6e-6 in float32, 1.7e-15 and 9.8e-15 in float64; torch 2.13.
@pytest.mark.parametrize(
    ("dtype", "of_values", "of_gradients"), [(torch.float32, 1e-6, 2e-5), (torch.float64, 1e-14, 1e-13)], ids=str
)
@pytest.mark.parametrize("how", ["sdpa", "varlen"])
@pytest.mark.parametrize("window", [None, 1, 3, 5, 300])
@pytest.mark.parametrize("name", ROWS)
def test_values_and_gradients_equal_those_under_the_explicit_mask(name, window, how, dtype, of_values, of_gradients):
    segments, parents, positions = described(name)
    tensors = drawn(segments, dtype=dtype)
    real = (segments >= 0)[..., None, None]
    weights = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1), dtype=dtype) * real
    reference = masked(*tensors, segments, parents, positions, window)
    ours = attended(*tensors, attention_layout(segments, parents), window, how)
    assert ours.isfinite().all()
    assert ((reference - ours) * real).abs().max() < of_values
    pairs = [torch.autograd.grad((out * weights).sum(), tensors) for out in (reference, ours)]
    for one, other in zip(*pairs, strict=True):
        assert (one - other).abs().max() < of_gradients


def test_a_window_longer_than_every_sample_is_ignored():
    layout = attention_layout(*described("a prefix with branches")[:2])
    assert [layout.effective_window(w) for w in (None, 10, 11, 12)] == [None, 10, None, None]


@pytest.mark.parametrize("window", [None, 40])
def test_no_tensor_of_s_by_s_is_created_and_no_gradient_is_padded(window):
    segments = torch.arange(30).repeat_interleave(torch.tensor([50, 20, 30] * 10))[None]
    tensors = drawn(segments)

    class Sizes(TorchDispatchMode):
        largest, names = 0, ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for one in out if isinstance(out, tuple | list) else [out]:
                self.largest = max(self.largest, one.numel() if isinstance(one, torch.Tensor) else 0)
            self.names = (*self.names, function.__name__)
            return out

    with Sizes() as seen:
        attended(*tensors, attention_layout(segments, torch.full_like(segments, -1)), window, "sdpa").sum().backward()
    assert seen.largest == tensors[0].numel() < segments.numel() ** 2 / 10
    assert not [name for name in seen.names if "slice_backward" in name or "select_backward" in name]


def test_neighbouring_segments_share_one_block():
    layout = attention_layout(*described("a prefix as long as its neighbours")[:2])
    kinds = [(block.kind, block.lengths, block.prefix) for block in layout.blocks]
    assert kinds == [
        ("chains", (4, 4), -1),
        ("chains", (4,), -1),
        ("branches", (4, 4), 1),
        ("chains", (4,), -1),
    ]
    long = attention_layout(*described("long branches")[:2])
    assert [block.lengths for block in long.blocks] == [(20,), (100,), (60, 30), (40,), (90,), (10,)]


def test_invalid_segments_are_refused():
    with pytest.raises(DataError) as split:
        attention_layout(torch.tensor([[0, 0, 1], [0, 1, 0]]), torch.full((2, 3), -1))
    assert (split.value.record, split.value.field, split.value.value) == (1, "segments", 0)
    with pytest.raises(DataError) as unrelated:
        attention_layout(torch.tensor([[0, 1, 2]]), torch.tensor([[-1, -1, 0]]))
    assert (unrelated.value.record, unrelated.value.field, unrelated.value.value) == (0, "parents", 0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_generation_and_saved_config_are_unchanged(family):
    plain, _ = tiny.vila(family)
    changed, _ = tiny.vila(family)
    enable_packed_attention(changed.get_decoder())
    ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    facts = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "output_scores": True}
    before, after = (m.generate(ids, **facts, return_dict_in_generate=True) for m in (plain, changed))
    assert torch.equal(before.sequences, after.sequences)
    assert all(torch.equal(a, b) for a, b in zip(before.scores, after.scores, strict=True))
    assert changed.config.to_dict() == plain.config.to_dict()
    assert changed.language_model.config.to_dict() == plain.language_model.config.to_dict()
    assert changed.language_model.config._attn_implementation == "sdpa"
    assert {type(m).__name__ for m in changed.modules() if getattr(m, "config", None) is not None} == {
        type(m).__name__ for m in plain.modules() if getattr(m, "config", None) is not None
    }


def test_blocks_without_packed_attention_reject_the_layout():
    model, _ = tiny.vila("llama")
    segments, parents, positions = described("equal neighbours")
    facts = {
        "inputs_embeds": torch.randn(*segments.shape, tiny.WIDTH),
        "attention_mask": torch.ones(1, 1, 0, 0, dtype=torch.bool),
        "position_ids": positions,
        "attention_layout": attention_layout(segments, parents),
        "use_cache": False,
    }
    with pytest.raises(RuntimeError):
        model.get_decoder()(**facts)
    enable_packed_attention(model.get_decoder())
    assert model.get_decoder()(**facts).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("name", ["equal neighbours", "a prefix with branches"])
def test_gradient_checkpointing_gives_bit_equal_gradients(name):
    segments, parents, positions = described(name)
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(*segments.shape, tiny.WIDTH, generator=generator)
    gradients = []
    for again in (False, True):
        model, _ = tiny.vila("qwen2")
        enable_packed_attention(model.get_decoder())
        model.train()
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        decoder = model.get_decoder()
        out = decoder(
            inputs_embeds=embeds,
            attention_mask=torch.ones(1, 1, 0, 0, dtype=torch.bool),
            position_ids=positions,
            attention_layout=attention_layout(segments, parents),
            use_cache=False,
        ).last_hidden_state
        out.square().sum().backward()
        gradients.append({n: p.grad for n, p in decoder.named_parameters() if p.grad is not None})
    assert len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 3, 300])
@pytest.mark.parametrize("name", ROWS)
def test_the_gpu_kernel_equals_the_explicit_mask(name, window):
    segments, parents, positions = described(name)
    tensors = drawn(segments, width=64)
    module = torch.nn.Module()
    real = segments >= 0
    reference = masked(*tensors, segments, parents, positions, window)
    wanted = torch.autograd.grad((reference * real[..., None, None]).sum(), tensors)
    layout = attention_layout(segments, parents)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        moved = [t.detach().to("cuda", dtype).requires_grad_() for t in tensors]
        some = [t.transpose(1, 2) for t in moved]
        out, _ = packed_attention(module, *some, None, sliding_window=window, attention_layout=layout)
        assert (out.float().cpu() - reference)[real].abs().max() < tolerance
        ours = torch.autograd.grad((out * real[..., None, None].cuda()).sum(), moved)
        for one, other in zip(ours, wanted, strict=True):
            assert (one.float().cpu() - other).norm() < tolerance * max(1, other.norm())
