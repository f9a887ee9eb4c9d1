"""MMC4 (arXiv 2304.06939): documents of sentences and image URLs, each image matched with a sentence.

Stage 2 of VILA uses MMC4-core "fewer faces": about 300 documents in each of 23,098 `.jsonl.zip` files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from vila.media.http_options import DEFAULT_OPTIONS, DownloadOptions
from vila.prepare.merge_shards import StepOptions, prepare_shards
from vila.prepare.records import read_rows, text_problem
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
from vila.prepare.work_units import Counts, unit_names


def prepare_mmc4(
    sources: Sequence[Path],
    out: Path,
    *,
    drop_incomplete: bool = False,
    download: DownloadOptions = DEFAULT_OPTIONS,
    resize: ResizeRule = SHORT_SIDE_336,
    per_shard: int = 1000,
    **options: Unpack[StepOptions],
) -> dict[str, Any] | None:
    """Write documents with their images to `OUT/mmc4-000000.tar` and so on: `KEY.json`, `KEY.0.jpg`, `KEY.1.png`, ...

    sources:         all published files, the same on every worker; worker `shard` = (k, n) processes every n-th.
    drop_incomplete: True, like the released code, drops a document if any image fails. False drops the failed images
                     (and their rows of the similarity matrix), and a document only if no image is left.
    `KEY.json` is the published document; each entry of `image_info` also has `file`, the suffix of its tar member.
    Returns the index, or None while other workers are not finished. To resume, call it again.
    """
    assemble = partial(mmc4_sample, drop_incomplete=drop_incomplete)
    convert = partial(download_units, DownloadJob(out, "mmc4", mmc4_pending, assemble, download, resize))
    settings = {"step": "mmc4", "drop_incomplete": drop_incomplete, "per_shard": per_shard, **resize.settings}
    return prepare_shards(out, "mmc4", "mmc4", unit_names(sources), settings, convert, per_shard=per_shard, **options)


def mmc4_pending(path: Path) -> Iterator[PendingSample | str]:
    """Yield the documents of one published file."""
    unit = safe_key(path.name.partition(".")[0])
    for row, document in read_rows(path):
        if problem := mmc4_problem(document):
            yield problem
        else:
            urls = tuple(info["raw_url"] for info in document["image_info"])
            yield PendingSample(f"{unit}-{row:06d}", document, urls)


def mmc4_problem(document: dict[str, Any]) -> str:
    """Return why a record is not an MMC4 document, "" if it is one. Images need a URL or, already present, base64."""
    texts, infos, matrix = (document.get(key) for key in ("text_list", "image_info", "similarity_matrix"))
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return "text_list is not a list of sentences"
    if not isinstance(infos, list) or not all(isinstance(info, dict) for info in infos):
        return "image_info is not a list of objects"
    for info in infos:
        index = info.get("matched_text_index")
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(texts):
            return "matched_text_index names no sentence"
        if "raw_url" in info and not isinstance(info["raw_url"], str):
            return "raw_url is not text"
        if "raw_url" not in info and "image_base64" not in info:
            return "an image without raw_url"
    if matrix is not None and (not isinstance(matrix, list) or len(matrix) != len(infos)):
        return "similarity_matrix and image_info differ in length"
    return text_problem(document)


def mmc4_sample(pending: PendingSample, results: Results, counts: Counts, *, drop_incomplete: bool) -> TarSample | str:
    """Build a document with the images that were downloaded, in their order."""
    failed = sum(isinstance(result, Failure) for result in results)
    if failed and drop_incomplete:
        return "an image failed"
    if failed == len(results):
        return "no image left" if failed else "no image"
    if failed:
        counts.noted["documents without some image"] += 1
    kept = [index for index, result in enumerate(results) if not isinstance(result, Failure)]
    infos: list[dict[str, Any]] = []
    members: list[tuple[str, bytes]] = []
    for number, index in enumerate(kept):
        image = results[index]
        assert not isinstance(image, Failure)
        file = f"{number}.{image.extension}"
        infos.append(pending.record["image_info"][index] | {"file": file})
        members.append((file, image.content))
    document = pending.record | {"image_info": infos}
    if document.get("similarity_matrix") is not None:
        document["similarity_matrix"] = [document["similarity_matrix"][index] for index in kept]
    return TarSample(pending.key, (json_member(document), *members))
