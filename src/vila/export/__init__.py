"""Export formats: model files for other runtimes, written and never read back."""
