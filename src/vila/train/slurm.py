"""`vila train --slurm`: the batch script of a run on several machines, and handing it to Slurm."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from string import Template

from vila.core.errors import ConfigError, near_names
from vila.core.files import write_text

_EXAMPLE = "nodes=16,gpus=8,partition=NAME,account=NAME,time=24:00:00"


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """What a job asks of Slurm; texts that are empty are left to the cluster's defaults.

    gpus:  on each node, a process for each; 0 starts one process a node on the CPU.
    cpus:  processors of a node; 0 asks for eight a process.
    time:  as Slurm writes it, such as 24:00:00 or 2-00:00:00.
    grace: seconds before the end of its time at which the run is told to save and stop.
    port:  of the first node, where the processes meet; 0 derives one from the number of the job.
    """

    nodes: int
    gpus: int = 8
    cpus: int = 0
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    reservation: str = ""
    time: str = ""
    grace: int = 300
    port: int = 0

    @property
    def processes(self) -> int:
        """Processes of a node."""
        return max(1, self.gpus)

    @property
    def world(self) -> int:
        """Processes of the run."""
        return self.nodes * self.processes


def parse_job(text: str) -> SlurmJob:
    """`nodes=16,gpus=8,time=24:00:00` as a job. Raises ConfigError with the field, its value and what would do."""
    kinds = {field.name: field.type for field in fields(SlurmJob)}
    values: dict[str, str | int] = {}
    for term in text.split(","):
        name, equals, value = (part.strip() for part in term.partition("="))
        if not equals or not value:
            raise ConfigError(f"--slurm {term.strip()!r}: expected NAME=VALUE, such as --slurm {_EXAMPLE}")
        if name not in kinds:
            near = near_names(name, kinds, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(kinds)}"
            raise ConfigError(f"--slurm {name}: not known; {hint}")
        if name in values:
            raise ConfigError(f"--slurm {name}: given twice")
        values[name] = _number(name, value) if kinds[name] == "int" else _plain(name, value)
    if "nodes" not in values:
        raise ConfigError(f"--slurm {text!r}: nodes=N is missing; for example --slurm {_EXAMPLE}")
    return SlurmJob(**values)  # type: ignore[arg-type]


def render_script(job: SlurmJob, *, name: str, folder: Path, arguments: Sequence[str]) -> str:
    """The batch script of a job.

    name:      of the job.
    folder:    of the run; its log goes there.
    arguments: of `vila`, such as ["train", "vila_7b/1_align"]; they run in the present directory, by this Python.
    """
    return _SCRIPT.substitute(
        name=_plain("the recipe's name", name.replace("/", "_")),
        options="\n".join(f"#SBATCH --{key}={value}" for key, value in _options(job, folder)),
        grace=job.grace,
        directory=shlex.quote(str(Path.cwd())),
        python=shlex.quote(sys.executable),
        port=job.port or "$((20000 + SLURM_JOB_ID % 20000))",
        nodes=job.nodes,
        processes=job.processes,
        cpus=_cpus(job),
        arguments=shlex.join(arguments),
        folder=shlex.quote(str(folder.absolute())),
    )


def submit(script: str, folder: Path) -> str:
    """Write the script into the folder of the run, hand it to `sbatch`, and return what that says.

    Raises ConfigError when there is no sbatch here, or when it refuses the job, with its words.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch: not found; run this where Slurm's commands are, or print the script with --dry-run")
    path = folder / "train.sbatch"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, script)
    done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"sbatch refused {path}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout.strip()


def _number(name: str, value: str) -> int:
    least = 1 if name in ("nodes", "grace") else 0
    if not value.isdecimal() or int(value) < least:
        raise ConfigError(f"--slurm {name}={value}: expected an integer >= {least}")
    return int(value)


def _plain(name: str, value: str) -> str:
    # It becomes part of an #SBATCH line, which knows no quoting that all versions of Slurm agree on.
    if any(character.isspace() or character in "\"'`$\\;#" for character in value):
        raise ConfigError(f"{name}: {value!r} has a space or a sign that a batch script cannot hold")
    return value


def _cpus(job: SlurmJob) -> int:
    return job.cpus or 8 * job.processes


def _options(job: SlurmJob, folder: Path) -> list[tuple[str, str | int]]:
    asked: list[tuple[str, str | int]] = [("nodes", job.nodes), ("ntasks-per-node", 1)]
    if job.gpus:
        asked.append(("gpus-per-node", job.gpus))
    asked.append(("cpus-per-task", _cpus(job)))
    names = ("partition", "account", "qos", "constraint", "reservation", "time")
    asked += [(name, getattr(job, name)) for name in names if getattr(job, name)]
    return [*asked, ("output", _plain("output.dir", str(folder.absolute() / "slurm-%j.log"))), ("open-mode", "append")]


class _Script(Template):
    """The shell has the dollar for itself."""

    delimiter = "@"


_SCRIPT = _Script("""\
#!/bin/bash
#SBATCH --job-name=@name
@options
#SBATCH --requeue
# So long before its time is up, and when it is preempted (SIGTERM), the run is told: it saves and ends.
#SBATCH --signal=USR1@@@grace

cd @directory || exit 1
export python=@python
export head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export port=@port
export time_is_up=@folder/time-is-up
# A process that is lost ends the others, instead of letting them wait.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# What a network needs (NCCL_SOCKET_IFNAME, NCCL_IB_HCA, NCCL_IB_SL, ...) is taken from where the job was submitted.
# CUDA_DEVICE_MAX_CONNECTIONS stays unset: at 1, as the original has it, weights could not be gathered while computing.

# What each node runs. Slurm signals this shell alone; it hands the word to the processes that train, which are
# torchrun's children, until they have stopped, for one that is still starting does not listen yet.
node='
(trap "" USR1 TERM; exec "$python" -m torch.distributed.run --nnodes=@nodes --node-rank="$SLURM_NODEID" \\
    --nproc-per-node=@processes --master-addr="$head" --master-port="$port" --signals-to-handle=SIGINT \\
    -m vila.cli.main "$@@") &
pid=$! told=
tell() { told=1; while kill -0 "$pid" 2>/dev/null; do pkill -USR1 -P "$pid"; sleep 2; done; }
trap "touch \\"$time_is_up\\"; tell" USR1
trap tell TERM
wait "$pid"; status=$?
[ -z "$told" ] || { wait "$pid"; status=$?; }
exit "$status"
'
rm -f "$time_is_up"
srun --kill-on-bad-exit=1 --cpus-per-task=@cpus bash -c "$node" vila \\
    @arguments
status=$?
# Stopped by the clock: back into the queue, to go on from there. What was preempted Slurm itself puts back.
if [ "$status" -eq 0 ] && [ -e "$time_is_up" ] && [ ! -e @folder/finished.json ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
""")
