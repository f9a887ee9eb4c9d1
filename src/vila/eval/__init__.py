"""Benchmarks: samples, predictions that can be resumed, and scores."""
