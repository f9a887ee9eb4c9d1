"""The network and its checkpoint layouts: a vision tower, a projector, an LLM, and nothing patched."""
