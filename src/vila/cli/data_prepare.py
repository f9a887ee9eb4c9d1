"""`vila data prepare ...`: convert public data sets to training shards with the steps of `vila.prepare`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from vila.cli import options
from vila.cli.options import with_option_groups
from vila.core.errors import ConfigError, UnknownNameError
from vila.media.http_options import DEFAULT_OPTIONS, DownloadOptions

if TYPE_CHECKING:
    from vila.prepare.work_units import Counts


app = typer.Typer(
    help="Convert public data sets to training shards. Every command resumes after an interruption.",
    no_args_is_help=True,
)

# --- shared flags and output

Sources = Annotated[list[Path], typer.Argument(help="Published files; pass all of them to every worker.")]
Out = Annotated[
    Path,
    typer.Option("--output", "-o", help="Output directory, one per data set.", callback=options.output_directory),
]
Decode = Annotated[
    bool,
    typer.Option("--decode-images", help="Also decode every image as a check; about 160 images per second and core."),
]


@dataclass(frozen=True)
class WorkerOptions:
    """Flags of work that several workers share."""

    shard: Annotated[str, typer.Option(metavar="K/N")] = "0/1"
    """Index of this worker (from 0) and number of workers."""
    samples_per_shard: Annotated[int, typer.Option(min=1)] = 1000
    """Maximum number of samples per shard."""
    keep_intermediate: Annotated[bool, typer.Option("--keep-intermediate/--delete-intermediate")] = True
    """Keep intermediate files in OUT/parts; doubles the disk space."""

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the steps in `vila.prepare`. Raises ConfigError."""
        shard = parse_shard(self.shard)
        return {"shard": shard, "per_shard": self.samples_per_shard, "keep_parts": self.keep_intermediate}


@dataclass(frozen=True)
class ResizeOptions:
    """Flags of images that are downloaded."""

    panel: ClassVar = "Stored images"

    short_side: Annotated[int, typer.Option(min=0)] = 336
    """Resize images so that their shorter side has at most this many pixels; 0 stores the original bytes."""
    quality: Annotated[int, typer.Option(min=1, max=100)] = 90
    """JPEG quality of resized images, 1 to 100."""


@dataclass(frozen=True, kw_only=True)
class DownloadFlags(DownloadOptions):
    """Flags of downloads."""

    panel: ClassVar = "Downloading"

    max_bytes: Annotated[int, typer.Option("--max-image-bytes")] = DEFAULT_OPTIONS.max_bytes
    """Maximum size of an image in bytes."""
    allow_private: Annotated[bool, typer.Option("--allow-private-urls/--no-allow-private-urls")] = False
    """Allow private and local addresses."""


WORK_1000 = WorkerOptions()
WORK_5000 = WorkerOptions(samples_per_shard=5000)
WORK_10_000 = WorkerOptions(samples_per_shard=10_000)
WORK_50_000 = WorkerOptions(samples_per_shard=50_000)
RESIZE, DOWNLOAD = ResizeOptions(), DownloadFlags()


def parse_shard(text: str) -> tuple[int, int]:
    """Parse `2/8` as (2, 8). Raises ConfigError."""
    index, _, workers = text.partition("/")
    if not (index.isdecimal() and workers.isdecimal() and int(index) < int(workers)):
        raise ConfigError(field="--shard", value=text, expected="K/N with K from 0 to N - 1, such as 0/4")
    return int(index), int(workers)


def _download_settings(work: WorkerOptions, resize: ResizeOptions, fetch: DownloadFlags) -> dict[str, Any]:
    """Return the arguments of the steps that download images. Raises ConfigError."""
    from vila.prepare.resumable_download import ResizeRule

    rule = ResizeRule(resize.short_side or None, resize.quality)
    return {**work.settings(), "download": fetch, "resize": rule}


def _run(step: Callable[..., dict[str, Any] | None], out: Path) -> None:
    """Run a step with a progress bar, and print its counts."""
    from vila.cli.progress import Screen

    with Screen() as screen:
        index = step(events=screen)
    print_counts(index, out)


