"""From files to batches: formats, mixtures, a stateless order, lanes that pack rows, and the batch."""
