"""Training checkpoints: sharded tensors, everything else in JSON; written atomically.

Tensors are written with `torch.distributed.checkpoint`, each rank its own shards, and can be loaded by another number
of ranks. A background thread writes and hashes the files, in a directory that is renamed when all are on the disk.

    step-00000120/  .metadata __0_0.distcp ...  tensors
                    state.json                  format, progress, packing streams, recipe, versions
                    inputs.json                 fingerprints of the data and of the initial model
                    manifest.json               size and SHA-256 of the other files

Version one of vila wrote neither `inputs.json` nor `manifest.json`, and no format into `state.json`.
"""

from __future__ import annotations

import re
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from vila.core.errors import CheckpointError, VilaError
from vila.core.files import atomic_path, remove_partials, write_json
from vila.core.progress import SILENT, Events
from vila.core.reading import Fields
from vila.data.packing import PackingStreamState
from vila.train.checkpoint_files import MANIFEST, FileDigest, TensorReader, check_files, digest_files, write_manifest
from vila.train.fsdp import World, raise_on_lost_rank

# torch warns about every run with a single process.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

FORMAT = 2
"""Format in `state.json` of a checkpoint with fingerprints and a manifest; checkpoints of version one have format 1."""
_INPUTS = "inputs.json"


@dataclass(frozen=True, slots=True)
class Progress:
    """Counts of a run over all ranks. `tokens` and `samples` are those that were trained on, without padding.

    bad_steps:          skipped steps, whose loss or gradient was not finite.
    dropped, truncated: samples longer than `data.max_length`.
    unreadable:         visits of samples that could not be read.
    """

    step: int = 0
    tokens: int = 0
    samples: int = 0
    supervised: int = 0
    seconds: float = 0.0
    bad_steps: int = 0
    dropped: int = 0
    truncated: int = 0
    unreadable: int = 0

    @property
    def visits(self) -> int:
        """Sample visits, trained on or not."""
        return self.samples + self.dropped + self.unreadable


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """State of a run besides its tensors.

    streams: states of all packing streams, in order.
    world:   number of ranks that wrote it.
    inputs:  fingerprints of data and initial model, see `vila.train.resume`; empty in format 1.
    format:  1 if version one of vila wrote it, else FORMAT.
    """

    progress: Progress
    streams: list[PackingStreamState]
    recipe: dict[str, Any]
    versions: dict[str, str]
    world: int = 1
    folder: Path = Path()
    inputs: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def load_tensors(self, into: Mapping[str, Tensor], world: World) -> None:
        """Load the tensors of `into`, sharded or full, in place.

        Raises CheckpointError naming the first tensor that is missing or has another shape.
        """
        reader = TensorReader(self.folder)
        try:
            self._check_shapes(reader, into)
            group = {"no_dist": True} if world.is_single else {"process_group": world.control}
            with raise_on_lost_rank():
                dcp.load(dict(into), storage_reader=reader, **group)
        except VilaError:
            raise
        except (OSError, CheckpointException, RuntimeError, ValueError, EOFError) as error:
            raise _unreadable(self.folder, error) from error

    def _check_shapes(self, reader: TensorReader, into: Mapping[str, Tensor]) -> None:
        known = reader.read_metadata().state_dict_metadata
        for name, tensor in into.items():
            size = getattr(known.get(name), "size", None)
            if size is None or tuple(size) != tuple(tensor.shape):
                raise CheckpointError(
                    "the checkpoint is of another model or stage",
                    file=self.folder,
                    field=name,
                    value="missing" if size is None else tuple(size),
                    expected=f"shape {tuple(tensor.shape)}",
                    hint="choose another output.dir, or delete that directory to start over",
                )

    @property
    def tensor_names(self) -> set[str]:
        """Names of the tensors in the checkpoint. Raises CheckpointError."""
        try:
            return set(TensorReader(self.folder).read_metadata().state_dict_metadata)
        except OSError as error:
            raise _unreadable(self.folder, error) from error


