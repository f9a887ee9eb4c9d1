"""Random number generators: seeding, and their states as tensors, so that checkpoints need no pickles."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state() -> dict[str, Tensor]:
    """Return the states of torch, its CUDA device, Python and NumPy."""
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state()
    _, key, position, has_gauss, cached = numpy
    out = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([0.0 if gauss is None else 1.0, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*key.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        out["cuda"] = torch.cuda.get_rng_state()
    return out


def set_random_state(state: dict[str, Tensor]) -> None:
    """Restore the result of `random_state`."""
    torch.set_rng_state(state["torch"])
    version, *words = state["python"].tolist()
    given, gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss if given else None))
    *key, position, has_gauss = state["numpy"].tolist()
    cached = state["numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_everything(*numbers: int) -> None:
    """Seed all generators from several numbers, such as seed, step and rank."""
    words = np.random.SeedSequence(numbers).generate_state(3)
    torch.manual_seed(int(words[0]))
    random.seed(int(words[1]))
    np.random.seed(int(words[2]))
