"""The recipe: every field of a training run, typed, with the text that becomes its help below it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vila.core.vision_spec import ImageMode

Module = Literal["vision", "projector", "llm"]
Positive = Field(gt=0)


class Config(BaseModel):
    """Base of all recipe sections: frozen, unknown keys refused, docstrings below fields become help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelSource(Config):
    """Where a stage's model comes from: a whole checkpoint (`path`), or an LLM and a vision tower (`llm`, `vision`)."""

    path: str = ""
    """Directory of a whole model, usually the output of the stage before. Excludes `llm` and `vision`."""
    llm: str = ""
    """Directory or hub id of the language model and its tokenizer."""
    vision: str = ""
    """Directory or hub id of the vision tower."""
    projector: str = "mlp2x_gelu"
    """Projector between tower and LLM: `linear` or `mlpNx_gelu`."""
    projector_init: Literal["random", "calibrated"] = "random"
    """`calibrated` standardises each input channel over the first pictures of the data and scales the output to the
    LLM's embeddings."""
    select_layer: int = -2
    """Which of the tower's hidden states to use; 0: embeddings, -1: the last block's output before the final norm."""
    select_feature: Literal["patch", "cls_patch"] = "patch"
    """`patch` drops the class token, `cls_patch` keeps every token."""
    image_size: int = 336
    """Side of the square picture given to the tower, in pixels."""
    image_mode: ImageMode = "pad"
    """How a picture becomes square: `pad` with the mean colour, `resize` ignoring the aspect, `square` centre crop."""
    template: str = "vicuna_v1"
    """Conversation template stored with the model and used at inference."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelSource:
        if bool(self.path) == bool(self.llm or self.vision):
            raise ValueError("give either path, or both llm and vision")
        if not self.path and not (self.llm and self.vision):
            raise ValueError("llm and vision go together; one of them is missing")
        return self


class Stage(Config):
    """Which parts learn, and how fast."""

    tune: tuple[Module, ...] = Field(min_length=1)
    """Which of vision, projector, llm receive gradients; the rest are frozen and stay in eval mode."""
    lr: float = Field(gt=0, lt=1)
    """Peak learning rate of the AdamW groups, after warm-up."""
    lr_projector: float | None = Field(default=None, gt=0, lt=1)
    """Peak learning rate of the projector where it differs from `lr`."""
    llm_parts: tuple[str, ...] = ()
    """Parts of a decoder block that a tuned LLM learns, such as `self_attn` or `mlp`; empty: the whole LLM."""
    tune_embeddings: bool = True
    """Whether a tuned LLM also learns its token embeddings and output head."""


class MixtureEntry(Config):
    """One data set of the mixture."""

    format: str
    """Name of a dataset format, such as `messages` or `llava_json`."""
    path: str
    """File or directory that the format reads."""
    image_root: str = ""
    """Directory that relative image paths start from; empty: the directory of `path`."""
    repeat: float = Field(default=1.0, gt=0)
    """How often one epoch shows the data set; 0.5 takes half of it, 2 shows it twice."""
    weight: float | None = Field(default=None, gt=0)
    """Share of an epoch's samples relative to the other weights, instead of `repeat`; all data sets have one or none.
    The epoch is then as long as all data sets together."""
    max_samples: int | None = Field(default=None, gt=0)
    """Take a fixed pseudo-random subset of this size; null: all."""
    split: Literal["train", "val"] = "train"
    """Which share to take where `val_fraction` holds some back."""
    val_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the data set that is held back as `val`, chosen by the number of the sample alone."""
    template: str = ""
    """Template of this data set where it differs from the stage's."""
    image_mode: ImageMode | None = None
    """How pictures of this data set become square where it differs from the stage's."""
    options: dict[str, Any] = {}
    """Options of the format; `docs/data.md` lists them."""

    @model_validator(mode="after")
    def _one_share(self) -> MixtureEntry:
        if self.weight is not None and self.repeat != 1:
            raise ValueError("give repeat or weight, not both")
        if self.split == "val" and not self.val_fraction:
            raise ValueError("split is val, but val_fraction is 0: nothing is held back")
        return self


