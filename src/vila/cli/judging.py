"""The judge that `vila eval` and `vila score` take their verdicts from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vila.core.events import Events

JudgeOption = Annotated[
    str,
    typer.Option(
        help="Who judges free answers (video QA): the URL of an OpenAI-compatible server, a file of replies, or `none` "
        "to write the requests to a file.",
        metavar="URL|FILE|none",
        show_default=False,
    ),
]
JudgeModelOption = Annotated[str, typer.Option(help="Model that the judge's server is asked for.")]
DEFAULT_JUDGE = "gpt-3.5-turbo"


def check_judge(judge: str) -> None:
    """Check the form of a URL, or that a file of replies can be read, before work begins. Raises VilaError."""
    if not judge or judge == "none":
        return
    if "://" in judge:
        from vila.eval.endpoint import Endpoint

        Endpoint(judge)
        return
    from vila.eval.judge import read_verdicts

    read_verdicts(Path(judge).expanduser())


def give_judge(benchmark: Any, judge: str, model: str, folder: Path, events: Events) -> None:
    """Give a benchmark that has free answers its judge; others are left as they are.

    folder: where requests are written to, with `none`.
    """
    if not judge or not hasattr(benchmark, "judge"):
        return
    from vila.core.files import cache_dir
    from vila.eval.endpoint import Endpoint
    from vila.eval.judge import ReplyFile, RequestFile
    from vila.eval.judge_run import Judge

    if judge == "none":
        benchmark.judge = RequestFile(folder / f"{benchmark.name}-requests.jsonl", model)
    elif "://" in judge:
        benchmark.judge = Judge(Endpoint(judge), cache_dir() / "judge", model, events=events)
    else:
        benchmark.judge = ReplyFile(Path(judge).expanduser())
