"""The data formats of training read what the preparation steps write."""

import base64
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.prepare.image_server import jpeg
from vila.core.types import Image, Sample, Text
from vila.data.formats.base import FORMATS
from vila.prepare.pkl import convert_pickles
from vila.prepare.vflan import prepare_flan


def read(name: str, path: Path) -> list[Sample]:
    source = FORMATS[name].open(path, path)
    return [source[index] for index in range(len(source))]


def parts_of(sample: Sample) -> list[object]:
    """Texts, and the bytes of images."""
    parts = [part for message in sample.messages for part in message.parts]
    return [part.text if isinstance(part, Text) else content(part) for part in parts]


def content(image: object) -> bytes:
    assert isinstance(image, Image) and not isinstance(image.source, (str, bytes, Path))
    return image.source.read()


def b64(number: int) -> str:
    return base64.b64encode(jpeg(number)).decode()


def convert(folder: Path, kind: str, records: list) -> Path:
    (folder / "in").mkdir()
    (folder / "in" / "part-0.pkl").write_bytes(pickle.dumps(records))
    convert_pickles(folder / "in", folder / "out", kind)
    return folder / "out"


def test_mmc4_documents_are_read_as_pages(tmp_path):
    infos = [{"image_base64": b64(1), "matched_text_index": 1}, {"image_base64": b64(2), "matched_text_index": 0}]
    out = convert(tmp_path, "mmc4", [{"text_list": ["A.", "B."], "image_info": infos}] * 2)
    pages = read("mmc4", out)
    assert len(pages) == 2 and parts_of(pages[0]) == [jpeg(2), "A.", jpeg(1), "B."]


def test_pairs_are_read_as_pairs(tmp_path):
    out = convert(tmp_path, "coyo", [{"id": 7, "url": "u", "text": "one", "image": b64(1)}])
    assert [parts_of(sample) for sample in read("coyo", out)] == [[jpeg(1), "one"]]


def test_questions_are_read_as_conversations(tmp_path):
    out = convert(tmp_path, "vflan", [{"question": "Which?", "answer": "This.", "image": [b64(1), b64(2)]}])
    (sample,) = read("vflan", out)
    assert [one for one in parts_of(sample) if isinstance(one, bytes)] == [jpeg(1), jpeg(2)]
    assert sample.messages[0].text.strip() == "Which?" and sample.messages[1].text.strip() == "This."


def test_text_is_read_as_text(tmp_path):
    pq.write_table(pa.table({"inputs": ["q0", "q1"], "targets": ["a0", "a1"]}), tmp_path / "t.parquet")
    prepare_flan([tmp_path / "t.parquet"], tmp_path / "out", rows=2)
    assert [parts_of(sample) for sample in read("flan", tmp_path / "out")] == [["q0", "a0"], ["q1", "a1"]]
