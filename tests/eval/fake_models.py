"""Chat models without weights for tests of the evaluation runner."""

from __future__ import annotations

from vila.eval.openai_client import ChatCompletion


class FakeModel:
    """Chat model whose answers come from `generate`; subclasses override it."""

    def generate(self, conversations, sampling):
        return ["a" for _ in conversations]

    def complete(self, conversations, sampling, *, template=""):
        return [ChatCompletion(text) for text in self.generate(conversations, sampling)]

    def with_vision(self, *, image_mode=None, exif_orientation=None):
        return self
