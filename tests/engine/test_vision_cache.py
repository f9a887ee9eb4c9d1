"""Features by content: each picture computed once, those used longest ago forgotten first."""

import torch

from tests import tiny
from vila.chat.tokenize import Tokens
from vila.engine import vision_cache
from vila.engine.vision_cache import HashedImage, VisionCache, build_prompt


def shown(*numbers):
    return [HashedImage(str(number), tiny.image(number)) for number in numbers]


def counting(kept=256):
    """Features that name their picture, and the batches that were computed."""
    batches = []

    def compute(images):
        batches.append(images)
        return torch.stack([torch.full((2, 3), float(sum(image.source[-20:]))) for image in images])

    return VisionCache(compute, kept), batches


def test_features_come_in_the_order_of_the_pictures_and_equal_ones_are_computed_once():
    features, batches = counting()
    out = features(shown(1, 2, 1))
    assert torch.equal(out[0], out[2])
    assert not torch.equal(out[0], out[1])
    assert [len(batch) for batch in batches] == [2]
    assert torch.equal(features(shown(2, 1)), out[[1, 0]])
    assert len(batches) == 1


def test_the_picture_used_longest_ago_is_forgotten_first():
    features, batches = counting(kept=2)
    features(shown(1, 2))
    features(shown(1))
    features(shown(3))
    features(shown(1, 3))
    assert [len(batch) for batch in batches] == [2, 1]
    features(shown(2))
    assert [len(batch) for batch in batches] == [2, 1, 1]


def test_a_call_may_have_more_pictures_than_are_kept():
    features, _ = counting(kept=2)
    assert features(shown(1, 2, 3, 4, 1)).shape == (5, 2, 3)


def test_many_pictures_go_through_the_tower_in_batches(monkeypatch):
    monkeypatch.setattr(vision_cache, "_TOWER_BATCH", 2)
    features, batches = counting()
    together, _ = counting()
    out = features(shown(1, 2, 3, 4, 5))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert torch.equal(out, together(shown(1, 2, 3, 4, 5)))


def test_a_prompt_knows_its_pictures_by_content():
    one, other = tiny.image(1), tiny.image(2)
    tokens = Tokens(ids=[1, 9, 9, 2], labels=[], media=[one, other, one], runs=[(1, 1), (2, 1)])
    prompt = build_prompt(tokens)
    assert prompt.images[0] == prompt.images[2] != prompt.images[1]
    assert prompt.runs == ((1, 1), (2, 1))
