"""A packed sequence equals its samples: logits, loss and gradients, with images and shared prefixes."""

import pytest
import torch

from tests import tiny
from tests.packed import split_conversations
from vila.chat.templates import find_template
from vila.chat.tokenize import tokenize_sample
from vila.core.types import Message, Sample
from vila.data.collate import collate
from vila.train.loss import LossModule

QA = find_template("starter_qa")


def hidden_states(model, batch, media):
    return LossModule(model).hidden_states(batch, features=media)


def summed_loss(model, batch, media):
    return LossModule(model)(batch, features=media)[0]


def text(name, question="some text?", answer="yes"):
    return Sample(name, (Message.of("user", question), Message.of("assistant", answer)))


def shown(name, *images):
    parts = [part for n in images for part in (tiny.image(n), f" {n}")]
    return Sample(name, (Message.of("user", *parts, "?"), Message.of("assistant", "12")))


def tree(name, image, *questions):
    branches = tuple((Message.of("user", q), Message.of("assistant", q[::-1])) for q in questions)
    return Sample(name, (Message.of("user", tiny.image(image)),), branches)


ROWS = {
    "three texts": [text("a"), text("b", "q", "long answer"), text("c", "other")],
    "no, one and three images": [text("a"), shown("b", 1), shown("c", 2, 3, 4), text("d")],
    "shared prefixes": [tree("a", 1, "one", "two", "three"), text("b"), tree("c", 2, "four", "five")],
}


def build(family, samples, **text):
    model, processor = tiny.vila(family, **text)
    row = [tokenize_sample(s, QA, processor.span_tokenizer, processor.count) for s in samples]
    return model, processor, row


@torch.no_grad()
def features(model, processor, media):
    return model.vision_features(processor.pixels(list(media))) if media else None


# Shorter than any sample; Qwen2's first layer sees everything.
WINDOWS = {
    "mistral": {"sliding_window": 7},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 7,
        "layer_types": ["full_attention", "sliding_attention"],
    },
}


@pytest.mark.parametrize(("family", "text"), [*((family, {}) for family in tiny.FAMILIES), *WINDOWS.items()])
@pytest.mark.parametrize("name", ROWS)
def test_logits_of_a_packed_sequence_equal_those_of_its_samples(family, text, name):
    model, processor, row = build(family, ROWS[name], **text)
    # The second row is longer, so the first is padded.
    batch = collate([row, [*row, row[0]]])
    with torch.no_grad():
        packed = model.get_output_embeddings()(hidden_states(model, batch, features(model, processor, batch.media)))
        assert packed.isfinite().all() and (batch.segments[0] < 0).any()
        owners = [s for s in row for _ in range(max(1, sum(segment.parent >= 0 for segment in s.segments)))]
        parts = split_conversations(row)
        assert len(parts) == len(owners)
        for (ids, places), owner in zip(parts, owners, strict=True):
            alone = model(
                input_ids=torch.from_numpy(ids)[None], features=features(model, processor, owner.media), use_cache=False
            ).logits[0]
            for one in packed:
                # Worst of these cases: 9.5e-7, fp32, torch 2.13.
                assert (alone - one[torch.from_numpy(places)]).abs().max() < 1e-5


def test_a_window_changes_what_is_seen():
    model, processor, row = build("mistral", ROWS["three texts"], **WINDOWS["mistral"])
    wide, _, _ = build("mistral", ROWS["three texts"])
    wide.load_state_dict(model.state_dict())
    batch = collate([row])
    with torch.no_grad():
        near, far = hidden_states(model, batch, None)[0], hidden_states(wide, batch, None)[0]
    early = batch.positions[0] < WINDOWS["mistral"]["sliding_window"]
    assert torch.allclose(near[early], far[early], atol=1e-5)
    assert (near[~early] - far[~early]).abs().max() > 1e-2


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("name", ROWS)
def test_loss_and_gradients_of_a_packed_sequence_equal_those_of_its_samples(family, name):
    model, processor, row = build(family, ROWS[name], **WINDOWS.get(family, {}))
    batch = collate([row])
    packed = summed_loss(model, batch, features(model, processor, batch.media))
    packed.backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    whole = torch.zeros(())
    for sample in ROWS[name]:
        for number, messages in enumerate(sample.conversations()):
            alone = tokenize_sample(
                Sample(f"{sample.id}{number}", messages), QA, processor.span_tokenizer, processor.count
            )
            one = collate([[alone]])
            loss = summed_loss(model, one, features(model, processor, one.media))
            loss.backward()
            whole = whole + loss.detach()
    assert packed.item() == pytest.approx(whole.item(), rel=1e-5)
    for n, p in model.named_parameters():
        if p.grad is not None:
            # Worst of these cases: 1.6e-6 relative, fp32, torch 2.13.
            assert (together[n] - p.grad).norm() <= 1e-5 * p.grad.norm(), n


def test_changing_a_token_leaves_segments_that_may_not_see_it_bit_identical():
    model, processor, row = build("llama", ROWS["shared prefixes"])
    batch = collate([row])
    media = features(model, processor, batch.media)
    with torch.no_grad():
        before = hidden_states(model, batch, media)[0]
        for segment in range(int(batch.segments.max()) + 1):
            place = int((batch.segments[0] == segment).nonzero()[-1])
            if batch.ids[0, place] == model.config.image_token_id:
                continue
            ids = batch.ids.clone()
            ids[0, place] = (ids[0, place] + 1) % 50 + 3
            changed = hidden_states(model, collate_with(batch, ids), media)[0]
            blind = (batch.segments[0] != segment) & (batch.parents[0] != segment)
            assert torch.equal(before[blind], changed[blind])
            assert not torch.equal(before[place], changed[place])


def collate_with(batch, ids):
    from dataclasses import replace

    return replace(batch, ids=ids)


def test_images_of_a_sequence_go_to_their_own_placeholders():
    model, processor, row = build("llama", ROWS["no, one and three images"])
    batch = collate([row])
    media = features(model, processor, batch.media)
    with torch.no_grad():
        ahead = hidden_states(model, batch, media)
        back = hidden_states(model, batch, media.flip(0))
    assert (ahead - back).abs().max() > 1e-2


def test_splitting_a_batch_does_not_change_the_global_loss():
    model, processor, row = build("llama", ROWS["three texts"] + ROWS["shared prefixes"])

    def total(rows):
        batches = [collate(r) for r in rows]
        return sum(summed_loss(model, b, features(model, processor, b.media)).item() for b in batches)

    together = total([[row[:3], row[3:]]])
    assert total([[row[:3]], [row[3:]]]) == pytest.approx(together, rel=1e-6)
    assert total([[[s] for s in row]]) == pytest.approx(together, rel=1e-6)
