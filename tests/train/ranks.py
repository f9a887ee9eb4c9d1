"""Running a function as the ranks of one run: processes on this machine, joined as `torchrun` joins them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

_PRELOAD = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "transformers",
    "vila.train.build",
    "tests.tiny",
]


def run_ranks(
    world: int,
    function: Callable[..., Any],
    *arguments: Any,
    nodes: int = 1,
    kill_after_s: float | None = None,
    limit_s: float = 120.0,
) -> list[Any]:
    """What `function(*arguments)` returned in each rank, or the exception it raised, or the exit code it died with.

    nodes:        machines that the ranks believe to be on, neighbours together.
    kill_after_s: when all ranks are killed, as by a power cut; None: they are left alone.
    """
    # Forked from a server that has imported everything: a rank starts in a tenth of a second.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    port = _free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    processes = []
    for rank, (_, sender) in enumerate(pipes):
        process = context.Process(target=_rank, args=(_place(rank, world, nodes), port, sender, function, arguments))
        process.start()
        sender.close()
        processes.append(process)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        for process in processes:
            process.kill()
    results = []
    for process, (receiver, _) in zip(processes, pipes, strict=True):
        try:
            results.append(receiver.recv() if receiver.poll(limit_s) else TimeoutError(f"{limit_s} s"))
        except (EOFError, OSError):  # it ended before it answered, or while it did
            process.join(5)
            results.append(process.exitcode)
    for process in processes:
        process.join(10)
        process.kill()
    return results


def _place(rank: int, world: int, nodes: int) -> dict[str, str]:
    local = world // nodes
    place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local}
    return {name: str(value) for name, value in place.items()}


def _rank(
    place: dict[str, str], port: int, sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        sender.send(function(*arguments))
    except Exception as error:  # noqa: BLE001 - the caller looks at it
        traceback.print_exc()
        sender.send(error)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
