"""`vila data prepare ...`: public releases to shards, by the steps of `vila.prepare`; run again to go on."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vila.cli.data_prepare_flags import Decode, KeepParts, Out, PerShard, Shard, Sources, parse_shard, print_counts
from vila.cli.data_prepare_web import coyo, mmc4

app = typer.Typer(help="Turn public releases into shards; run again to go on after a stop.", no_args_is_help=True)
app.command()(mmc4)
app.command()(coyo)


class _Kind(StrEnum):
    MMC4 = "mmc4"
    COYO = "coyo"
    VFLAN = "vflan"


@app.command("llava-align")
def llava_align(
    source: Annotated[Path, typer.Argument(help="The published chat.json.")],
    images: Annotated[Path, typer.Option(help="Folder of pictures, or images.zip, which is unpacked to OUT/images.")],
    out: Out,
    decode: Decode = False,
) -> None:
    """Take the whole records of LLaVA-CC3M-Pretrain-595K."""
    from vila.cli.progress import Screen
    from vila.prepare.llava_align import prepare_llava_align

    with Screen() as screen:
        index = prepare_llava_align(source, images, out, decode=decode, events=screen)
    print_counts(index, out)


@app.command()
def sharegpt4v(
    source: Annotated[Path, typer.Argument(help="The published JSON list.")],
    out: Out,
    images: Annotated[
        Path | None, typer.Option(help="Folder that the records' paths start from; none: no picture is checked.")
    ] = None,
    keep_sam: Annotated[bool, typer.Option("--keep-sam", help="Keep records with SA-1B pictures.")] = False,
    decode: Decode = False,
) -> None:
    """Leave out SA-1B pictures and repetitive answers of ShareGPT4V."""
    from vila.cli.progress import Screen
    from vila.core.errors import ConfigError
    from vila.prepare.sharegpt4v import prepare_sharegpt4v

    if decode and images is None:
        raise ConfigError("--decode needs --images, the folder of the pictures")
    with Screen() as screen:
        index = prepare_sharegpt4v(source, out, images=images, keep_sam=keep_sam, decode=decode, events=screen)
    print_counts(index, out)


@app.command()
def m3it(
    folder: Annotated[Path, typer.Argument(help="The release: each set is a folder of its name, at any depth.")],
    out: Out,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Take this set, and others so named; default: the 14 of the recipe."),
    ] = None,
    shard: Shard = "0/1",
    per_shard: PerShard = 5000,
    keep_parts: KeepParts = True,
) -> None:
    """Turn the training files of M3IT's sets into questions with their pictures."""
    from vila.cli.data_m3it import training_files
    from vila.cli.progress import Screen
    from vila.prepare.m3it import prepare_m3it

    own, sources = parse_shard(shard), training_files(folder, sets or ())
    with Screen() as screen:
        index = prepare_m3it(sources, out, per_shard=per_shard, shard=own, keep_parts=keep_parts, events=screen)
    print_counts(index, out)


@app.command()
def flan(
    sources: Sources,
    out: Out,
    rows: Annotated[int, typer.Option(help="Rows to take, of all files together.", min=1)] = 1_000_000,
    shard: Shard = "0/1",
    per_shard: PerShard = 50_000,
    keep_parts: KeepParts = True,
) -> None:
    """Take evenly spaced rows of FLAN's parquet files."""
    from vila.cli.progress import Screen
    from vila.prepare.flan import prepare_flan

    own = parse_shard(shard)
    with Screen() as screen:
        index = prepare_flan(
            sources, out, rows=rows, per_shard=per_shard, shard=own, keep_parts=keep_parts, events=screen
        )
    print_counts(index, out)


@app.command()
def pkl(
    folder: Annotated[Path, typer.Argument(help="Folder of the original's .pkl and .count files, at any depth.")],
    kind: Annotated[_Kind, typer.Option(help="What they hold: documents, pairs, or questions.")],
    out: Out,
    shard: Shard = "0/1",
    per_shard: PerShard = 1000,
    keep_parts: KeepParts = True,
) -> None:
    """Convert the original's pickled shards; nothing in a pickle runs."""
    from vila.cli.progress import Screen
    from vila.prepare.pkl import convert_pickles

    own = parse_shard(shard)
    with Screen() as screen:
        index = convert_pickles(
            folder, out, kind.value, per_shard=per_shard, shard=own, keep_parts=keep_parts, events=screen
        )
    print_counts(index, out)
