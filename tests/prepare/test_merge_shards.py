"""A prepared shard that ends too early is an error that names it, wherever it was cut."""

import tarfile

import pytest

from vila.core.errors import DataError
from vila.prepare.shards import TarSample, read_tar, write_tar

BLOCK = tarfile.BLOCKSIZE
SAMPLES = [TarSample(f"k{n}", (("json", b"{}"), ("0.jpg", bytes([n]) * (n * 300)))) for n in range(4)]


def written(folder):
    """The shard, where its headers begin and where its last member ends, in bytes."""
    path = folder / "s.tar"
    write_tar(path, SAMPLES)
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    return path, [member.offset for member in members], members[-1].offset_data + -(-900 // BLOCK) * BLOCK


def test_a_prepared_shard_cut_exactly_at_a_header_is_an_error_that_names_it(tmp_path):
    path, headers, _ = written(tmp_path)
    whole = path.read_bytes()
    for place in headers:
        path.write_bytes(whole[:place])
        with pytest.raises(DataError) as caught:
            list(read_tar(path))
        assert caught.value.file == str(path) and "prepare it again" in caught.value.hint


@pytest.mark.parametrize("zeros", [0, 1, BLOCK - 1])
def test_a_prepared_shard_without_its_closing_zero_blocks_is_an_error_that_names_it(zeros, tmp_path):
    path, _, end = written(tmp_path)
    path.write_bytes(path.read_bytes()[: end + zeros])
    with pytest.raises(DataError) as caught:
        list(read_tar(path))
    assert caught.value.file == str(path) and f"byte {end}: no end-of-archive mark" in caught.value.problem


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_prepared_shard_needs_no_padding_behind_its_end_mark(blocks, tmp_path):
    path, _, end = written(tmp_path)
    path.write_bytes(path.read_bytes()[: end + blocks * BLOCK])
    assert list(read_tar(path)) == SAMPLES
