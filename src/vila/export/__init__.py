"""Targets that are written and never read back: files for other runtimes."""
