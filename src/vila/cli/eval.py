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
from vila.cli.options import Backend, LoadOptions, StderrLog, check_backend_flags, set_num_threads

if TYPE_CHECKING:
    from vila.core.progress import Events
    from vila.eval.benchmark import Benchmark
    from vila.eval.runner import BenchmarkRun, ChatModel


# --- judging
# The judge that `vila eval` and `vila score` take their verdicts from.


JudgeOption = Annotated[
    str,
    typer.Option(
        help="LLM judge of open-ended answers (video QA): URL of an OpenAI-compatible server, a file of replies, or "
        "`none` to write the requests to a file.",
        metavar="URL|FILE|none",
        show_default=False,
    ),
]
JudgeModelOption = Annotated[str, typer.Option(help="Model name at the judge server.")]
DEFAULT_JUDGE = "gpt-3.5-turbo"


def check_judge(judge: str) -> None:
    """Check the form of a URL, or that a file of replies can be read, before work begins. Raises VilaError."""
    if not judge or judge == "none":
        return
    if "://" in judge:
        from vila.eval.openai_client import OpenAIClient

        OpenAIClient(judge)
        return
    from vila.eval.judge import read_verdicts

    read_verdicts(Path(judge).expanduser())


def give_judge(benchmark: Benchmark, judge: str, model: str, folder: Path, events: Events) -> None:
    """Give a benchmark that has free answers its judge; others are left as they are.

    folder: where requests are written to, with `none`.
    """
    if not judge or not benchmark.needs_judge:
        return
    from vila.core.files import cache_dir
    from vila.eval.judge import OpenAIJudge, ReplyFile, RequestFile
    from vila.eval.openai_client import OpenAIClient

    if judge == "none":
        benchmark.judge = RequestFile(folder / f"{benchmark.name}-requests.jsonl", model)
    elif "://" in judge:
        benchmark.judge = OpenAIJudge(OpenAIClient(judge), cache_dir() / "judge", model, events=events)
    else:
        benchmark.judge = ReplyFile(Path(judge).expanduser())


TEN = ("vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mme", "mmbench", "mmbench_cn", "seed")
"""The benchmarks of the published table, in its order."""


_PUBLISHED = {
    "sqa": "scienceqa", "sqa_i": "scienceqa", "vqa_v2": "vqav2", "vqa_t": "textvqa", "mmb": "mmbench",
    "mmb_cn": "mmbench_cn", "seed_bench": "seed",
}  # fmt: skip
"""What the published table, folders and scripts call benchmarks besides: in small letters, dashes as underscores."""


