"""The LLM by onnxruntime, on a CPU."""
