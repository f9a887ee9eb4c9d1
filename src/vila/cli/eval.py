"""`vila eval`: evaluate a model, or a server, on benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table

from vila.cli import options
from vila.cli.options import BackendOptions, StderrLog, check_backend_flags, set_num_threads, with_option_groups

if TYPE_CHECKING:
    from vila.eval.benchmark import Benchmark
    from vila.eval.runner import BenchmarkRun, ChatModel


JudgeOption = Annotated[
    str,
    typer.Option(
        help="LLM judge of open-ended answers (video QA): URL of an OpenAI-compatible server, a file of replies, or "
        "`none` to write the requests to a file.",
        metavar="URL|FILE|none",
    ),
]
JudgeModelOption = Annotated[str, typer.Option(help="Model name at the judge server.")]
DEFAULT_JUDGE = "gpt-3.5-turbo"


@with_option_groups
def evaluate(
    model: Annotated[
        str, typer.Argument(help="Model directory, or Hub id OWNER/NAME; with --base-url any name for the run.")
    ] = "",
    benchmarks: Annotated[
        str, typer.Option(help="Comma-separated benchmark names; `all`: the ten that VILA publishes.")
    ] = "easy_vqa",
    data: Annotated[
        Path | None,
        typer.Option(
            help="Benchmark data: playground/data/eval, or the directory of one benchmark. easy_vqa is downloaded."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Output directory for predictions, scores and report. Default: eval/ next to MODEL.",
            callback=options.output_directory,
        ),
    ] = None,
    limit: Annotated[
        int,
        typer.Option(
            help="Approximate number of questions per benchmark; 0: all. Selected images keep all questions.", min=0
        ),
    ] = 0,
    protocol: Annotated[
        str, typer.Option(help="Scoring protocol: upstream (the original scripts) or lmms-eval.")
    ] = "upstream",
    template: Annotated[str, typer.Option(help="Conversation template. Default: the template of the checkpoint.")] = "",
    num_fewshot: Annotated[
        str, typer.Option(help="Comma-separated numbers of few-shot examples, such as 0,2,4.", metavar="K,...")
    ] = "0",
    dtype: options.ComputeDtype = options.Dtype.AUTO,
    device: Annotated[str, typer.Option(help="Device: cpu, cuda or cuda:N. Default: CUDA if available.")] = "",
    backend: BackendOptions = options.BACKEND,
    base_url: Annotated[
        str, typer.Option(help="URL of an OpenAI-compatible server to evaluate instead of a local model.")
    ] = "",
    served_model: Annotated[str, typer.Option("--served-model-name", help="Model name at --base-url.")] = "",
    judge: JudgeOption = "",
    judge_model: JudgeModelOption = DEFAULT_JUDGE,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per benchmark.")] = False,
) -> None:
    """Evaluate [bold]MODEL[/bold] on benchmarks. Resumes after an interruption."""
    import json

    from rich.console import Console

    from vila.chat.templates import find_template
    from vila.cli.progress import Screen
    from vila.core.errors import ConfigError
    from vila.core.files import DirectoryLock, check_writable, portable_path, remove_partials
    from vila.core.progress import SILENT
    from vila.eval.benchmark import parse_benchmark_names
    from vila.eval.judge import attach_judge, check_judge
    from vila.eval.report import write_report
    from vila.eval.runner import check_run_folder, result_dir, run_benchmark, run_metadata
    from vila.train.fsdp import open_world

    # Options, output, data and earlier predictions are checked before weights are read.
    rules = parse_protocol(protocol)
    names = parse_benchmark_names(benchmarks)
    counts = _counts(num_fewshot)
    if template:
        find_template(template)
    if not model and not base_url:
        raise ConfigError("missing", field="MODEL", hint="give a directory or Hub id, or a server with --base-url")
    root = out or (Path(model).expanduser().parent / "eval" if Path(model).is_dir() else Path("runs/eval"))
    check_writable(root, field="--output")
    check_judge(judge)
    world = open_world("replicate")
    set_num_threads(backend.threads)
    device = _checked_device(device or str(world.device))
    source = _ModelSource(model, base_url, served_model, dtype.value, device, template, backend)
    source.check()
    runs: list[BenchmarkRun] = []
    with Screen() as screen:
        events = screen if world.is_main else SILENT
        opened, left_out = _opened(names, data, limit, counts, events)
        facts = source.identity()
        for benchmark in opened:
            where = result_dir(root, benchmark.name, limit)
            check_run_folder(where, {**run_metadata(benchmark, template), "model": facts["hash"]})
            attach_judge(benchmark, judge, judge_model, where, events)
        engine, facts = source.load(facts)
        for benchmark in opened:
            where = result_dir(root, benchmark.name, limit)
            run = run_benchmark(
                engine, benchmark, where, model_id=facts["hash"], template=template, protocol=rules,
                process=world.process, barrier=world.barrier, events=events,
            )  # fmt: skip
            if run:
                runs.append(run)
        if world.is_main:
            remove_partials(root)
            seen = {
                "model": portable_path(model, root) or served_model,
                "data": portable_path(data or "", root),
                "rules": rules,
                "template": template,
            }
            folders = {run.benchmark: result_dir(root, run.benchmark, limit).name for run in runs}
            # Other commands may add benchmarks to the same directory at this moment.
            with DirectoryLock(root).acquire(wait=True):
                _write_run_metadata(root, {**seen, **facts, "benchmarks": folders, "left_out": left_out})
                for path in write_report(root, {benchmark.name: benchmark for benchmark in opened}):
                    events.log(str(path))
    world.close()
    for run in runs:
        if as_json:
            row: dict[str, Any] = {"benchmark": run.benchmark, "problem": run.problem}
            typer.echo(json.dumps(row if run.result is None else {"benchmark": run.benchmark, **run.scores}))
    if runs and not as_json:
        Console(highlight=False).print(result_table(runs))
    if any(run.failed for run in runs):
        raise typer.Exit(1)


def parse_protocol(protocol: str) -> Any:
    """Return the scoring protocol with a name. Raises ConfigError for other names."""
    from vila.core.errors import ConfigError

    if protocol not in ("upstream", "lmms-eval"):
        raise ConfigError(field="--protocol", value=protocol, expected="upstream or lmms-eval")
    return protocol


def _counts(text: str) -> list[int]:
    from vila.core.errors import ConfigError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(field="--num-fewshot", value=text, expected="comma-separated numbers, such as 0,2,4")
    return list(dict.fromkeys(map(int, parts)))


def _checked_device(name: str) -> str:
    """Return the name of a device. Raises ConfigError for unknown and missing devices."""
    import torch

    from vila.core.errors import ConfigError

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(field="--device", value=name, expected="cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(field="--device", value=name, expected="cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"PyTorch finds {torch.cuda.device_count()} CUDA devices",
            field="--device",
            value=name,
            hint="see vila doctor",
        )
    return name


@dataclass(frozen=True, slots=True)
class _ModelSource:
    """Flags of the evaluated model: a local model, or a server (`api` and the model name `served`)."""

    model: str
    api: str
    served: str
    dtype: str
    device: str
    template: str
    backend: BackendOptions

    def check(self) -> None:
        """Check names, template and backend; downloads a model from the Hub. Raises VilaError."""
        from vila.core.errors import ConfigError

        if self.api:
            if not self.served:
                raise ConfigError("requires --served-model-name", field="--base-url")
            return
        check_backend_flags(self.backend, self.device.partition(":")[0])
        from vila.model.loading import open_checkpoint, own_template

        own_template(open_checkpoint(self.model, template=self.template or None))

    def identity(self) -> dict[str, Any]:
        """Return the identity of the model; `hash`: of its files, or URL and model name of the server."""
        if self.api:
            return {"hash": f"{self.api} {self.served}", "api": self.api, "served": self.served}
        from vila.eval.runner import model_hash
        from vila.model.hub import local_folder

        return {"hash": model_hash(local_folder(self.model))}

    def load(self, facts: dict[str, Any]) -> tuple[ChatModel, dict[str, Any]]:
        """Read the weights, or check the server. Returns the model and its completed identity."""
        if self.api:
            from vila.eval.openai_client import RemoteEngine

            remote = RemoteEngine(self.api, self.served)
            remote.check()
            return remote, facts
        from vila.engine.engine import Engine
        from vila.model.hub import local_folder

        engine = Engine.load(
            local_folder(self.model), dtype=self.dtype, device=self.device,
            **self.backend.engine_arguments, prefix_caching=False, events=StderrLog(),
        )  # fmt: skip
        facts = {**facts, "dtype": str(engine.model.dtype).removeprefix("torch."), "device": self.device}
        if engine.backend != "torch":
            # Other backends round differently, so their predictions do not continue those of torch.
            facts |= {"hash": f"{facts['hash']} {engine.backend}", "backend": engine.backend}
        return engine, facts


def _write_run_metadata(root: Path, facts: dict[str, Any]) -> None:
    """Write `eval.json`; keeps the benchmarks of earlier commands on the same model."""
    from vila.core.files import write_json
    from vila.core.reading import Fields

    path = root / "eval.json"
    before = Fields.of_file(path) if path.is_file() else Fields({}, path)
    if before.get("hash") == facts["hash"]:
        facts["benchmarks"] = {**before.section("benchmarks"), **facts["benchmarks"]}
        earlier = {k: v for k, v in before.section("left_out").items() if k not in facts["benchmarks"]}
        facts["left_out"] = {**earlier, **facts["left_out"]}
    write_json(path, facts)


def _opened(
    names: list[str], data: Path | None, questions: int, shots: list[int], events: Any
) -> tuple[list[Benchmark], dict[str, str]]:
    """Return the benchmarks with data, and the error of each other one.

    Raises DataError if no benchmark has data.
    """
    from vila.core.errors import DataError
    from vila.core.files import cache_dir, without_home
    from vila.eval.benchmark import BENCHMARKS, missing_media
    from vila.eval.few_shot import few_shot_variants
    from vila.starter.easy_vqa import obtain_easy_vqa

    found: list[Benchmark] = []
    left_out: dict[str, str] = {}
    for name in names:
        try:
            folder = data
            if folder is None or (name == "easy_vqa" and len(names) > 1 and not _has_easy_vqa(folder)):
                if name != "easy_vqa":
                    raise DataError("requires benchmark data", field=name, hint="give --data playground/data/eval")
                folder = obtain_easy_vqa(cache_dir(), events)
            benchmark = BENCHMARKS[name](folder, questions)
            items = benchmark.items()
        except DataError as error:
            if len(names) == 1:
                raise
            events.log(f"{name}: skipped: {error}")
            left_out[name] = without_home(str(error))
            continue
        gone = missing_media(items)
        if gone:
            events.log(f"{name}: {len(gone):,} files are missing, first {gone[0]}; their questions will fail")
        found += few_shot_variants(benchmark, name, folder, shots)
    if not found:
        raise DataError("no benchmark has data", file=data, hint="docs/evaluation.md describes the downloads")
    return found, left_out


def _has_easy_vqa(folder: Path) -> bool:
    return (folder / "test" / "questions.json").is_file()


# --- tables


def score_table(run: BenchmarkRun) -> Table:
    """Return a table of accuracy by question type, with majority and blind baselines."""
    table = Table(title=f"{run.benchmark}: accuracy", title_justify="left")
    for name in ("questions", "count", "accuracy", "majority answer", "best blind guess"):
        table.add_column(name, justify="left" if name == "questions" else "right")
    for kind, row in (*run.scores["by_type"].items(), ("all", run.scores)):
        style = "bold" if kind == "all" else ""
        cells = (f"{row[key]:.2%}" for key in ("accuracy", "majority", "blind"))
        table.add_row(kind, str(row["count"]), *cells, style=style)
    return table


def result_table(runs: Sequence[BenchmarkRun]) -> RenderableType:
    """Return a table with one line per benchmark, or per question type for one benchmark with blind baselines."""
    from vila.eval.significance import score_interval

    if len(runs) == 1 and runs[0].result and "blind" in runs[0].result.metrics:
        return score_table(runs[0])
    table = Table(title="Scores", title_justify="left")
    for name in ("benchmark", "questions", "score", "95 %", "failed"):
        table.add_column(name, justify="left" if name == "benchmark" else "right")
    reasons = []
    for one in runs:
        failed = f"{len(one.failed):,}" if one.failed else ""
        if one.result is None:
            table.add_row(one.benchmark, f"{len(one.predictions):,}", "-", "", failed)
            reasons.append(f"{one.benchmark}: {one.problem}")
            continue
        sure = score_interval(one.result)
        # The interval applies only if the score is the mean of the question scores.
        own = sure is not None and abs(sure.mean - one.result.score) < 0.01
        bounds = f"{sure.low:,.1f} to {sure.high:,.1f}" if sure and own else ""
        score = f"{one.result.score:,.2f} {one.result.unit}"
        table.add_row(one.benchmark, f"{len(one.predictions):,}", score, bounds, failed)
    return Group(table, *reasons)
