"""The training loop: one readable step, stages as data, exact resume."""
