"""INT4 weights: one storage, the packings of other programs, and the products that read it."""
