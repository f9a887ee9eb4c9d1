"""Checkpoints: tensors dealt over the processes of the run, everything else in JSON; whole or absent.

Tensors are written by `torch.distributed.checkpoint`, each process its own part, and can be read by another number of
processes. Writing goes on beside training, in a folder that gets its name when everything is on the disk.
"""

from __future__ import annotations

import shutil
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from vila.core.errors import CheckpointError, DataError, VilaError
from vila.core.files import atomic_path, remove_partials, write_json
from vila.core.reading import read_json
from vila.data.pack import LaneState
from vila.train.metadata import TensorReader
from vila.train.parallel import World, told_of_the_lost

# It says so of every process that is alone.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is, over all processes. `tokens` and `samples` count what was seen, padding left out.

    bad_steps: steps that were left out because their loss or gradient was not finite.
    dropped, truncated: over-long samples that were left out, and cut.
    """

    step: int = 0
    tokens: int = 0
    samples: int = 0
    supervised: int = 0
    seconds: float = 0.0
    bad_steps: int = 0
    dropped: int = 0
    truncated: int = 0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a run needs to go on besides its tensors.

    lanes: of all processes, by number.
    world: processes that wrote it.
    """

    progress: Progress
    lanes: list[LaneState]
    recipe: dict[str, Any]
    versions: dict[str, str]
    world: int = 1
    folder: Path = Path()

    def load_tensors(self, into: Mapping[str, Tensor], world: World) -> None:
        """Fill the tensors of `into`, dealt or whole, from the checkpoint.

        Raises CheckpointError naming the first tensor that is missing or has another shape.
        """
        reader = TensorReader(self.folder)
        try:
            self._refuse_others(reader, into)
            group = {"no_dist": True} if world.alone else {"process_group": world.control}
            with told_of_the_lost():
                dcp.load(dict(into), storage_reader=reader, **group)
        except VilaError:
            raise
        except (OSError, CheckpointException, RuntimeError, ValueError, EOFError) as error:
            raise _unreadable(self.folder, error) from error

    def _refuse_others(self, reader: TensorReader, into: Mapping[str, Tensor]) -> None:
        known = reader.read_metadata().state_dict_metadata
        for name, tensor in into.items():
            size = getattr(known.get(name), "size", None)
            if size is None or tuple(size) != tuple(tensor.shape):
                found = "not in it" if size is None else f"of shape {tuple(size)}, the model's {tuple(tensor.shape)}"
                raise CheckpointError(
                    f"{self.folder}: {name} is {found}; it is of another model or stage. Choose another output.dir, or "
                    "delete that directory to start over"
                )

    @property
    def tensor_names(self) -> set[str]:
        """What `load_tensors` can fill. Raises CheckpointError."""
        try:
            return set(TensorReader(self.folder).read_metadata().state_dict_metadata)
        except OSError as error:
            raise _unreadable(self.folder, error) from error


