"""The original's shards (`X.pkl` with `X.count` beside it) as WebDataset shards, read without running anything."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from vila.core.errors import DataError, MediaError
from vila.core.progress import SILENT, Events, task
from vila.core.reading import file_errors
from vila.core.restricted_pickle import parse_plain_pickle
from vila.prepare.download import KEEP_ORIGINAL, DownloadedImage, encode_image
from vila.prepare.merge_shards import merge_shards
from vila.prepare.mmc4 import mmc4_problem
from vila.prepare.records import text_problem
from vila.prepare.shards import TarSample, json_member
from vila.prepare.work_units import (
    Counts,
    check_settings,
    inputs_hash,
    is_finished,
    locks_output,
    unit_names,
    units_of_worker,
    write_unit,
)

# --- unpickle
# Pickled records of other programs: plain values only, checked for nesting and for size when written out.


_MAX_DEPTH = 100
_MAX_VALUES = 50_000_000


def read_plain_pickle(path: Path) -> Any:
    """Return the value of a pickle of None, bool, int, float, str, bytes, bytearray, list, tuple and dict.

    The file is read whole. Raises DataError with the file's name, and as `value` the first other thing that it asks
    for; also for files that are cut short, and for values nested deeper than 100 levels.
    """
    with file_errors(path, DataError):
        content = path.read_bytes()
    value = parse_plain_pickle(content, file=path, error=DataError)
    _check_depth(value, path)
    return value


def _check_depth(value: Any, path: Path) -> None:
    """Refuse values that contain themselves, are nested too deeply for others, or are endless when written out."""
    level = {id(value): (value, 1)}
    visited = 0
    for _ in range(_MAX_DEPTH):
        following: dict[int, tuple[Any, int]] = {}
        for one, times in level.values():
            inner = one.values() if isinstance(one, dict) else one if isinstance(one, (list, tuple)) else ()
            # A list of twice the same list, and so on, is small here and endless as JSON.
            visited += len(inner) * times
            for part in inner:
                if isinstance(part, (dict, list, tuple)):
                    following[id(part)] = (part, following.get(id(part), (part, 0))[1] + times)
        if visited > _MAX_VALUES:
            raise DataError(f"over {_MAX_VALUES:,} values when written out; refused", file=path)
        if not following:
            return
        level = following
    raise DataError(f"nested over {_MAX_DEPTH} levels, or without end; refused", file=path)


PickleKind = Literal["mmc4", "coyo", "vflan"]


@locks_output
def convert_pickles(
    source: Path,
    out: Path,
    kind: PickleKind,
    *,
    per_shard: int = 1000,
    shard: tuple[int, int] = (0, 1),
    keep_parts: bool = True,
    events: Events = SILENT,
) -> dict[str, Any] | None:
    """Convert every `.pkl` below `source` to `OUT/KIND-000000.tar` and so on; pictures keep their bytes.

    mmc4:  documents whose `image_info` entries hold `image_base64`.
    coyo:  {id, url, text or caption, clip_sim, image or rawbytes}.
    vflan: {question, answer, image}, image one or many in base64, or none; the keys may end with a colon.
    A `.count` that does not agree with its shard is an error: one of the two is not whole.
    Returns the index, or None while other workers (`shard` = (k, n)) are not finished.
    """
    units = unit_names(sorted(source.rglob("*.pkl")))
    check_settings(out, {"step": f"{kind} pickles", "per_shard": per_shard, "inputs": inputs_hash(units)})
    stored = "pairs" if kind == "coyo" else kind
    if not (out / "index.json").is_file():
        own = units_of_worker(units, shard)
        with task(events, f"{kind}: pickles", len(own), "files"):
            for unit in own:
                if not is_finished(out, unit):
                    counts, failures = Counts(), list[dict[str, Any]]()
                    samples = _samples(unit, _records(units[unit]), _READERS[kind], counts, failures)
                    write_unit(out, unit, stored, samples, counts, failures)
                    events.log(f"{unit}: {counts}")
                events.advanced(f"{kind}: pickles")
    return merge_shards(
        out, kind, stored, list(units), per_shard=per_shard, shard=shard, keep_parts=keep_parts, events=events
    )


def _records(path: Path) -> list[Any]:
    records = read_plain_pickle(path)
    if not isinstance(records, list):
        raise DataError(f"{path}: holds a {type(records).__name__}, expected a list of records")
    count = path.with_suffix(".count")
    if count.is_file() and (stated := count.read_text(encoding="ascii", errors="replace").strip()) != str(len(records)):
        raise DataError(f"{path}: {len(records)} records, but {count.name} says {stated[:40]!r}; copy both again")
    return records


def _samples(
    unit: str, records: list[Any], read: _Reader, counts: Counts, failures: list[dict[str, Any]]
) -> Iterator[TarSample]:
    for row, record in enumerate(records, start=1):
        counts.read += 1
        try:
            if not isinstance(record, dict):
                raise DataError("not a record")
            sample = read(f"{unit}-{row:06d}", record)
        except DataError as error:
            reason, _, detail = str(error).partition(": ")
            counts.dropped[reason] += 1
            failures.append({"row": row, "reason": reason, "detail": detail})
            continue
        counts.written += 1
        yield sample


def _mmc4(key: str, record: dict[str, Any]) -> TarSample:
    if fault := mmc4_problem(record):
        raise DataError(fault)
    infos, members = [], []
    for number, info in enumerate(record["image_info"]):
        picture = decode_image_field(info.get("image_base64"))
        file = f"{number}.{picture.extension}"
        infos.append({name: value for name, value in info.items() if name != "image_base64"} | {"file": file})
        members.append((file, picture.content))
    return TarSample(key, (_json(record | {"image_info": infos}), *members))


def _coyo(key: str, record: dict[str, Any]) -> TarSample:
    text = record.get("text", record.get("caption"))
    if not isinstance(text, str) or not text.strip():
        raise DataError("no text")
    if fault := text_problem(text):
        raise DataError(fault)
    picture = decode_image_field(record.get("image", record.get("rawbytes")))
    facts = {name: value for name, value in record.items() if name not in ("text", "caption", "image", "rawbytes")}
    return TarSample(key, ((picture.extension, picture.content), ("txt", text.encode()), _json(facts)))


def _vflan(key: str, record: dict[str, Any]) -> TarSample:
    return question_sample(key, *(record.get(name, record.get(f"{name}:")) for name in ("question", "answer", "image")))


def question_sample(key: str, question: Any, answer: Any, images: Any) -> TarSample:
    """A question, its answer and its images (base64, one or many or none) as a sample.

    Raises DataError with the reason, and details after a colon.
    """
    if not isinstance(question, str) or not question.strip():
        raise DataError("no question")
    if not isinstance(answer, str) or not answer.strip():
        raise DataError("no answer")
    if fault := text_problem([question, answer]):
        raise DataError(fault)
    listed = [images] if isinstance(images, (str, bytes)) else images or []
    if not isinstance(listed, (list, tuple)):
        raise DataError(f"image is no list: {type(images).__name__}")
    pictures = [decode_image_field(image) for image in listed]
    files = [f"{number}.{picture.extension}" for number, picture in enumerate(pictures)]
    members = [(file, picture.content) for file, picture in zip(files, pictures, strict=True)]
    return TarSample(key, (json_member({"question": question, "answer": answer, "image": files}), *members))


def decode_image_field(value: Any) -> DownloadedImage:
    """A picture in base64, or as bytes, which must decode. Raises DataError with the reason, details after a colon."""
    if isinstance(value, str):
        if value.lower().endswith((".jpg", ".jpeg", ".png")):
            raise DataError(f"a path instead of a picture: {value[:200]}")
        try:
            value = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"damaged base64: {error}") from error
    if not isinstance(value, (bytes, bytearray)):
        raise DataError("no image")
    try:
        return encode_image(bytes(value), KEEP_ORIGINAL)
    except MediaError as error:
        raise DataError(f"not an image: {error}") from error


def _json(value: Any) -> tuple[str, bytes]:
    try:
        return json_member(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"a value that JSON cannot hold: {error}") from error


_Reader = Callable[[str, dict[str, Any]], TarSample]
_READERS: dict[PickleKind, _Reader] = {"mmc4": _mmc4, "coyo": _coyo, "vflan": _vflan}
