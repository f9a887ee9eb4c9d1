"""Checkpoint layouts that can be read back, one file each."""
