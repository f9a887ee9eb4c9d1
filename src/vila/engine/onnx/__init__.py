"""Inference of the LLM with onnxruntime, on CPUs."""
