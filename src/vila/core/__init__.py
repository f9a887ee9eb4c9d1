"""Types, errors, files, registries and progress events: standard library and typing only, no torch."""
