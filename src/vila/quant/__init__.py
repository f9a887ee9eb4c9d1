"""INT4 quantization of the LLM: AWQ search (arXiv 2306.00978), GPTQ, round to nearest, calibration."""
