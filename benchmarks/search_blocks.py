"""Measure time and memory of the AWQ search on random decoder blocks with the sizes of a 7B model.

    python benchmarks/search_blocks.py --shape vila-7b --blocks 2 --rows 2 --dtype bfloat16

The search runs block by block, so a model of N blocks takes N / blocks times as long; its memory besides the model is
that of one block for any N.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace

import torch

from vila.bench.decode import peak_bytes, reset_peak_memory
from vila.bench.model_shapes import SHAPES, random_model
from vila.core.system import system_info
from vila.quant.awq_search import search_model
from vila.quant.calibration import Calibration, CalibrationSequence
from vila.quant.quant_config import QuantConfig


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="vila-7b")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=2, help="of 512 tokens")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = SHAPES[options.shape]
    model = random_model(replace(shape, layers=options.blocks), getattr(torch, options.dtype))
    held = sum(parameter.nbytes for parameter in model.parameters())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, shape.vocab, (options.rows, 512), generator=generator).tolist()
    calibration = Calibration("random", "0" * 64, tuple(CalibrationSequence(tuple(row)) for row in ids))
    reset_peak_memory("cpu")
    before, begin = peak_bytes("cpu"), time.perf_counter()
    search_model(model, calibration, QuantConfig())
    seconds, peak = time.perf_counter() - begin, peak_bytes("cpu")
    print(
        json.dumps(
            {
                **system_info(),
                "threads": options.threads,
                "shape": shape.title,
                "dtype": options.dtype,
                "tokens": 512 * options.rows,
                "blocks": options.blocks,
                "seconds_a_block": round(seconds / options.blocks, 1),
                "hours_for_the_model": round(seconds / options.blocks * shape.layers / 3600, 2),
                "block_bytes": sum(p.nbytes for p in model.get_decoder().layers[0].parameters()),  # type: ignore[union-attr]
                "held_bytes": held,
                "peak_beside_it_bytes": None if before is None or peak is None else peak - before,
            }
        )
    )


if __name__ == "__main__":
    main()
