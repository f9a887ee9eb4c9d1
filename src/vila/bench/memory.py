"""How fast this machine reads its memory, and how much of it the process took."""

from __future__ import annotations

import time
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def read_bandwidth(device: str, num_bytes: int = 2**30) -> float:
    """Bytes a second of adding up a buffer much larger than the caches, the best of five."""
    buffer = torch.ones(num_bytes // 4, device=device)
    seconds = []
    for _ in range(5):
        wait(device)
        begin = time.perf_counter()
        buffer.sum()
        wait(device)
        seconds.append(time.perf_counter() - begin)
    return buffer.nbytes / min(seconds)


def wait(device: str) -> None:
    """Until the device has done what it was asked; a CPU always has."""
    if device != "cpu":
        torch.cuda.synchronize()


def forget_peak(device: str) -> None:
    """Begin to look for the peak anew, where the system can."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR.exists():
        _CLEAR.write_text("5", encoding="ascii")


def peak_bytes(device: str) -> int | None:
    """Most memory since `forget_peak`: of the device, or all that the process had of the machine's. None: unknown."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    if not _STATUS.exists():
        return None
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
