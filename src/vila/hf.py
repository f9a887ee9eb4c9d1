"""Importing this module registers our classes with transformers' Auto classes, which then load native checkpoints."""

from __future__ import annotations

from transformers import AutoModelForImageTextToText, AutoProcessor

from vila.model.config import VilaConfig
from vila.model.modeling import VilaForConditionalGeneration
from vila.model.processor import VilaProcessor

AutoModelForImageTextToText.register(VilaConfig, VilaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(VilaConfig, VilaProcessor, exist_ok=True)

__all__ = ["VilaConfig", "VilaForConditionalGeneration", "VilaProcessor"]
