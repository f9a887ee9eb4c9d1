"""KV cache: allocation of rows within the budget, prefix sharing, eviction, and the memory of a row."""

import mmap
import random
import struct
import sys
from pathlib import Path

import pytest
import torch

from tests import tiny
from vila.core.errors import ConfigError
from vila.engine import kv_cache
from vila.engine.kv_cache import KVCache, KVCachePool, common_length, content_keys
from vila.engine.vision_cache import HashedImage, Prompt

LAYERS = 2


def make(tokens=256, rows=4, columns=None):
    shape = {"layers": LAYERS, "heads": 1, "width": 2, "rows": rows, "columns": columns or tokens}
    return KVCachePool(KVCache(**shape, dtype=torch.float32, device=torch.device("cpu")), tokens)


def numbers(*bounds):
    return list(range(*bounds))


def fill(pool, row, keys):
    """Write the missing columns of a row; the key of a token is its content key, its value the negative."""
    columns = slice(len(row.content), len(keys))
    new = torch.tensor(keys[columns], dtype=torch.float32)[:, None]
    for layer in range(LAYERS):
        pool.cache.keys[layer][row.row, 0, columns] = new
        pool.cache.values[layer][row.row, 0, columns] = -new
    row.content = list(keys)
    row.expected = ()


def is_intact(pool, row):
    """Whether the memory of a row holds what its content says."""
    wanted = torch.tensor(row.content, dtype=torch.float32)
    return all(
        torch.equal(pool.cache.keys[layer][row.row, 0, : len(wanted), 1], wanted)
        and torch.equal(pool.cache.values[layer][row.row, 0, : len(wanted), 0], -wanted)
        for layer in range(LAYERS)
    )


def finished(pool, keys, columns):
    """Allocate a row, fill and release it."""
    row = pool.allocate(keys, columns)
    fill(pool, row, keys)
    pool.release(row)
    return row


def test_common_length_equals_a_linear_search():
    draw = random.Random(0)
    for _ in range(200):
        one, other = ([draw.randrange(2) for _ in range(draw.randrange(9))] for _ in range(2))
        agree = [a == b for a, b in zip(one, other, strict=False)]
        assert common_length(one, other) == next((i for i, same in enumerate(agree) if not same), len(agree))


def test_content_keys_identify_images_by_content():
    def keys(*images):
        hashed = tuple(HashedImage(image.key(), lambda: None) for image in map(tiny.image, images))
        return content_keys(Prompt([9, 5, 5, 8, 5, 5], ((1, 2), (4, 2)), hashed))

    assert keys(1, 2) == keys(1, 2)
    assert common_length(keys(1, 2), keys(1, 3)) == 4
    assert common_length(keys(2, 1), keys(1, 2)) == 1
    assert [key for key in keys(1, 2) if key >= 0] == [9, 8]


def test_allocate_copies_the_common_prefix_of_a_finished_request():
    pool = make()
    first = finished(pool, numbers(40), 50)
    second = pool.allocate([*range(30), 7], 50)
    assert second.content == numbers(30)
    assert second.row != first.row
    assert is_intact(pool, second) and is_intact(pool, first)
    assert (pool.tokens_owned, pool.tokens_cached) == (30, 40)


def test_allocate_ignores_short_common_prefixes():
    pool = make()
    finished(pool, numbers(40), 50)
    assert pool.allocate([*range(15), 7, 8], 50).content == []
    assert pool.allocate([*range(16), 7, 8], 50).content == numbers(16)


def test_allocate_leaves_the_last_token_of_a_prompt_to_compute():
    pool = make()
    finished(pool, numbers(40), 50)
    assert pool.allocate(numbers(40), 50).content == numbers(39)


def test_allocate_shares_at_most_max_shared_tokens():
    pool = make()
    finished(pool, numbers(40), 50)
    assert pool.allocate(numbers(40), 50, max_shared=20).content == numbers(20)


def test_allocate_continues_a_conversation_in_its_own_row():
    pool = make()
    first = pool.allocate(numbers(20), 50)
    fill(pool, first, numbers(30))
    pool.release(first)
    again = pool.allocate(numbers(40), 50)
    assert (again.row, again.content) == (first.row, numbers(30))


def test_allocate_copies_from_a_running_row():
    pool = make()
    first = pool.allocate(numbers(40), 50)
    fill(pool, first, numbers(24))
    second = pool.allocate([*range(39), 7], 50)
    assert second.content == numbers(24)
    assert second.row != first.row
    assert is_intact(pool, second) and is_intact(pool, first)


