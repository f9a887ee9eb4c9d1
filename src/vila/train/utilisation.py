"""Model FLOPs utilisation of a step: what the mathematics asks for, over what the devices could do meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vila.config.schema import Recipe
from vila.model.config import VilaConfig
from vila.plan.devices import peak_tflops
from vila.plan.flops import step_flops
from vila.plan.learning import Learning
from vila.plan.shape import shape_of
from vila.train.parallel import World


def utilisation_of(recipe: Recipe, config: VilaConfig, world: World) -> Callable[[dict[str, Any], float], float | None]:
    """MFU (0..1) of a step from its facts and seconds, as PaLM defines it (arXiv 2204.02311, appendix B).

    The peak is `monitor.peak_tflops`, or the dense bfloat16 peak of a known GPU; without either there is no MFU.
    """
    peak = recipe.monitor.peak_tflops or _known_peak(world)
    if not peak:
        return lambda facts, seconds: None
    shape, learning = shape_of(config), Learning.of(recipe.stage)
    cached = recipe.compute.feature_cache

    def utilisation(facts: dict[str, Any], seconds: float) -> float:
        images = 0 if cached else facts["images"]
        needed = step_flops(
            shape,
            learning,
            tokens=facts["tokens"],
            pairs=facts["pairs"],
            supervised=facts["supervised"],
            images=images,
        )
        return needed.total / (seconds * world.place.world * peak * 1e12)

    return utilisation


def _known_peak(world: World) -> float | None:
    return peak_tflops(torch.cuda.get_device_name(world.device)) if world.device.type == "cuda" else None