class Data(Config):
    """What the stage is trained on."""

    mixture: tuple[MixtureEntry, ...] = Field(min_length=1)
    """The data sets; one epoch is their union, each `repeat` times or by `weight`. An entry `{mixture: name}` stands
    for a list of `data.mixtures`, and so does the text `a+b*2`."""
    mixtures: dict[str, tuple[MixtureEntry, ...]] = {}
    """Lists of data sets by name, for use in `data.mixture`. Put in their places when the recipe is loaded."""
    template: str = ""
    """Template of the stage; empty: the model's own."""
    max_length: int = Field(gt=8)
    """Tokens in a packed row, image tokens included."""
    max_images: int = Field(default=0, ge=0)
    """Pictures that a row may hold, which bounds the memory of a step; 0: no limit."""
    packing: Literal["rows", "grouped", "none"] = "rows"
    """`rows` fills rows of `max_length` with whole samples that never see each other; `none` pads each sample alone;
    `grouped` does so too, but chooses samples of similar length for a step."""
    look_ahead: int = Field(default=64, ge=1)
    """Samples that each lane may choose from when it fills a row."""
    overlong: Literal["error", "drop", "truncate"] = "error"
    """What to do with a sample longer than `max_length`: stop, leave it out, or cut whole exchanges from its end.
    Drops and cuts are counted."""
    max_faults: int = Field(default=0, ge=0)
    """Samples that may be unreadable: they are skipped and listed in `faults.jsonl`; one more stops the run."""

    @model_validator(mode="after")
    def _weights(self) -> Data:
        weighted = [entry.weight is not None for entry in self.mixture]
        if any(weighted) and not all(weighted):
            raise ValueError(f"mixture.{weighted.index(False)} has no weight, others have; give all or none one")
        return self


class Batch(Config):
    """Size of an optimizer step."""

    rows: int = Field(default=0, ge=0)
    """Global batch in packed rows, summed over ranks and accumulation (`packing: rows`)."""
    samples: int = Field(default=0, ge=0)
    """Global batch in samples, summed over ranks and accumulation (`packing: none` or `grouped`)."""
    micro: int = Field(default=1, ge=1)
    """Rows that one forward pass holds on one rank."""


class Optim(Config):
    """AdamW and its schedule: linear warm-up, then cosine to zero."""

    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps spent warming up."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; norms and biases are exempt."""
    beta1: float = Field(default=0.9, gt=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.999, gt=0, lt=1)
    """Decay of the second moment."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""


class Budget(Config):
    """How long the stage lasts: passes over the data, or tokens seen. Exactly one is given."""

    epochs: float = Field(default=0.0, ge=0)
    """Passes over the mixture."""
    tokens: int = Field(default=0, ge=0)
    """Tokens seen, image tokens included; rounded up to whole steps."""

    @model_validator(mode="after")
    def _one_unit(self) -> Budget:
        if bool(self.epochs) == bool(self.tokens):
            raise ValueError("give exactly one of epochs and tokens")
        return self


class Compute(Config):
    """Numerics and memory."""

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of weights and activations in the forward pass; masters are always float32. `auto`: bfloat16 where
    the processor has it."""
    feature_cache: bool = False
    """Compute each picture's features once and keep them on disk; needs a frozen vision tower."""
    gradient_checkpointing: bool = False
    """Recompute decoder blocks in the backward pass instead of keeping their activations."""
    workers: int = Field(default=-1, ge=-1)
    """Processes that read and decode ahead; 0: none. -1: as many as there are processors, at most 4, and none with
    `feature_cache`. Batches do not depend on it."""


class Output(Config):
    """Where results go and how often the run can be resumed from."""

    dir: Path
    """Directory of this run: `model/`, `checkpoint/`, `metrics.jsonl`, `recipe.yaml`."""
    checkpoint_every_s: float = Field(default=600.0, gt=0)
    """Seconds between checkpoints; one is also written when the run is asked to stop."""
    checkpoint_every_steps: int = Field(default=0, ge=0)
    """Steps between checkpoints, in addition; 0: by time alone."""


class Recipe(Config):
    """One training stage, whole: saved resolved beside its results."""

    name: str
    """What this run is called in logs and reports."""
    seed: int = Field(default=0, ge=0)
    """Seed of initialisation and data order."""
    model: ModelSource
    """Where the model comes from."""
    stage: Stage
    """Which parts learn, and how fast."""
    data: Data
    """What it is trained on."""
    batch: Batch
    """Size of an optimizer step."""
    budget: Budget
    """How long it lasts."""
    optim: Optim = Optim()
    """AdamW and its schedule."""
    compute: Compute = Compute()
    """Numerics and memory."""
    output: Output
    """Where results go."""

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        problems = []
        wanted, other = ("rows", "samples") if self.data.packing == "rows" else ("samples", "rows")
        if not getattr(self.batch, wanted) or getattr(self.batch, other):
            problems.append(
                f"data.packing is {self.data.packing!r}, so batch.{wanted} states the batch and batch.{other} must be 0"
            )
        size = self.batch.rows or self.batch.samples
        if size and size % self.batch.micro:
            problems.append(f"batch.{wanted}={size} is not a multiple of batch.micro={self.batch.micro}")
        if self.compute.feature_cache and "vision" in self.stage.tune:
            problems.append("compute.feature_cache needs a frozen tower, but stage.tune names vision")
        if problems:
            raise ValueError("; ".join(problems))
        return self