class Checkpoints:
    """The checkpoints of a run: `step-N` folders, of which the newest few are kept, and the best one if asked."""

    def __init__(self, folder: Path, world: World, *, keep_last: int = 1, background: bool = False) -> None:
        """background: write while training goes on; `wait` before the process ends."""
        self.folder, self.world, self.keep_last, self.background = folder, world, keep_last, background
        self._thread: threading.Thread | None = None
        self._error: VilaError | None = None
        self._mesh: DeviceMesh | None = None

    def save(self, tensors: Mapping[str, Tensor], state: Checkpoint, *, best: int | None = None) -> None:
        """Write `folder/step-N` atomically, then delete those that are not kept. A kill leaves the previous one whole.

        tensors: those of this process: its parts of dealt ones, and whole ones, which are written once.
        best:    step that is kept besides the newest ones.
        Every process calls it. Raises CheckpointError, of this save or of the one before it.
        """
        self.wait()
        target = self.folder / f"step-{state.progress.step:08d}"
        with ExitStack() as stack:
            part = self._open(target, stack)
            # From here on training may change the tensors.
            staged = {name: self._copied(tensor) for name, tensor in tensors.items()}
            write = partial(self._write, part, staged, state, stack.pop_all(), best)
        if not self.background:
            self._run(target, write)
            self.wait()
        else:
            self._thread = threading.Thread(target=self._run, args=(target, write), name="checkpoint")
            self._thread.start()

    def wait(self) -> None:
        """Until the checkpoint that is being written is on the disk. Raises CheckpointError when it could not be."""
        if self._thread:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise CheckpointError when a checkpoint could not be written, as far as is known now."""
        if self._error:
            error, self._error = self._error, None
            raise error

    def _open(self, target: Path, stack: ExitStack) -> Path:
        """The folder that all processes write into; at the end of `stack` it becomes `target`."""
        part, failed = target, ""
        if self.world.main:
            try:
                part = stack.enter_context(atomic_path(target))
                part.mkdir()
            except (OSError, VilaError) as error:
                failed = _reason(error)
        part, failed = self.world.gather((part, failed))[0]
        if failed:
            raise _unwritten(target, failed)
        return part

    def _write(
        self, part: Path, tensors: Mapping[str, Tensor], state: Checkpoint, named: ExitStack, best: int | None
    ) -> None:
        """Write this process's part. What fails in one process fails in all: none goes on as if it were saved."""
        failed = ""
        try:
            with named:
                group = {"no_dist": True} if self.world.alone else {"process_group": self.world.saving}
                dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(part), **group)
                if self.world.main:
                    write_json(part / "state.json", _as_json(state))
            if self.world.main:
                self._prune(best)
        except (OSError, VilaError) as error:
            failed = _reason(error)
        if failed := self.world.gather(failed, self.world.saving)[0]:
            raise _unwritten(self.folder / part.name, failed)

    def _run(self, target: Path, write: Callable[[], None]) -> None:
        try:
            with told_of_the_lost():
                write()
        except VilaError as error:
            self._error = error
        except (Exception, CheckpointException) as error:  # noqa: BLE001 - raised by the thread that trains
            self._error = _unwritten(target, _reason(error))

    def _copied(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            if self._mesh is None:
                mesh = tensor.device_mesh
                self._mesh = mesh if mesh.device_type == "cpu" else init_device_mesh("cpu", tuple(mesh.shape))
            local = tensor.to_local().detach().to("cpu", copy=True)
            facts = {"run_check": False, "shape": tensor.shape, "stride": tensor.stride()}
            return DTensor.from_local(local, self._mesh, tensor.placements, **facts)  # type: ignore[arg-type]
        return tensor.detach().to("cpu", copy=True)

    def _prune(self, best: int | None) -> None:
        found = sorted(self.folder.glob("step-*"))
        kept = {*found[-self.keep_last :], self.folder / f"step-{best or 0:08d}"}
        for old in found:
            if old not in kept:
                shutil.rmtree(old)


def _as_json(state: Checkpoint) -> dict[str, Any]:
    return {
        "progress": asdict(state.progress),
        "lanes": [[lane.next_position, list(lane.waiting)] for lane in state.lanes],
        "recipe": state.recipe,
        "versions": state.versions,
        "world": state.world,
    }


def load_checkpoint(folder: Path, world: World) -> Checkpoint | None:
    """The newest checkpoint in `folder`, or None when there is none. Every process calls it.

    Raises CheckpointError naming the folder that cannot be read and the remedy.
    """
    if world.main:
        remove_partials(folder)
    world.gather(None)
    found = sorted(folder.glob("step-*")) if folder.is_dir() else []
    if not found:
        return None
    newest = found[-1]
    try:
        state = read_json(newest / "state.json")
        lanes = [LaneState(position, tuple(waiting)) for position, waiting in state["lanes"]]
        progress = Progress(**state["progress"])
        checkpoint = Checkpoint(progress, lanes, state["recipe"], state["versions"], state["world"], newest)
    except (OSError, DataError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(newest, error) from error
    return checkpoint


def clear_checkpoints(folder: Path) -> None:
    """Delete all checkpoints of a finished run."""
    shutil.rmtree(folder, ignore_errors=True)


def versions() -> dict[str, str]:
    """Versions that a resumed run is compared with in its log."""
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": str(torch.get_num_threads()),
    }


def _unwritten(target: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{target}: the checkpoint was not written ({reason}); the one before it is whole. Make room, then run again "
        "to go on from there"
    )


def _unreadable(folder: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(f"{folder}: cannot resume from it ({_reason(error)}); delete that directory to start over")


def _reason(error: BaseException) -> str:
    """What went wrong, in a line; of errors that several processes had, each once."""
    if isinstance(error, CheckpointException):
        causes: list[Any] = [cause for cause, _ in error.failures.values()]
        return "; ".join(dict.fromkeys(map(_reason, causes)))
    return str(error).partition("\n")[0] or type(error).__name__


def states_in_order(shares: Sequence[Sequence[LaneState]]) -> list[LaneState]:
    """The lanes of all processes by number, from those of each process by rank."""
    return [state for share in shares for state in share]
