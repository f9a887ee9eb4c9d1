"""Which number type a forward pass uses on this machine."""

from __future__ import annotations

import torch


def has_fast_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether bfloat16 products are computed by hardware: AVX512-BF16 or AMX on a CPU, Ampere or newer on CUDA."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(
        probe()
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        if (probe := getattr(torch.cpu, name, None))
    )


def choose_dtype(name: str, device: torch.device | str = "cpu") -> torch.dtype:
    """`auto` is bfloat16 where the hardware computes it, else float32; other names stand for themselves."""
    if name == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]
