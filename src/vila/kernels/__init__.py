"""INT4 weights: storage, rounding, packings of other programs, and matmul backends."""
