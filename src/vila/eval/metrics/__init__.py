"""Scoring functions shared by several benchmarks."""
