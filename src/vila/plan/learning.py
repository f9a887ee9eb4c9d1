"""Which weights of a model learn, as plain facts, and how many they are."""

from __future__ import annotations

from dataclasses import dataclass

from vila.config.schema import Stage
from vila.plan.shape import ModelShape, count_parameters


@dataclass(frozen=True, slots=True)
class Learning:
    """Which weights learn.

    parts:   names that a learning weight of the LLM has on its path; empty: all of it.
    rank:    of low-rank adapters, which then learn in place of the LLM; `targets` name their Linears, empty: all.
    """

    vision: bool = False
    projector: bool = False
    llm: bool = False
    embeddings: bool = True
    parts: tuple[str, ...] = ()
    rank: int = 0
    targets: tuple[str, ...] = ()
    dropout: float = 0.0

    @staticmethod
    def of(stage: Stage) -> Learning:
        """What a recipe's stage says."""
        return Learning(
            "vision" in stage.tune,
            "projector" in stage.tune,
            "llm" in stage.tune,
            stage.tune_embeddings,
            stage.llm_parts,
            stage.lora.rank,
            stage.lora.targets,
            stage.lora.dropout,
        )

    def matrix(self, name: str) -> bool:
        """Whether a Linear of a decoder block learns itself."""
        return self.llm and not self.rank and (not self.parts or bool(set(name.split(".")) & set(self.parts)))

    def adapter(self, name: str) -> bool:
        """Whether a Linear of a decoder block has an adapter, which learns."""
        return self.llm and self.rank > 0 and (not self.targets or name.rpartition(".")[2] in self.targets)

    @property
    def vocabulary(self) -> bool:
        """Whether embeddings and head learn."""
        return self.llm and not self.rank and self.embeddings and not self.parts

    @property
    def norms(self) -> bool:
        """Whether the norms of decoder blocks learn."""
        return self.llm and not self.rank and not self.parts

    @property
    def below_llm(self) -> bool:
        """Whether anything before the first decoder block learns."""
        return self.vision or self.projector or self.vocabulary


def count_learning(shape: ModelShape, learning: Learning) -> dict[str, int]:
    """Parameters that learn, by component; adapters count among `blocks`."""
    blocks = sum(m.weights for m in shape.llm.matrices if learning.matrix(m.name))
    blocks += sum(learning.rank * (m.inputs + m.outputs) for m in shape.llm.matrices if learning.adapter(m.name))
    if learning.norms:
        blocks += shape.llm.small
    every = count_parameters(shape)
    return {
        "tower": every["tower"] * learning.vision,
        "projector": every["projector"] * learning.projector,
        "embeddings": every["embeddings"] * learning.vocabulary,
        "blocks": blocks * shape.llm.layers + shape.final_norm * learning.norms,
        "head": every["head"] * learning.vocabulary,
    }
