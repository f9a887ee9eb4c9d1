"""Settings of INT4 quantization: method, group size, AWQ search, rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from vila.core.errors import ConfigError

Method = Literal["awq", "rtn"]
Scaling = Literal["activation", "duo", "both"]
Clipping = Literal["none", "published", "all"]
Rounding = Literal["nearest", "gptq"]


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """How to quantize the LLM to INT4. The defaults are those of the published AWQ.

    method:           `awq` searches channel scales and clip limits, `rtn` (round to nearest) only rounds.
    group_size:       input channels that share a scale and a zero point.
    symmetric:        no zero points, as TensorRT-LLM requires.
    scaling:          candidates of the AWQ search: `activation` from activations (published), `duo` from activations
                      and weights with the identity kept, `both` all of these.
    clipping:         `published` clips all Linears except queries and keys, `all` those too, `none` nothing.
    rounding:         `nearest` (published); `gptq` chooses codes on the calibration, each block on the outputs of the
                      quantized blocks before it, and refits the scales.
    image_weight:     weight of an image token in the calibration; a text token has weight 1.
    search_sequences: calibration sequences that the AWQ search uses, the first ones; 0 is all. The search needs far
                      fewer tokens than GPTQ, which uses all, and costs much more per token.
    dtype:            dtype of the AWQ search. None: float32 on a CPU, elsewhere the dtype of the weights.
    device:           device on which a block is processed; None: where it is.
    batch_tokens:     tokens per forward pass of a block; more is faster on a GPU and takes more memory.
    """

    method: Method = "awq"
    group_size: int = 128
    symmetric: bool = False
    scaling: Scaling = "activation"
    clipping: Clipping = "published"
    rounding: Rounding = "nearest"
    image_weight: float = 1.0
    search_sequences: int = 0
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    batch_tokens: int = 2048

    def __post_init__(self) -> None:
        choices = {"method": Method, "scaling": Scaling, "clipping": Clipping, "rounding": Rounding}
        problems = [
            ConfigError(field=name, value=getattr(self, name), expected=" or ".join(get_args(kind)))
            for name, kind in choices.items()
            if getattr(self, name) not in get_args(kind)
        ]
        if not (self.image_weight > 0 and math.isfinite(self.image_weight)):
            problems.append(ConfigError(field="image_weight", value=self.image_weight, expected="a finite number > 0"))
        if len(problems) == 1:
            raise problems[0]
        if problems:
            raise ConfigError.collect("quantization", map(str, problems))

    def search_settings(self) -> dict[str, Any]:
        """Return the settings that decide the result of the AWQ search, as recorded in its file."""
        names = ("group_size", "symmetric", "scaling", "clipping", "image_weight")
        return {name: getattr(self, name) for name in names}

    def rounding_settings(self) -> dict[str, Any]:
        """Return the settings that decide the result of rounding."""
        return {name: getattr(self, name) for name in ("group_size", "symmetric", "rounding", "image_weight")}

    def batch_sequences(self, length: int) -> int:
        """Return the number of sequences of `length` tokens per forward pass."""
        return max(1, self.batch_tokens // length)


BEST = QuantConfig(rounding="gptq", search_sequences=2)
"""The settings with the least loss of quality; see docs/quantization.md."""
