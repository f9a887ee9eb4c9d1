"""Convert the pickle shards of the released code (`X.pkl` with `X.count`) to WebDataset shards, executing nothing."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, Unpack

from vila.core.errors import DataError, MediaError
from vila.core.progress import Events
from vila.core.reading import file_errors
from vila.core.restricted_pickle import parse_plain_pickle
from vila.prepare.merge_shards import StepOptions, prepare_shards
from vila.prepare.mmc4 import mmc4_problem
from vila.prepare.records import text_problem
from vila.prepare.resumable_download import KEEP_ORIGINAL, DownloadedImage, encode_image
from vila.prepare.shards import TarSample, json_member
from vila.prepare.work_units import Counts, Kind, RecordDroppedError, convert_records, unit_names, write_units

_MAX_DEPTH = 100
_MAX_VALUES = 50_000_000


def read_plain_pickle(path: Path) -> Any:
    """Read a pickle that contains only None, bool, int, float, str, bytes, bytearray, list, tuple and dict.

    Raises DataError for any other type (`value` names the first), for truncated files, for values nested deeper than
    100 levels, and for values that would be too large as JSON.
    """
    with file_errors(path, DataError):
        content = path.read_bytes()
    value = parse_plain_pickle(content, file=path, error=DataError)
    _check_depth(value, path)
    return value


def _check_depth(value: Any, path: Path) -> None:
    """Reject values that contain themselves, are nested too deeply, or are too large when written as JSON."""
    level = {id(value): (value, 1)}
    visited = 0
    for _ in range(_MAX_DEPTH):
        following: dict[int, tuple[Any, int]] = {}
        for one, times in level.values():
            inner = one.values() if isinstance(one, dict) else one if isinstance(one, (list, tuple)) else ()
            # A list that contains the same list twice, and so on, is small in memory and huge as JSON.
            visited += len(inner) * times
            for part in inner:
                if isinstance(part, (dict, list, tuple)):
                    following[id(part)] = (part, following.get(id(part), (part, 0))[1] + times)
        if visited > _MAX_VALUES:
            raise DataError("too many values as JSON", file=path, expected=f"at most {_MAX_VALUES:,}")
        if not following:
            return
        level = following
    raise DataError("nested too deeply, or contains itself", file=path, expected=f"at most {_MAX_DEPTH} levels")


PickleKind = Literal["mmc4", "coyo", "vflan"]


def convert_pickles(
    source: Path, out: Path, kind: PickleKind, *, per_shard: int = 1000, **options: Unpack[StepOptions]
) -> dict[str, Any] | None:
    """Convert every `.pkl` below `source` to `OUT/KIND-000000.tar` and so on; images keep their bytes.

    mmc4:  documents whose `image_info` entries have `image_base64`.
    coyo:  {id, url, text or caption, clip_sim, image or rawbytes}.
    vflan: {question, answer, image}: no image, one, or a list, in base64; the keys may end with a colon.
    A `.count` file that differs from the number of records raises DataError: one of the files is incomplete.
    Returns the index, or None while other workers (`shard` = (k, n)) are not finished.
    """
    units = unit_names(sorted(source.rglob("*.pkl")))
    stored: Kind = "pairs" if kind == "coyo" else kind

    def samples(unit: str, path: Path, counts: Counts, failures: list[dict[str, Any]]) -> Iterable[TarSample]:
        def sample(row: int, record: Any) -> TarSample:
            if not isinstance(record, dict):
                raise RecordDroppedError("not a record")
            return _READERS[kind](f"{unit}-{row:06d}", record)

        return convert_records(enumerate(_records(path), start=1), sample, counts, failures)

    def convert(own: dict[str, Path], events: Events) -> None:
        write_units(f"{kind}: pickles", own, out, stored, samples, events)

    settings = {"step": f"{kind} pickles", "per_shard": per_shard}
    return prepare_shards(out, kind, stored, units, settings, convert, per_shard=per_shard, **options)


def _records(path: Path) -> list[Any]:
    records = read_plain_pickle(path)
    if not isinstance(records, list):
        raise DataError(file=path, value=type(records).__name__, expected="a list of records")
    count = path.with_suffix(".count")
    if count.is_file() and (stated := count.read_text(encoding="ascii", errors="replace").strip()) != str(len(records)):
        raise DataError(
            f"number of records differs from {count.name}",
            file=path,
            value=len(records),
            expected=stated[:40],
            hint="copy both files again",
        )
    return records


def _mmc4(key: str, record: dict[str, Any]) -> TarSample:
    if problem := mmc4_problem(record):
        raise RecordDroppedError(problem)
    infos, members = [], []
    for number, info in enumerate(record["image_info"]):
        image = decode_image_field(info.get("image_base64"))
        file = f"{number}.{image.extension}"
        infos.append({name: value for name, value in info.items() if name != "image_base64"} | {"file": file})
        members.append((file, image.content))
    return TarSample(key, (_json(record | {"image_info": infos}), *members))


def _coyo(key: str, record: dict[str, Any]) -> TarSample:
    text = record.get("text", record.get("caption"))
    if not isinstance(text, str) or not text.strip():
        raise RecordDroppedError("no text")
    if problem := text_problem(text):
        raise RecordDroppedError(problem)
    image = decode_image_field(record.get("image", record.get("rawbytes")))
    rest = {name: value for name, value in record.items() if name not in ("text", "caption", "image", "rawbytes")}
    return TarSample(key, ((image.extension, image.content), ("txt", text.encode()), _json(rest)))


def _vflan(key: str, record: dict[str, Any]) -> TarSample:
    return question_sample(key, *(record.get(name, record.get(f"{name}:")) for name in ("question", "answer", "image")))


def question_sample(key: str, question: Any, answer: Any, images: Any) -> TarSample:
    """Build a sample from a question, its answer and its images (none, one, or a list, in base64).

    Raises RecordDroppedError.
    """
    if not isinstance(question, str) or not question.strip():
        raise RecordDroppedError("no question")
    if not isinstance(answer, str) or not answer.strip():
        raise RecordDroppedError("no answer")
    if problem := text_problem([question, answer]):
        raise RecordDroppedError(problem)
    listed = [images] if isinstance(images, (str, bytes)) else images or []
    if not isinstance(listed, (list, tuple)):
        raise RecordDroppedError("image is not a list", type(images).__name__)
    decoded = [decode_image_field(image) for image in listed]
    files = [f"{number}.{image.extension}" for number, image in enumerate(decoded)]
    members = [(file, image.content) for file, image in zip(files, decoded, strict=True)]
    return TarSample(key, (json_member({"question": question, "answer": answer, "image": files}), *members))


def decode_image_field(value: Any) -> DownloadedImage:
    """Decode an image given in base64 or as bytes, and check that it is one. Raises RecordDroppedError."""
    if isinstance(value, str):
        if value.lower().endswith((".jpg", ".jpeg", ".png")):
            raise RecordDroppedError("a path instead of an image", value[:200])
        try:
            value = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError) as error:
            raise RecordDroppedError("damaged base64", str(error)) from error
    if not isinstance(value, (bytes, bytearray)):
        raise RecordDroppedError("no image")
    try:
        return encode_image(bytes(value), KEEP_ORIGINAL)
    except MediaError as error:
        raise RecordDroppedError("not an image", str(error)) from error


def _json(value: Any) -> tuple[str, bytes]:
    try:
        return json_member(value)
    except (TypeError, ValueError) as error:
        raise RecordDroppedError("a value that JSON cannot represent", str(error)) from error


_READERS: dict[PickleKind, Callable[[str, dict[str, Any]], TarSample]] = {"mmc4": _mmc4, "coyo": _coyo, "vflan": _vflan}
