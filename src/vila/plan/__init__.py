"""What a recipe takes on a machine, before it is run: parameters, memory, operations, traffic, time."""
