"""Reading a truncated shard raises an error that names it, wherever it was truncated."""

import tarfile

import pytest

from vila.core.errors import DataError
from vila.prepare.shards import TarSample, read_tar, write_tar

BLOCK = tarfile.BLOCKSIZE
SAMPLES = [TarSample(f"k{n}", (("json", b"{}"), ("0.jpg", bytes([n]) * (n * 300)))) for n in range(4)]


def written(folder):
    """Return a shard, the offsets of its headers and the end of its last member."""
    path = folder / "s.tar"
    write_tar(path, SAMPLES)
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    return path, [member.offset for member in members], members[-1].offset_data + -(-900 // BLOCK) * BLOCK


def test_a_shard_truncated_at_a_header_is_refused_by_name(tmp_path):
    path, headers, _ = written(tmp_path)
    whole = path.read_bytes()
    for place in headers:
        path.write_bytes(whole[:place])
        with pytest.raises(DataError) as caught:
            list(read_tar(path))
        assert caught.value.file == str(path) and caught.value.hint


@pytest.mark.parametrize("zeros", [0, 1, BLOCK - 1])
def test_a_shard_without_closing_zero_blocks_is_refused_by_name(zeros, tmp_path):
    path, _, end = written(tmp_path)
    path.write_bytes(path.read_bytes()[: end + zeros])
    with pytest.raises(DataError) as caught:
        list(read_tar(path))
    assert caught.value.file == str(path) and f"byte {end}:" in caught.value.problem


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_shard_needs_no_padding_after_its_end_mark(blocks, tmp_path):
    path, _, end = written(tmp_path)
    path.write_bytes(path.read_bytes()[: end + blocks * BLOCK])
    assert list(read_tar(path)) == SAMPLES
