"""Gradio demo and its HTTP client."""
