"""Training data: dataset formats, mixtures, packing streams, loader workers, batches."""