def test_is_prefix_coming_only_while_a_running_prompt_will_be_a_longer_prefix():
    pool = make()
    first = pool.allocate(numbers(40), 50)
    alike, other = [*range(39), 7], [99, *range(39)]
    assert pool.is_prefix_coming(alike)
    assert not pool.is_prefix_coming(other)
    assert not pool.is_prefix_coming(alike, max_shared=15)
    first.content = numbers(24)
    assert not pool.is_prefix_coming(alike)  # 15 more tokens are not worth the wait
    first.content, first.expected = numbers(40), ()
    assert not pool.is_prefix_coming(alike)


def test_allocate_evicts_the_least_recently_used_row():
    pool = make(rows=2)
    for begin in (100, 200):
        finished(pool, numbers(begin, begin + 40), 50)
    finished(pool, numbers(100, 140), 50)  # uses the older row again
    pool.allocate(numbers(300, 340), 50)
    assert pool.allocate(numbers(200, 240), 50).content == []


def test_allocate_evicts_rows_when_the_budget_is_full():
    pool = make(tokens=160, rows=8)
    for begin in (100, 200, 300):
        finished(pool, numbers(begin, begin + 40), 48)
    assert pool.tokens_cached == 120
    pool.allocate(numbers(400, 440), 48)
    assert [row.content[:1] for row in pool.rows if row.content] == [[200], [300]]


def test_a_long_request_runs_beside_short_ones():
    pool = make(tokens=256, rows=9)
    long = pool.allocate(numbers(60), 128)
    short = [pool.allocate(numbers(begin, begin + 10), 16) for begin in range(100, 900, 100)]
    assert None not in short
    assert len({row.row for row in (long, *short)}) == 9
    for row, begin in zip(short, range(100, 900, 100), strict=True):
        fill(pool, row, numbers(begin, begin + 10))
    fill(pool, long, numbers(128))
    assert all(is_intact(pool, row) for row in pool.rows)


def test_allocate_returns_none_until_the_budget_allows_the_request():
    pool = make(tokens=256, rows=8)
    long = pool.allocate(numbers(200), 240)
    short = pool.allocate(numbers(300, 310), 16)
    assert short is not None
    assert pool.allocate(numbers(400, 410), 16) is None
    fill(pool, long, numbers(200))
    pool.release(long)
    assert pool.allocate(numbers(400, 410), 16) is not None


def test_allocate_returns_none_without_a_free_row():
    pool = make(rows=2)
    rows = [pool.allocate([begin], 16) for begin in range(2)]
    assert not pool.has_free_row
    assert pool.allocate([3], 16) is None
    pool.release(rows[0])
    assert pool.has_free_row
    assert pool.allocate([3], 16) is not None


def test_allocate_recomputes_a_prefix_that_does_not_fit_beside_the_request():
    pool = make(tokens=96, rows=3)
    finished(pool, numbers(80), 80)
    row = pool.allocate([*range(40), 7], 64)
    assert row.content == []
    fill(pool, row, [*range(40), 7])
    assert sum(row.held for row in pool.rows) <= 96
    assert is_intact(pool, row)


def test_max_length_is_limited_by_the_row_and_by_the_budget():
    assert make(tokens=100).max_length == 96
    assert make(tokens=100, columns=60).max_length == 60
    pool = make(tokens=100)
    assert pool.allocate(numbers(90), 97) is None
    assert pool.allocate(numbers(90), 96) is not None


def test_forget_clears_a_row_and_drops_its_content():
    pool = make()
    row = pool.allocate(numbers(40), 50)
    fill(pool, row, numbers(40))
    pool.cache.values[1][row.row, 0, 3] = torch.nan
    pool.forget(row)
    assert not any(buffer.any() for buffer in pool.cache.buffers)
    assert pool.tokens_owned == pool.tokens_cached == 0
    assert pool.allocate(numbers(40), 50).content == []


def test_forget_all_frees_every_row():
    pool = make(rows=2)
    rows = [pool.allocate(numbers(begin, begin + 20), 32) for begin in (0, 100)]
    for row, begin in zip(rows, (0, 100), strict=True):
        fill(pool, row, numbers(begin, begin + 20))
    pool.forget_all()
    assert not any(buffer.any() for buffer in pool.cache.buffers)
    assert [(row.content, row.held) for row in pool.rows] == [([], 0)] * 2


def test_drop_prefixes_keeps_the_rows_of_running_requests():
    pool = make()
    finished(pool, numbers(40), 50)
    running = pool.allocate(numbers(100, 140), 50)
    fill(pool, running, numbers(100, 140))
    pool.drop_prefixes()
    assert (pool.tokens_owned, pool.tokens_cached) == (40, 0)
    assert pool.allocate(numbers(40), 50).content == []


