"""`vila train --slurm`: write the batch script of a multi-node run and submit it."""

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
    """Resources of a Slurm job; empty strings are left to the cluster's defaults.

    gpus:  per node, one process each; 0 starts one CPU process per node.
    cpus:  CPUs per node; 0 requests eight per process.
    time:  time limit in Slurm's format, such as 24:00:00 or 2-00:00:00.
    grace: seconds before the time limit at which the run is signalled to save and stop.
    port:  rendezvous port of the first node; 0 derives one from the job id.
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
        """Processes per node."""
        return max(1, self.gpus)

    @property
    def world(self) -> int:
        """Processes of the run."""
        return self.nodes * self.processes


def parse_job(text: str) -> SlurmJob:
    """Parse `nodes=16,gpus=8,time=24:00:00`. Raises ConfigError naming the field and its value."""
    kinds = {field.name: field.type for field in fields(SlurmJob)}
    values: dict[str, str | int] = {}
    for term in text.split(","):
        name, equals, value = (part.strip() for part in term.partition("="))
        if not equals or not value:
            raise ConfigError(field="--slurm", value=term.strip(), expected=f"NAME=VALUE, such as {_EXAMPLE}")
        if name not in kinds:
            near = near_names(name, kinds, 1)
            hint = f"did you mean {near[0]!r}?" if near else None
            raise ConfigError(field="--slurm", value=name, expected=", ".join(kinds), hint=hint)
        if name in values:
            raise ConfigError("given twice", field=f"--slurm {name}")
        values[name] = _parse_count(name, value) if kinds[name] == "int" else _check_plain(f"--slurm {name}", value)
    if "nodes" not in values:
        raise ConfigError("nodes=N is missing", field="--slurm", value=text, expected=f"such as {_EXAMPLE}")
    return SlurmJob(**values)  # type: ignore[arg-type]


def render_script(job: SlurmJob, *, name: str, folder: Path, arguments: Sequence[str]) -> str:
    """Return the batch script of a job.

    name:      name of the job.
    folder:    directory of the run and of the job's log.
    arguments: arguments of `vila`, such as ["train", "vila_7b/1_align"]; run in the current directory with this Python.
    """
    return _SCRIPT.substitute(
        name=_check_plain("name", name.replace("/", "_")),
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
    """Write the script to the run's directory, submit it with `sbatch`, and return the output.

    Raises ConfigError if sbatch is not installed or rejects the job.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch is not installed", field="--slurm", hint="use a machine with Slurm, or --dry-run")
    path = folder / "train.sbatch"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, script)
    done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip() or f"exit status {done.returncode}"
        raise ConfigError(f"sbatch rejected the job ({reason})", file=path)
    return done.stdout.strip()


def _parse_count(name: str, value: str) -> int:
    minimum = 1 if name in ("nodes", "grace") else 0
    if not value.isdecimal() or int(value) < minimum:
        raise ConfigError(field=f"--slurm {name}", value=value, expected=f"an integer >= {minimum}")
    return int(value)


def _check_plain(field: str, value: str) -> str:
    # For an #SBATCH line: versions of Slurm differ in how they quote.
    if any(character.isspace() or character in "\"'`$\\;#" for character in value):
        raise ConfigError("has a space or special character", field=field, value=value, expected="no quoting needed")
    return value


def _cpus(job: SlurmJob) -> int:
    return job.cpus or 8 * job.processes


def _options(job: SlurmJob, folder: Path) -> list[tuple[str, str | int]]:
    options: list[tuple[str, str | int]] = [("nodes", job.nodes), ("ntasks-per-node", 1)]
    if job.gpus:
        options.append(("gpus-per-node", job.gpus))
    options.append(("cpus-per-task", _cpus(job)))
    names = ("partition", "account", "qos", "constraint", "reservation", "time")
    options += [(name, getattr(job, name)) for name in names if getattr(job, name)]
    return [
        *options,
        ("output", _check_plain("output.dir", str(folder.absolute() / "slurm-%j.log"))),
        ("open-mode", "append"),
    ]


class _Script(Template):
    """Template with `@`, since the shell uses `$`."""

    delimiter = "@"


_SCRIPT = _Script("""\
#!/bin/bash
#SBATCH --job-name=@name
@options
#SBATCH --requeue
# Signalled before the time limit and on preemption (SIGTERM), the run saves a checkpoint and exits.
#SBATCH --signal=USR1@@@grace

cd @directory || exit 1
export python=@python
export head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export port=@port
export time_is_up=@folder/time-is-up
# When a process is lost, the others exit instead of waiting.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Network settings (NCCL_SOCKET_IFNAME, NCCL_IB_HCA, NCCL_IB_SL, ...) come from the environment of the submission.
# CUDA_DEVICE_MAX_CONNECTIONS stays unset: the value 1 of upstream VILA prevents all-gather during computation.

# Command of each node. Slurm signals only this shell, which forwards the signal to the training processes (torchrun's
# children) until they exit: a process that is still starting does not handle it yet.
node='
(trap "" USR1 TERM; exec "$python" -m torch.distributed.run --nnodes=@nodes --node-rank="$SLURM_NODEID" \\
    --nproc-per-node=@processes --master-addr="$head" --master-port="$port" --signals-to-handle=SIGINT \\
    -m vila.cli.main "$@@") &
pid=$! sent=
forward() { sent=1; while kill -0 "$pid" 2>/dev/null; do pkill -USR1 -P "$pid"; sleep 2; done; }
trap "touch \\"$time_is_up\\"; forward" USR1
trap forward TERM
wait "$pid"; status=$?
[ -z "$sent" ] || { wait "$pid"; status=$?; }
exit "$status"
'
rm -f "$time_is_up"
srun --kill-on-bad-exit=1 --cpus-per-task=@cpus bash -c "$node" vila \\
    @arguments
status=$?
# Stopped by the time limit: requeue, to resume. Slurm itself requeues preempted jobs.
if [ "$status" -eq 0 ] && [ -e "$time_is_up" ] && [ ! -e @folder/finished.json ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
""")
