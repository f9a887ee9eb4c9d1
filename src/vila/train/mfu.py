"""Model FLOPs utilisation (MFU) of a training step, as defined by PaLM (arXiv 2204.02311, appendix B)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vila.config.schema import Recipe
from vila.model.config import VilaConfig
from vila.plan.devices import peak_tflops
from vila.plan.flops import Learning, step_flops
from vila.plan.model_shape import ModelShape, shape_of
from vila.train.fsdp import World


@dataclass(frozen=True, slots=True)
class MFUMeter:
    """Computes the MFU of steps.

    peak_flops:     FLOP/s of all devices of the run together, at the peak of each.
    feature_cache:  image features are cached, so the tower costs nothing.
    """

    shape: ModelShape
    learning: Learning
    peak_flops: float
    feature_cache: bool = False

    def mfu(self, metrics: Mapping[str, Any], seconds: float) -> float:
        """Return the MFU (0..1) of a step from its metrics and its duration."""
        flops = step_flops(
            self.shape,
            self.learning,
            tokens=metrics["tokens"],
            pairs=metrics["pairs"],
            supervised=metrics["supervised"],
            images=0 if self.feature_cache else metrics["images"],
        )
        return flops.total / (seconds * self.peak_flops)


def build_mfu_meter(recipe: Recipe, config: VilaConfig, world: World) -> MFUMeter | None:
    """Return the meter for a run; None if the peak FLOP/s of the device are not known.

    The peak is `monitor.peak_tflops`, or the dense bfloat16 peak of a known GPU.
    """
    peak = recipe.monitor.peak_tflops
    if not peak and world.device.type == "cuda":
        peak = peak_tflops(torch.cuda.get_device_name(world.device))
    if not peak:
        return None
    return MFUMeter(
        shape_of(config),
        Learning.of(recipe.stage),
        peak_flops=world.process.world_size * peak * 1e12,
        feature_cache=recipe.compute.feature_cache,
    )
