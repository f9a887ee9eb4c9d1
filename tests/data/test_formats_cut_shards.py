"""A shard that is cut anywhere is an error that names it."""

import tarfile

import pytest

from tests.data.shards import PIXELS, refusal, write_tar
from vila.data.formats.base import FORMATS

BLOCK = tarfile.BLOCKSIZE
MEMBERS = [
    ("a.jpg", PIXELS),
    ("a.txt", "A cat."),
    ("b.jpg", PIXELS * 100),
    ("b.txt", "B" * BLOCK),
    ("folder/" + "c" * 120 + ".jpg", PIXELS),  # a name that takes headers of its own
    ("folder/" + "c" * 120 + ".txt", "A dog."),
]


def written(folder):
    """The shard, where its headers begin and where its last member ends, in bytes."""
    path = write_tar(folder / "d.tar", MEMBERS)
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    ends = [member.offset_data + -(-member.size // BLOCK) * BLOCK for member in members]
    return path, [0, *ends[:-1]], ends[-1]


def samples(path):
    return list(FORMATS["webdataset"].open(path, path.parent))


def test_a_shard_cut_exactly_at_a_header_is_an_error(tmp_path):
    path, headers, _ = written(tmp_path)
    whole = path.read_bytes()
    for header in headers:
        path.write_bytes(whole[:header])
        error = refusal(lambda: samples(path))
        assert error.file == str(path) and error.hint
    path.write_bytes(whole[: headers[2]])
    error = refusal(lambda: samples(path))
    assert error.record == "member 'a.txt'" and f"byte {headers[2]}" in error.problem


@pytest.mark.parametrize("zeros", [0, 1, BLOCK - 1])
def test_a_shard_without_end_of_archive_mark_is_an_error(zeros, tmp_path):
    path, _, end = written(tmp_path)
    path.write_bytes(path.read_bytes()[: end + zeros])
    error = refusal(lambda: samples(path))
    assert error.file == str(path) and error.record.startswith("member 'folder/c")


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_a_shard_needs_no_padding_after_its_end_mark(blocks, tmp_path):
    path, _, end = written(tmp_path)
    expected = [sample.messages[1:] for sample in samples(path)]
    path.write_bytes(path.read_bytes()[: end + blocks * BLOCK])
    assert [sample.messages[1:] for sample in samples(path)] == expected
    assert len(expected) == 3


@pytest.mark.parametrize("cut", [BLOCK, 2 * BLOCK])
def test_a_shard_cut_between_a_long_name_and_its_header_is_an_error(cut, tmp_path):
    path, headers, _ = written(tmp_path)
    path.write_bytes(path.read_bytes()[: headers[4] + cut])
    assert refusal(lambda: samples(path)).file == str(path)
