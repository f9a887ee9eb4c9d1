"""Tiny models whose channels differ as those of real ones do: a few are loud, and norms and biases matter."""

from __future__ import annotations

import torch

from tests import tiny
from vila.quant.calibration import Calibration, CalibrationSequence


def loud(family="llama", *, layers=1, seed=0, **text):
    """A tiny VILA whose LLM has loud channels, in float32, and its processor."""
    if family == "mistral":
        text.setdefault("sliding_window", 40)
    model, processor = tiny.vila(family, seed=seed, num_hidden_layers=layers, **text)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, ::7] *= 6
        for name, parameter in model.language_model.named_parameters():
            if "norm" in name:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) + 0.5)
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model, processor


def random_rows(count=2, length=60, seed=0):
    """Calibration of random ids, sequences of one length."""
    ids = torch.randint(3, 250, (count, length), generator=torch.Generator().manual_seed(seed))
    return Calibration("random", "0" * 64, tuple(CalibrationSequence(tuple(row)) for row in ids.tolist()))


def logits(model, rows):
    """Logits of the model, [N, S, V]."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([row.ids for row in rows.sequences])).logits
