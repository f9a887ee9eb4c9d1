"""Estimate parameters, memory, FLOPs, communication, time and disk space of a recipe before it is run."""
