"""What decoding was measured to be, as markdown: all results, and the table of tokens a second by device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vila.bench.decode import Result

_ROWS = (("VILA-7B", "fp16"), ("VILA-7B", "int4"), ("VILA-13B", "fp16"), ("VILA-13B", "int4"))
# Tokens a second at batch 1, of the original's INT4 engine (README of llm-awq, early 2024).
_PUBLISHED: Mapping[str, tuple[str, ...]] = {
    "A100": ("81.6", "155.3", "48.5", "102.1"),
    "RTX 4090": ("58.5", "168.1", "out of memory", "99.0"),
    "Orin": ("11.5", "35.6", "6.1", "17.5"),
}
_HEADS = (
    "model",
    "weights",
    "backend",
    "context",
    "batch",
    "tokens/s",
    "least-greatest",
    "step, ms",
    "prompt tokens/s",
    "first token, ms",
    "of memory limit",
    "peak, GB",
    "same top-1",
    "where clear",
)


def result_table(results: Sequence[Result]) -> str:
    """Every result in a line, under the bandwidth that the limit is of."""
    lines = [_line(_HEADS), _line(["---"] * len(_HEADS)), *(_line(_cells(result)) for result in results)]
    seen = " to ".join(
        f"{speed / 1e9:.1f}" for speed in sorted({min(r.bandwidth for r in results), max(r.bandwidth for r in results)})
    )
    return f"This machine reads {seen} GB/s.\n\n" + "\n".join(lines)


def device_table(results: Sequence[Result], machine: str) -> str:
    """Tokens a second at batch 1 by model and device: published ones of other devices, and this machine's own.

    A 16-bit model on a CPU counts as fp16 in whichever 16-bit type it was. What was not measured is left empty; of
    several results of one model the one with the least context counts.
    """
    columns = {f"{name} (published)": values for name, values in _PUBLISHED.items()}
    columns[f"{machine} (measured)"] = tuple(_measured(results, title, kind) for title, kind in _ROWS)
    lines = [_line(["tokens/s", "weights", *columns]), _line(["---"] * (2 + len(columns)))]
    for row, (title, kind) in enumerate(_ROWS):
        lines.append(_line([title, kind, *(values[row] for values in columns.values())]))
    return "\n".join(lines)


def _measured(results: Sequence[Result], title: str, kind: str) -> str:
    kinds = ("int4",) if kind == "int4" else ("float16", "bfloat16")
    found = [r for r in results if r.title == title and r.precision in kinds and r.load.batch == 1]
    return f"{min(found, key=lambda r: r.load.context).decode.median:.1f}" if found else ""


def _cells(result: Result) -> list[str]:
    same = result.agreement
    return [
        result.title,
        result.precision,
        result.backend,
        str(result.load.context),
        str(result.load.batch),
        f"{result.decode.median:.1f}",
        f"{result.decode.least:.1f}-{result.decode.greatest:.1f}",
        f"{result.step_ms:.2f}",
        f"{result.prefill.median:.0f}",
        f"{1e3 * result.first_token_s.median:.0f}",
        f"{result.of_limit:.0%}",
        "" if result.peak_bytes is None else f"{result.peak_bytes / 1e9:.2f}",
        "" if same is None else f"{same.same:.1%} of {same.tokens}",
        "" if same is None else f"{same.same_clear:.1%} of {same.clear:.0%}",
    ]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
