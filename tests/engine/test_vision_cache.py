"""Vision cache: features by image content, LRU eviction, and prompts with hashed images."""

import torch

from tests import tiny
from vila.chat.tokenize import Tokens
from vila.engine.vision_cache import HashedImage, VisionCache, build_prompt


def images(*keys):
    return [HashedImage(str(key), lambda: None) for key in keys]


def features(*values):
    """Features [N, 2, 3] filled with one value per image."""
    return torch.tensor(values, dtype=torch.float32)[:, None, None].expand(-1, 2, 3)


def test_features_are_returned_in_the_order_of_the_images():
    cache = VisionCache()
    cache.add(images(1, 2), features(10, 20))
    assert torch.equal(cache(images(2, 1, 2)), features(20, 10, 20))


def test_missing_lists_uncached_images_once():
    cache = VisionCache()
    cache.add(images(1), features(10))
    assert cache.missing(images(3, 1, 2, 3)) == images(3, 2)


def test_the_least_recently_used_image_is_evicted():
    cache = VisionCache(max_images=2)
    cache.add(images(1, 2), features(10, 20))
    cache(images(1))
    cache.add(images(3), features(30))
    cache(images(1, 3))
    assert cache.missing(images(1, 2, 3)) == images(2)


def test_a_prompt_may_have_more_images_than_the_cache():
    cache = VisionCache(max_images=2)
    cache.add(images(1, 2, 3, 4), features(10, 20, 30, 40))
    assert torch.equal(cache(images(1, 2, 3, 4, 1)), features(10, 20, 30, 40, 10))
    assert len(cache.missing(images(1, 2, 3, 4))) == 2


def test_cached_features_do_not_share_memory_with_their_batch():
    cache = VisionCache()
    batch = features(10, 20).clone()
    cache.add(images(1, 2), batch)
    batch.zero_()
    assert torch.equal(cache(images(1, 2)), features(10, 20))


def test_build_prompt_identifies_images_by_content():
    _, processor = tiny.vila()
    one, other = tiny.image(1), tiny.image(2)
    tokens = Tokens(ids=[1, 9, 9, 9, 2], labels=[], media=[one, other, one], runs=[(1, 1), (2, 1), (3, 1)])
    prompt = build_prompt(tokens, processor)
    assert prompt.images[0] == prompt.images[2] != prompt.images[1]
    assert prompt.runs == ((1, 1), (2, 1), (3, 1))
    assert torch.equal(prompt.images[1].preprocess(), processor.pixels([other])[0])


def test_build_prompt_distinguishes_vision_settings():
    _, processor = tiny.vila()
    tokens = Tokens(ids=[1, 9], labels=[], media=[tiny.image(1, size=(60, 28))], runs=[(1, 1)])
    padded = build_prompt(tokens, processor).images[0]
    resized = build_prompt(tokens, processor.with_vision(image_mode="resize")).images[0]
    assert padded != resized
    assert not torch.equal(padded.preprocess(), resized.preprocess())
