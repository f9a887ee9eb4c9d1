"""INT4 by AWQ (arXiv 2306.00978): calibration, the search for scales and clip limits, folding, quantization."""
