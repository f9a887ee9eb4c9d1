"""Model FLOPs utilisation (MFU) of a training step, as defined by PaLM (arXiv 2204.02311, appendix B)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vila.config.schema import Recipe
from vila.model.config import VilaConfig
from vila.plan.devices import peak_tflops
from vila.plan.flops import TrainableParts, step_flops
from vila.plan.model_shape import ModelShape, shape_of
from vila.train.fsdp import World


@dataclass(frozen=True, slots=True)
class MFUMeter:
    """Computes the MFU of steps.

    peak_tflops:   peak of one device, in 1e12 FLOP/s.
    feature_cache: image features are cached, so the tower costs nothing.
    """

    shape: ModelShape
    trainable: TrainableParts
    num_devices: int
    peak_tflops: float
    feature_cache: bool = False

    def mfu(self, metrics: Mapping[str, Any], seconds: float) -> float:
        """Return the MFU (0..1) of a step from its metrics and its duration."""
        flops = step_flops(
            self.shape,
            self.trainable,
            tokens=metrics["tokens"],
            pairs=metrics["pairs"],
            supervised=metrics["supervised"],
            images=0 if self.feature_cache else metrics["images"],
        )
        return flops.total / (seconds * self.num_devices * self.peak_tflops * 1e12)


def build_mfu_meter(recipe: Recipe, config: VilaConfig, world: World) -> MFUMeter | None:
    """Return the meter for a run; None if the peak FLOP/s of the device are not known.

    The peak is `monitor.peak_tflops`, or the dense bfloat16 peak of a known GPU.
    """
    peak: float | None = recipe.monitor.peak_tflops
    if not peak and world.device.type == "cuda":
        peak = peak_tflops(torch.cuda.get_device_name(world.device))
    if not peak:
        return None
    return MFUMeter(
        shape_of(config),
        TrainableParts.of(recipe.stage),
        num_devices=world.process.world_size,
        peak_tflops=peak,
        feature_cache=recipe.compute.feature_cache,
    )