def print_counts(index: dict[str, Any] | None, out: Path) -> None:
    """Print the numbers of input, output and dropped records; without an index, that other workers must finish."""
    if index is None:
        typer.echo(f"{out}: this worker is done; run the same command again when all workers are done")
        return
    print_table("records", index["counts"])
    shards = index["shards"]
    typer.echo(f"{out}: {sum(one['samples'] for one in shards):,} samples in {len(shards):,} files")
    if index["counts"]["dropped"] or index["counts"]["noted"]:
        typer.echo(f"dropped records: {out / 'log' / 'failures.jsonl'}")


def print_table(title: str, counts: dict[str, Any]) -> None:
    """Print stored counts as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title, "number")
    table.add_row("in", f"{counts['in']:,}")
    table.add_row("out", f"{counts['out']:,}")
    for kind in ("dropped", "noted"):
        for name, number in counts[kind].items():
            table.add_row(f"{kind}: {name}", f"{number:,}")
    Console().print(table)


# --- data sets with image URLs

_Keep = Annotated[
    float, typer.Option(help="Fraction of the rows of each file to keep, best scores first; above 0, at most 1.")
]
_Threshold = Annotated[float, typer.Option(help="Minimum sum of both CLIP similarities, -2 to 2; -2 keeps all.")]
_PerList = Annotated[int, typer.Option(help="Rows per list; a list is one unit of work.", min=1)]


@app.command()
@with_option_groups
def mmc4(
    sources: Sources,
    out: Out,
    work: WorkerOptions = WORK_1000,
    drop_incomplete: Annotated[
        bool,
        typer.Option("--drop-incomplete", help="Drop a document at its first missing image, as the original does."),
    ] = False,
    resize: ResizeOptions = RESIZE,
    fetch: DownloadFlags = DOWNLOAD,
) -> None:
    """Download the images of MMC4 documents (.jsonl, .jsonl.gz or .jsonl.zip)."""
    from vila.prepare.mmc4 import prepare_mmc4

    settings = _download_settings(work, resize, fetch)
    _run(partial(prepare_mmc4, sources, out, drop_incomplete=drop_incomplete, **settings), out)


@app.command()
@with_option_groups
def coyo(
    sources: Sources,
    out: Out,
    keep_fraction: _Keep = 0.2,
    min_clip_score: _Threshold = 0.6,
    rows_per_list: _PerList = 12_440,
    work: WorkerOptions = WORK_10_000,
    resize: ResizeOptions = RESIZE,
    fetch: DownloadFlags = DOWNLOAD,
) -> None:
    """Select the best pairs of COYO parquet files (lists in OUT/lists) and download their images."""
    from vila.cli.progress import Screen
    from vila.prepare.coyo import prepare_coyo, select_coyo

    settings = _download_settings(work, resize, fetch)
    select = {"share": keep_fraction, "threshold": min_clip_score, "rows_per_unit": rows_per_list}
    lists = out / "lists"
    with Screen() as screen:
        select_coyo(sources, lists, **select, shard=settings["shard"], events=screen)  # type: ignore[arg-type]
        chosen = _selected(sources, lists)
        index = prepare_coyo(chosen[0], out, **settings, events=screen) if chosen else None
    if chosen:
        print_table("rows of the tables", chosen[1].as_json())
    print_counts(index, out)


def _selected(sources: Sequence[Path], lists: Path) -> tuple[list[Path], Counts] | None:
    """Return the lists of all workers and the dropped counts; None while selections are missing."""
    from vila.core.errors import DataError
    from vila.prepare.coyo import read_selection
    from vila.prepare.work_units import Counts, unit_names

    records = [lists / f"{name}.selected.json" for name in unit_names(sources)]
    if not all(record.is_file() for record in records):
        return None
    found = [read_selection(record) for record in records]
    files = [file for own, _ in found for file in own]
    if not files:
        raise DataError(
            f"no row of {len(records)} files reaches it",
            file=lists,
            field="--min-clip-score",
            hint="use a lower one and another output directory",
        )
    return files, Counts.total(counts for _, counts in found)


class _Kind(StrEnum):
    MMC4 = "mmc4"
    COYO = "coyo"
    VFLAN = "vflan"


@app.command("llava-align")
def llava_align(
    source: Annotated[Path, typer.Argument(help="The published chat.json.")],
    images: Annotated[Path, typer.Option(help="Directory of images, or images.zip, which is unpacked to OUT/images.")],
    out: Out,
    decode_images: Decode = False,
) -> None:
    """Convert LLaVA-CC3M-Pretrain-595K; drops incomplete records."""
    from vila.prepare.llava_json import prepare_llava_align

    _run(partial(prepare_llava_align, source, images, out, decode=decode_images), out)


@app.command()
def sharegpt4v(
    source: Annotated[Path, typer.Argument(help="The published JSON list.")],
    out: Out,
    image_root: Annotated[
        Path | None, typer.Option(help="Base directory of the image paths. Default: images are not checked.")
    ] = None,
    keep_sam: Annotated[bool, typer.Option("--keep-sam", help="Keep records with SA-1B images.")] = False,
    decode_images: Decode = False,
) -> None:
    """Convert ShareGPT4V; drops SA-1B images and repetitive answers."""
    from vila.prepare.llava_json import prepare_sharegpt4v

    if decode_images and image_root is None:
        raise ConfigError("requires --image-root", field="--decode-images")
    step = partial(prepare_sharegpt4v, source, out, images=image_root, keep_sam=keep_sam, decode=decode_images)
    _run(step, out)


@app.command()
@with_option_groups
def m3it(
    folder: Annotated[
        Path,
        typer.Argument(help="Directory of the release; each data set is a subdirectory with its name, at any depth."),
    ],
    out: Out,
    sets: Annotated[
        list[str] | None,
        typer.Option("--dataset", help="Data set to convert. Repeatable. Default: the 14 data sets of the recipe."),
    ] = None,
    work: WorkerOptions = WORK_5000,
) -> None:
    """Convert the training files of M3IT data sets to image-question-answer samples."""
    from vila.prepare.vflan import prepare_m3it

    settings = work.settings()
    _run(partial(prepare_m3it, training_files(folder, sets or ()), out, **settings), out)


@app.command()
@with_option_groups
def flan(
    sources: Sources,
    out: Out,
    num_rows: Annotated[int, typer.Option(help="Total number of rows to take.", min=1)] = 1_000_000,
    work: WorkerOptions = WORK_50_000,
) -> None:
    """Convert evenly spaced rows of FLAN parquet files."""
    from vila.prepare.vflan import prepare_flan

    _run(partial(prepare_flan, sources, out, rows=num_rows, **work.settings()), out)


@app.command()
@with_option_groups
def pkl(
    folder: Annotated[Path, typer.Argument(help="Directory of the original .pkl and .count files, at any depth.")],
    kind: Annotated[_Kind, typer.Option(help="Content: mmc4 documents, coyo image-text pairs, or vflan questions.")],
    out: Out,
    work: WorkerOptions = WORK_1000,
) -> None:
    """Convert the pickled shards of the original; no pickle code is executed."""
    from vila.prepare.pkl import convert_pickles

    _run(partial(convert_pickles, folder, out, kind.value, **work.settings()), out)


# --- M3IT files

_ENDS = (".jsonl", ".jsonl.gz", ".jsonl.zip", ".parquet")


def training_files(folder: Path, chosen: Sequence[str]) -> dict[str, list[Path]]:
    """Return the training files by data set; all data sets of the recipe if `chosen` is empty.

    Files are those whose names begin with `train`; where a set has several kinds, the first of .jsonl, .jsonl.gz,
    .jsonl.zip, .parquet. Raises ConfigError naming every set without one.
    """
    from vila.prepare.vflan import SETS

    known = [name for names in SETS.values() for name in names]
    for name in chosen:
        if name not in known:
            raise UnknownNameError("M3IT set", name, known)
    if not folder.is_dir():
        raise ConfigError("no such directory", file=folder, hint="give the one that contains M3IT")
    found = {name: _files(folder, name) for name in (chosen or known)}
    missing = [name for name, files in found.items() if not files]
    if missing:
        raise ConfigError(
            f"{len(missing)} of {len(found)} sets are missing ({', '.join(missing)})",
            file=folder,
            expected=f"{missing[0]}/train*{_ENDS[0]} or {_ENDS[-1]} below it",
            hint="name those that you have with --dataset",
        )
    return found


def _files(folder: Path, name: str) -> list[Path]:
    files = [path for path in sorted(folder.rglob(f"{name}/train*")) if path.is_file()]
    for end in _ENDS:
        if these := [path for path in files if path.name.lower().endswith(end)]:
            return these
    return []
