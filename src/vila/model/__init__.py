"""The model (vision tower, projector, LLM), its processor, weight files, and checkpoint layouts."""