def evaluate(
    model: Annotated[
        str, typer.Argument(help="Model directory, or Hub id OWNER/NAME; with --base-url any name for the run.")
    ] = "",
    benchmarks: Annotated[
        str, typer.Option(help="Comma-separated benchmark names; `all`: the ten of the published table.")
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
        int, typer.Option(help="Approximate number of questions per benchmark (whole images); 0 uses all.", min=0)
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
    backend: options.BackendFlag = options.Backend.AUTO,
    lm_head_bits: options.LMHeadBits = 0,
    activation_bits: options.ActivationBits = 0,
    threads: options.Threads = None,
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
    from vila.eval.report import write_report
    from vila.eval.runner import check_run_folder, result_dir, run_benchmark, run_metadata
    from vila.train.fsdp import open_world

    # All that can be wrong is found before weights are read: options, output, data, predictions of another run.
    rules = rules_of(protocol)
    names = names_of(benchmarks)
    counts = _counts(num_fewshot)
    if template:
        find_template(template)
    if not model and not base_url:
        raise ConfigError("no model; name a directory or a hub id, or a server with --base-url")
    root = out or (Path(model).expanduser().parent / "eval" if Path(model).is_dir() else Path("runs/eval"))
    check_writable(root, field="--output")
    check_judge(judge)
    world = open_world("replicate")
    set_num_threads(threads)
    asked = _Asked(
        model,
        base_url,
        served_model,
        dtype.value,
        _checked_device(device or str(world.device)),
        template,
        backend,
        lm_head_bits,
        activation_bits,
    )
    asked.check()
    runs: list[BenchmarkRun] = []
    with Screen() as screen:
        events = screen if world.is_main else SILENT
        opened, left_out = _opened(names, data, limit, counts, events)
        facts = asked.facts()
        for benchmark in opened:
            where = result_dir(root, benchmark.name, limit)
            check_run_folder(where, {**run_metadata(benchmark, template), "model": facts["hash"]})
            give_judge(benchmark, judge, judge_model, where, events)
        engine, facts = asked.load(facts)
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
                _note_run(root, {**seen, **facts, "benchmarks": folders, "left_out": left_out})
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


def rules_of(protocol: str) -> Any:
    """The rules that `--protocol` names. Raises ConfigError for others."""
    from vila.core.errors import ConfigError

    if protocol not in ("upstream", "lmms-eval"):
        raise ConfigError(f"--protocol {protocol}: it is upstream or lmms-eval")
    return protocol


def names_of(text: str) -> list[str]:
    """Benchmarks by name, or by what they are published as, in any case. Raises UnknownNameError for others."""
    from vila.core.errors import ConfigError
    from vila.eval.benchmark import BENCHMARKS

    names = [name.strip() for name in text.split(",") if name.strip()]
    names = [one for name in names for one in (TEN if name == "all" else (_own_name(name),))]
    for name in names:
        BENCHMARKS[name]
    if not names:
        raise ConfigError(field="--benchmarks", value=text, expected="names of benchmarks with commas between them")
    return list(dict.fromkeys(names))


def _own_name(name: str) -> str:
    from vila.eval.benchmark import BENCHMARKS

    plain = name.lower().replace("-", "_")
    own = _PUBLISHED.get(plain, plain)
    return own if own in BENCHMARKS else name


def _counts(text: str) -> list[int]:
    from vila.core.errors import ConfigError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--num-fewshot {text!r}: expected numbers with commas between, such as 0,2,4")
    return list(dict.fromkeys(map(int, parts)))


def _checked_device(name: str) -> str:
    """Return the name of a device. Raises ConfigError for one that PyTorch does not know or that is not there."""
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
class _Asked:
    """The model that answers, here or behind a server, as the options name it; nothing is loaded yet."""

    model: str
    api: str
    served: str
    dtype: str
    device: str
    template: str
    backend: Backend
    head_bits: int
    activation_bits: int

    def check(self) -> None:
        """Check names, template and backend; a model from the hub is fetched. Raises VilaError."""
        from vila.core.errors import ConfigError

        if self.api:
            if not self.served:
                raise ConfigError("--base-url needs --served-model-name: the name that the server knows the model by")
            return
        loading = LoadOptions(backend=self.backend, lm_head_bits=self.head_bits, activation_bits=self.activation_bits)
        check_backend_flags(loading, self.device.partition(":")[0])
        from vila.model.loading import open_checkpoint

        open_checkpoint(self.model, template=self.template or None).processor.find_template()

    def facts(self) -> dict[str, Any]:
        """Return what identifies the model; `hash` is of its files, or the server's address and name for it."""
        if self.api:
            return {"hash": f"{self.api} {self.served}", "api": self.api, "served": self.served}
        from vila.eval.runner import model_hash
        from vila.model.hub import local_folder

        return {"hash": model_hash(local_folder(self.model))}

    def load(self, facts: dict[str, Any]) -> tuple[ChatModel, dict[str, Any]]:
        """Read the weights, or try the server. Returns the facts with those that are known only then."""
        if self.api:
            from vila.eval.openai_client import RemoteEngine

            remote = RemoteEngine(self.api, self.served)
            remote.check()
            return remote, facts
        from vila.engine.engine import Engine
        from vila.model.hub import local_folder

        engine = Engine.load(
            local_folder(self.model), dtype=self.dtype, device=self.device, backend=self.backend,  # type: ignore[arg-type]
            head_bits=self.head_bits, activation_bits=self.activation_bits, prefix_cache_bytes=0, events=StderrLog(),  # type: ignore[arg-type]
        )  # fmt: skip
        facts = {**facts, "dtype": str(engine.model.dtype).removeprefix("torch."), "device": self.device}
        if engine.backend != "torch":
            # Its arithmetic is different, and so are some answers: they do not continue those of torch.
            facts |= {"hash": f"{facts['hash']} {engine.backend}", "backend": engine.backend}
        return engine, facts


def _note_run(root: Path, facts: dict[str, Any]) -> None:
    """Write `eval.json`, with the benchmarks that earlier commands ran on the same model."""
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
    """The benchmarks whose data are there, and of the others what is missing.

    Raises DataError when there is none, or when the only one asked for is missing.
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
                    raise DataError(f"{name}: no data; give --data playground/data/eval")
                folder = obtain_easy_vqa(cache_dir(), events)
            benchmark = BENCHMARKS[name](folder, questions)
            items = benchmark.items()
        except DataError as error:
            if len(names) == 1:
                raise
            events.log(f"{name}: left out: {error}")
            left_out[name] = without_home(str(error))
            continue
        gone = missing_media(items)
        if gone:
            events.log(f"{name}: {len(gone):,} files are missing, the first {gone[0]}; their questions will fail")
        found += few_shot_variants(benchmark, name, folder, shots)
    if not found:
        raise DataError("none of the benchmarks has its data there; `docs/evaluation.md` says where they come from")
    return found, left_out


def _has_easy_vqa(folder: Path) -> bool:
    return (folder / "test" / "questions.json").is_file()


# --- score_tables
# The table of scores that `vila eval` prints.


def score_table(run: BenchmarkRun) -> Table:
    """Accuracy in all and by kind, beside the majority and the best blind guess."""
    table = Table(title=f"{run.benchmark}: accuracy", title_justify="left")
    for name in ("questions", "count", "accuracy", "majority answer", "best blind guess"):
        table.add_column(name, justify="left" if name == "questions" else "right")
    for kind, row in (*run.scores["by_type"].items(), ("all", run.scores)):
        style = "bold" if kind == "all" else ""
        cells = (f"{row[key]:.2%}" for key in ("accuracy", "majority", "blind"))
        table.add_row(kind, str(row["count"]), *cells, style=style)
    return table


def result_table(runs: Sequence[BenchmarkRun]) -> RenderableType:
    """One benchmark by kind of question where it can be, several a line each."""
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
        # A figure that is neither the mean mark nor says how it follows from the marks has no interval of its own.
        own = sure is not None and abs(sure.mean - one.result.score) < 0.01
        bounds = f"{sure.low:,.1f} to {sure.high:,.1f}" if sure and own else ""
        score = f"{one.result.score:,.2f} {one.result.unit}"
        table.add_row(one.benchmark, f"{len(one.predictions):,}", score, bounds, failed)
    return Group(table, *reasons)
