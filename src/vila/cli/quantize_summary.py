"""What `vila quantize` says at its end: the errors of each block, sizes, calibration, memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def show_summary(console: Console, target: Path, summary: dict[str, Any]) -> None:
    """Print what `quantize_checkpoint` gave for the directory `target`."""
    from rich.table import Table

    from vila.cli.info import human_bytes

    table = Table(title="errors per block", title_justify="left")
    for column in ("block", "weights off", "error left by scales"):
        table.add_column(column, justify="right")
    for index, block in enumerate(summary["blocks"]):
        left = block.get("error_left")
        table.add_row(str(index), f"{block['weights_off']:.2%}", "" if left is None else f"{left:.0%} of rounding's")
    console.print(table)
    shrunk = summary["bytes_before"] / max(1, summary["bytes_after"])
    console.print(
        f"{target}: {summary['linears']} Linears of {len(summary['blocks'])} blocks in INT4, groups of "
        f"{summary['group_size']}, {summary['method']}; {human_bytes(summary['bytes_before'])} in memory before, "
        f"{human_bytes(summary['bytes_after'])} in files now ({shrunk:.2f} times smaller)",
        markup=False,
    )
    if (calibration := summary["calibration"]) is not None:
        console.print(
            f"calibrated with {calibration['name']}, {calibration['tokens']:,} tokens, sha256 {calibration['sha256']}",
            markup=False,
        )
    console.print(f"peak memory of this run: {_peak()}")


def _peak() -> str:
    import resource
    import sys

    from vila.cli.info import human_bytes

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return human_bytes(peak if sys.platform == "darwin" else peak * 1024)