@pytest.mark.parametrize("seed", range(8))
def test_rows_stay_intact_under_random_requests(seed):
    draw = random.Random(seed)
    pool = make(tokens=draw.choice([100, 256, 400]), rows=draw.randrange(1, 6))
    running = []
    for _ in range(150):
        if running and draw.random() < 0.5:
            row = running.pop(draw.randrange(len(running)))
            pool.forget(row) if draw.random() < 0.1 else pool.release(row)
        begin = draw.choice([0, 0, 100, 200])
        keys = [*range(begin, begin + draw.randrange(1, 60)), draw.randrange(1000)]
        columns = len(keys) + draw.randrange(1, 20)
        if columns <= pool.max_length and (row := pool.allocate(keys, columns)) is not None:
            assert row.content == keys[: len(row.content)]
            assert len(row.content) < len(keys)
            assert row.reserved >= columns
            fill(pool, row, keys)
            running.append(row)
        assert all(is_intact(pool, row) for row in pool.rows)
        assert [row.row for row in pool.rows] == list(range(pool.cache.rows))
        assert {id(row) for row in running} == {id(row) for row in pool.rows if row.reserved}
        assert sum(row.held for row in pool.rows) <= pool.tokens


@pytest.mark.parametrize(("heads", "columns", "width"), [(2, 7, 4), (3, 40, 8), (2, 3000, 64)])
def test_clear_sets_one_row_to_zero_and_no_other(heads, columns, width):
    cache = KVCache(2, heads, width, 3, columns, dtype=torch.float32, device=torch.device("cpu"))
    for buffer in cache.buffers:
        buffer.fill_(1.5)
    cache.clear(1)
    for buffer in cache.buffers:
        assert not buffer[:, 1].any()
        assert (buffer[:, [0, 2]] == 1.5).all()


def test_copy_copies_the_first_tokens_of_all_layers():
    cache = KVCache(2, 2, 4, 2, 32, dtype=torch.float32, device=torch.device("cpu"))
    for buffer in cache.buffers:
        buffer[:, 0].normal_(generator=torch.Generator().manual_seed(0))
    cache.copy(0, 1, 10)
    for buffer in cache.buffers:
        assert torch.equal(buffer[:, 1, :, :10], buffer[:, 0, :, :10])
        assert not buffer[:, 1, :, 10:].any()


def test_token_bytes_counts_keys_and_values_of_all_layers():
    cache = KVCache(3, 2, 8, 4, 64, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert cache.token_bytes == 3 * 2 * 2 * 8 * 2


def test_refused_address_space_is_a_config_error(monkeypatch):
    def refuse(nbytes):
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(kv_cache, "_reserve", refuse)
    with pytest.raises(ConfigError):
        KVCache(2, 2, 4, 2, 32, dtype=torch.float32, device=torch.device("cpu"))


def resident(cache):
    """Bytes of the cache's rows that are in memory."""
    count = 0
    with Path("/proc/self/pagemap").open("rb") as pages:
        for buffer in cache.buffers:
            first = buffer.data_ptr() // mmap.PAGESIZE
            pages.seek(8 * first)
            content = pages.read(8 * (-(-buffer.nbytes // mmap.PAGESIZE)))
            count += sum(entry >> 63 for (entry,) in struct.iter_unpack("=Q", content))
    return count * mmap.PAGESIZE


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/pagemap")


@linux_only
def test_memory_is_committed_when_tokens_are_written_and_returned_by_clear():
    cache = KVCache(2, 2, 64, 8, 4096, dtype=torch.float32, device=torch.device("cpu"))
    assert resident(cache) == 0
    for buffer in cache.buffers:
        buffer[:, 3, :, :512] = 1
    written = 512 * cache.token_bytes
    assert written <= resident(cache) <= written + 2 * 2 * 2 * 2 * mmap.PAGESIZE
    cache.clear(3)
    assert resident(cache) <= 2 * 2 * 2 * mmap.PAGESIZE


@linux_only
def test_committed_memory_stays_within_the_budget_under_eviction():
    cache = KVCache(2, 2, 64, 16, 1024, dtype=torch.float32, device=torch.device("cpu"))
    pool = KVCachePool(cache, 2048)
    draw = random.Random(0)
    # Each head of a row may begin and end inside a page.
    limit = 2048 * cache.token_bytes + 2 * 16 * 2 * 2 * 2 * mmap.PAGESIZE
    running, most = [], 0
    for number in range(60):
        while len(running) > 3 or (running and draw.random() < 0.4):
            pool.release(running.pop(0))
        columns = draw.choice([64, 128, 512, 1024])
        row = pool.allocate([number] * columns, columns)
        if row is not None:
            for buffer in cache.buffers:
                buffer[:, row.row, :, :columns] = 1
            row.content, row.expected = [number] * columns, ()
            running.append(row)
        most = max(most, resident(cache))
        assert resident(cache) <= limit
    assert most > 1024 * cache.token_bytes