class CheckpointWriter:
    """Writes the checkpoints of a run to `step-N` directories and deletes old ones."""

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        keep_last: int = 2,
        background: bool = False,
        inputs: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """Create a writer.

        background: write in a thread; call `wait` before the process ends.
        inputs:     returns the content of `inputs.json`; called by the writing thread of rank 0.
        """
        self.folder, self.world, self.keep_last, self.background = folder, world, keep_last, background
        self._inputs = inputs
        self._thread: threading.Thread | None = None
        self._error: VilaError | None = None
        self._mesh: DeviceMesh | None = None

    def save(self, tensors: Mapping[str, Tensor], state: Checkpoint, *, best: int | None = None) -> None:
        """Write `folder/step-N` atomically, then delete old checkpoints. Every rank calls it.

        A kill leaves the previous checkpoint intact.
        tensors: shards of this rank, and full tensors, which are written once.
        best:    step to keep in addition to the newest ones.
        Raises CheckpointError of this save or of the previous one.
        """
        self.wait()
        target = self.folder / _name(state.progress.step)
        with ExitStack() as stack:
            part = self._open(target, stack)
            # Training may change the tensors once they are copied.
            staged = {name: self._copy_to_cpu(tensor) for name, tensor in tensors.items()}
            write = partial(self._write, part, staged, state, stack.pop_all(), best)
        if not self.background:
            self._run(target, write)
            self.wait()
        else:
            self._thread = threading.Thread(target=self._run, args=(target, write), name="checkpoint")
            self._thread.start()

    def wait(self) -> None:
        """Wait until the checkpoint is on the disk. Raises CheckpointError if it could not be written."""
        if self._thread:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise CheckpointError if a checkpoint is known to have failed."""
        if self._error:
            error, self._error = self._error, None
            error.is_repeated = not self.world.is_main
            raise error

    def _open(self, target: Path, stack: ExitStack) -> Path:
        """Create the directory that all ranks write into; it is renamed to `target` when `stack` closes."""

        def create() -> Path:
            try:
                part = stack.enter_context(atomic_path(target))
                part.mkdir()
            except (OSError, VilaError) as error:
                raise _unwritten(target, _reason(error)) from error
            return part

        return self.world.run_on_main(create)

    def _write(
        self, part: Path, tensors: Mapping[str, Tensor], state: Checkpoint, rename: ExitStack, best: int | None
    ) -> None:
        """Write this rank's files. A failure on one rank raises on all of them."""
        failed = ""
        try:
            with rename:
                group = {"no_dist": True} if self.world.is_single else {"process_group": self.world.saving}
                dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(part), **group)
                digests = self._digests(part)
                if self.world.is_main:
                    write_json(part / "state.json", _as_json(state))
                    write_json(part / _INPUTS, self._inputs())
                    rest = [file.name for file in part.iterdir() if file.name not in digests]
                    write_manifest(part, digests | digest_files(part, rest))
            if self.world.is_main:
                self._prune(state.progress.step, best)
        except (OSError, VilaError) as error:
            failed = _reason(error)
        if failed := self.world.all_gather_object(failed, self.world.saving)[0]:
            raise _unwritten(self.folder / part.name, failed)

    def _digests(self, part: Path) -> dict[str, FileDigest]:
        """Return the digests of all tensor files; each rank hashes those that it wrote."""
        own: dict[str, FileDigest] = {}
        failed = ""
        try:
            names = [file.name for file in part.glob(f"__{self.world.process.rank}_*.distcp")]
            own = digest_files(part, names)
        except OSError as error:
            failed = _reason(error)
        ranks = self.world.all_gather_object((own, failed), self.world.saving)
        if failed := next((failed for _, failed in ranks if failed), ""):
            raise _unwritten(self.folder / part.name, failed)
        return {name: digest for own, _ in ranks for name, digest in own.items()}

    def _run(self, target: Path, write: Callable[[], None]) -> None:
        try:
            with raise_on_lost_rank():
                write()
        except VilaError as error:
            self._error = error
        except (Exception, CheckpointException) as error:  # noqa: BLE001 - raised in the training thread by `check`
            self._error = _unwritten(target, _reason(error))

    def _copy_to_cpu(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            if self._mesh is None:
                mesh = tensor.device_mesh
                self._mesh = mesh if mesh.device_type == "cpu" else init_device_mesh("cpu", tuple(mesh.shape))
            local = tensor.to_local().detach().to("cpu", copy=True)
            layout = {"run_check": False, "shape": tensor.shape, "stride": tensor.stride()}
            return DTensor.from_local(local, self._mesh, tensor.placements, **layout)  # type: ignore[arg-type]
        return tensor.detach().to("cpu", copy=True)

    def _prune(self, step: int, best: int | None) -> None:
        found = [folder for folder in checkpoint_folders(self.folder) if step_of(folder) <= step]
        kept = {*found[-self.keep_last :], self.folder / _name(best or 0)}
        for old in found:
            if old not in kept:
                shutil.rmtree(old)


def _as_json(state: Checkpoint) -> dict[str, Any]:
    return {
        "format": state.format,
        "progress": asdict(state.progress),
        "lanes": [[stream.next_position, list(stream.waiting)] for stream in state.streams],
        "recipe": state.recipe,
        "versions": state.versions,
        "world": state.world,
    }


def load_checkpoint(folder: Path, world: World, events: Events = SILENT) -> Checkpoint | None:
    """Load the newest intact checkpoint in `folder`; None if there is no checkpoint. Every rank calls it.

    Newer, damaged checkpoints are renamed to `*.damaged`. `events` receives a line for each of them, and for a
    checkpoint of version one, whose files cannot be verified.
    Raises CheckpointError naming file and field of the newest checkpoint if all are damaged.
    """
    if world.is_main:
        remove_partials(folder)
    found = world.all_gather_object(checkpoint_folders(folder) if world.is_main else [])[0]
    damaged: list[tuple[Path, CheckpointError]] = []
    for candidate in reversed(found):
        try:
            checkpoint = _load(candidate, world)
        except CheckpointError as error:
            damaged.append((candidate, error))
            continue
        for other, problem in damaged:
            events.log(
                f"note: {problem}; resuming from {candidate.name}, the damaged one is renamed to {other.name}.damaged"
            )
            if world.is_main:
                _set_aside(other)
        if checkpoint.format == 1:
            events.log(
                f"note: {candidate} was written by version one of vila, without {MANIFEST} and {_INPUTS}: its files, "
                "the data and the model cannot be verified"
            )
        return checkpoint
    if damaged:
        problem = damaged[0][1]
        problem.hint = (
            "all checkpoints are damaged; restore one from a copy, or delete the run's directory to start over"
        )
        problem.is_repeated = not world.is_main
        raise problem
    return None


def _load(folder: Path, world: World) -> Checkpoint:
    """Check and read a checkpoint; every rank returns or raises the same."""
    if not world.run_on_main(partial(_is_version_one, folder)):
        check_files(folder, world)
    return world.run_on_main(partial(read_state, folder))


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the checkpoints in a directory, oldest first; directories with other names are ignored."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted((path for path in found if path.name == _name(step_of(path))), key=step_of)


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint's directory."""
    return int(folder.name.removeprefix("step-"))


_STEP = re.compile(r"step-\d{8,18}")


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _set_aside(damaged: Path) -> None:
    target = damaged.with_name(f"{damaged.name}.damaged")
    shutil.rmtree(target, ignore_errors=True)
    damaged.rename(target)


def _is_version_one(folder: Path) -> bool:
    """Return whether version one wrote a checkpoint. Without a manifest, later formats are damaged."""
    if (folder / MANIFEST).exists() or (folder / _INPUTS).exists():
        return False
    return "format" not in Fields.of_file(folder / "state.json", CheckpointError)


def read_state(folder: Path) -> Checkpoint:
    """Read `state.json` and `inputs.json` of a checkpoint.

    Raises CheckpointError naming file and field for values of a wrong type or out of range.
    """
    state = Fields.of_file(folder / "state.json", CheckpointError)
    is_version_one = _is_version_one(folder)
    if not is_version_one and state.get("format", FORMAT) != FORMAT:
        raise state.refusal("format", expected=str(FORMAT), hint="resume with the version of vila that wrote it")
    return Checkpoint(
        progress=_read_progress(state.section("progress"), step_of(folder), is_version_one=is_version_one),
        streams=_read_streams(state),
        recipe=dict(state.section("recipe")),
        versions={name: state.section("versions").text(name) for name in state.section("versions")},
        world=state.integer("world", minimum=1),
        folder=folder,
        inputs={} if is_version_one else dict(Fields.of_file(folder / _INPUTS, CheckpointError)),
        format=1 if is_version_one else FORMAT,
    )


def _read_progress(progress: Fields, step: int, *, is_version_one: bool) -> Progress:
    """Read the counts. Version one did not count unreadable samples."""
    unknown = [name for name in progress if name not in Progress.__dataclass_fields__]
    if unknown:
        raise progress.refusal(unknown[0], "unknown field", hint="resume with the version of vila that wrote it")
    read = Progress(
        step=progress.integer("step", minimum=step, maximum=step),
        seconds=progress.number("seconds", maximum=1e12),
        bad_steps=progress.integer("bad_steps", maximum=step),
        **{
            name: progress.integer(name, maximum=2**62)
            for name in ("tokens", "samples", "supervised", "dropped", "truncated")
        },
        unreadable=progress.integer("unreadable", *((0,) if is_version_one else ()), maximum=2**62),
    )
    if read.supervised > read.tokens:
        raise progress.refusal("supervised", expected=f"at most tokens={read.tokens}")
    return read


def _read_streams(state: Fields) -> list[PackingStreamState]:
    """Read the packing streams (key `lanes`). Positions of stream i of n are i modulo n; waiting ones precede next."""
    streams = state.get("lanes")
    if not isinstance(streams, list):
        raise state.refusal("lanes", expected="a list")
    states = []
    for number, stream in enumerate(streams):
        try:
            position, waiting = stream
            positions = [position, *waiting]
            is_valid = (
                all(type(one) is int and one >= 0 and one % len(streams) == number for one in positions)
                and all(one < position for one in waiting)
                and len(set(waiting)) == len(waiting)
            )
        except (TypeError, ValueError):
            is_valid = False
        if not is_valid:
            raise CheckpointError(
                "not the state of a packing stream",
                file=state.file,
                field=f"lanes.{number}",
                value=stream,
                expected=f"[next, [waiting, ...]] with distinct positions that are {number} modulo {len(streams)}",
            )
        states.append(PackingStreamState(position, tuple(waiting)))
    return states


def versions() -> dict[str, str]:
    """Return versions and settings that a resumed run compares in its log."""
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": str(torch.get_num_threads()),
    }


def _unwritten(target: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint was not written ({reason}); the previous one is intact",
        file=target,
        hint="free disk space, then run again to resume from the previous one",
    )


def _unreadable(folder: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"cannot resume from it ({_reason(error)})",
        file=folder,
        hint="delete that directory to resume from another one",
    )


def _reason(error: BaseException) -> str:
    """Return the reason of an error in one line; distinct reasons of several ranks are joined."""
    if isinstance(error, CheckpointException):
        causes: list[Any] = [cause for cause, _ in error.failures.values()]
        return "; ".join(dict.fromkeys(map(_reason, causes)))
    return str(error).partition("\n")[0] or type(error).__name__
