"""The `vila` command: one module per command, and rendering of progress events."""
