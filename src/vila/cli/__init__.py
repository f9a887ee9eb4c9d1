"""The `vila` command: one small file a command, and the renderer of progress events."""
