"""COYO-700M: pairs of alt-text and image URL with CLIP similarities; stage 2 of VILA uses the most similar ones.

Two steps: `select_coyo` writes lists of the selected rows of each parquet file, `prepare_coyo` downloads the lists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from vila.core.errors import ConfigError, DataError
from vila.core.files import write_json, write_jsonl
from vila.core.progress import SILENT, Events, task
from vila.core.reading import Fields
from vila.media.http_options import DEFAULT_OPTIONS, DownloadOptions
from vila.prepare.merge_shards import StepOptions, prepare_shards
from vila.prepare.records import read_parquet, read_rows, text_problem
from vila.prepare.resumable_download import (
    SHORT_SIDE_336,
    DownloadJob,
    Failure,
    PendingSample,
    ResizeRule,
    Results,
    download_units,
)
from vila.prepare.shards import TarSample, json_member, safe_key
from vila.prepare.work_units import Counts, check_settings, inputs_hash, locked_output, unit_names, units_of_worker

ROWS_PER_UNIT = 12_440
"""Rows of one list, which is one work unit; as in the released code."""
_SCORES = ("clip_similarity_vitb32", "clip_similarity_vitl14")


def select_coyo(
    sources: Sequence[Path],
    out: Path,
    *,
    share: float | None = 0.2,
    threshold: float | None = 0.6,
    rows_per_unit: int = ROWS_PER_UNIT,
    shard: tuple[int, int] = (0, 1),
    events: Events = SILENT,
) -> list[Path]:
    """Write `OUT/FILE-0000.jsonl` and so on: the selected rows (id, url, text, clip_sim), best first.

    clip_sim is the sum of both published similarities. A row is selected if clip_sim exceeds `threshold` and the row is
    in the best `share` of all rows of its file; None disables a criterion. The released code takes 20 % and fails if
    0.6 leaves fewer; here the remaining rows are taken and the others counted.
    Worker `shard` = (k, n) processes every n-th file. Returns the lists of this worker; existing ones are not written
    again. `OUT/FILE.selected.json` contains the counts.
    """
    if share is None and threshold is None:
        raise ConfigError("share and threshold are both None", hint="give one, or download the files without selection")
    if share is not None and not 0 < share <= 1:
        raise ConfigError(field="share", value=share, expected="a number over 0, at most 1")
    units = unit_names(sources)
    rule = {"share": share, "threshold": threshold, "rows_per_unit": rows_per_unit}
    lists: list[Path] = []
    own = units_of_worker(units, shard)
    with locked_output(out, shard, events), task(events, "coyo: selection", len(own), "files"):
        check_settings(out, {"step": "coyo selection", **rule, "inputs": inputs_hash(units)})
        for name in own:
            record = out / f"{name}.selected.json"
            if not record.is_file():
                write_json(record, _select(name, units[name], out, share, threshold, rows_per_unit))
            lists += read_selection(record)[0]
            events.advanced("coyo: selection")
    return lists


def read_selection(record: Path) -> tuple[list[Path], Fields]:
    """Read `FILE.selected.json`: the lists that were written, and the counts. Raises DataError if it is damaged."""
    fields = Fields.of_file(record)
    return [record.parent / file for file in fields.texts("files")], fields.section("counts")


def best_rows(scores: Sequence[float], share: float | None, threshold: float | None) -> list[int]:
    """Return the indices of the selected scores, best first; ties keep their order, NaN is never selected.

    >>> best_rows([0.5, 0.9, 0.7, 0.9], share=0.5, threshold=0.6)
    [1, 3]
    """
    enough = [index for index, score in enumerate(scores) if score > (-math.inf if threshold is None else threshold)]
    enough.sort(key=lambda index: -scores[index])
    return enough if share is None else enough[: int(len(scores) * share + 1e-9)]


def prepare_coyo(
    lists: Sequence[Path],
    out: Path,
    *,
    download: DownloadOptions = DEFAULT_OPTIONS,
    resize: ResizeRule = SHORT_SIDE_336,
    per_shard: int = 10_000,
    **options: Unpack[StepOptions],
) -> dict[str, Any] | None:
    """Download selected pairs to `OUT/coyo-000000.tar` and so on: `KEY.jpg`, `KEY.txt`, `KEY.json` (id, url, clip_sim).

    lists: the lists of all workers, the same on every worker; worker `shard` = (k, n) downloads every n-th.
    Returns the index, or None while other workers are not finished. To resume, call it again.
    """
    convert = partial(download_units, DownloadJob(out, "pairs", coyo_pending, pair_sample, download, resize))
    settings = {"step": "coyo", "per_shard": per_shard, **resize.settings}
    return prepare_shards(out, "coyo", "pairs", unit_names(lists), settings, convert, per_shard=per_shard, **options)


def coyo_pending(path: Path) -> Iterator[PendingSample | str]:
    """Yield the pairs of one list: records with `url` and `text`; other keys are kept."""
    unit = safe_key(path.name.partition(".")[0])
    for row, record in read_rows(path):
        url, text = record.get("url"), record.get("text")
        if not isinstance(url, str) or not url:
            yield "no url"
        elif not isinstance(text, str) or not text.strip():
            yield "no text"
        elif problem := text_problem(record):
            yield problem
        else:
            yield PendingSample(f"{unit}-{row:06d}", record, (url,))


def pair_sample(pending: PendingSample, results: Results, counts: Counts) -> TarSample | str:
    """Build a pair: the image, the caption as plain text, and the rest of the record as JSON."""
    image = results[0]
    if isinstance(image, Failure):
        return image.kind
    rest = {key: value for key, value in pending.record.items() if key != "text"}
    text = pending.record["text"].encode()
    return TarSample(pending.key, ((image.extension, image.content), ("txt", text), json_member(rest)))


def _select(
    name: str, path: Path, out: Path, share: float | None, threshold: float | None, rows_per_unit: int
) -> dict[str, Any]:
    scores = [_score(path, number, record) for number, record in read_parquet(path, _SCORES)]
    selected = best_rows(scores, share, threshold)
    if not all(math.isfinite(scores[index]) for index in selected):
        raise DataError("an infinite similarity", file=path, hint="download it again")
    rank = {row: position for position, row in enumerate(selected)}
    found: list[dict[str, Any]] = [{}] * len(selected)
    for number, record in read_parquet(path, ("id", "url", "text")):
        position = rank.get(number - 1)
        if position is not None:
            found[position] = record | {"clip_sim": scores[number - 1]}
    files = []
    for index in range(0, len(found), rows_per_unit):
        files.append(f"{name}-{index // rows_per_unit:04d}.jsonl")
        write_jsonl(out / files[-1], found[index : index + rows_per_unit])
    passed = len(best_rows(scores, None, threshold))
    counts = Counts(len(scores), len(selected))
    counts.dropped.update({"below the threshold": len(scores) - passed, "outside the share": passed - len(selected)})
    return {"files": files, "counts": counts.as_json()}


def _score(path: Path, number: int, record: dict[str, Any]) -> float:
    for key in _SCORES:
        if not isinstance(record[key], int | float | None):
            raise DataError(file=path, record=f"row {number}", field=key, value=record[key], expected="a number")
    values = [record[key] for key in _SCORES]
    return math.nan if None in values else float(sum(values))
