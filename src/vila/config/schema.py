"""The recipe: every field of a training run, typed, with the text that becomes its help below it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vila.core.vision_spec import ImageMode

Module = Literal["vision", "projector", "llm"]
Positive = Field(gt=0)


class Conflict(ValueError):
    """Values of several fields do not go together. fields: their names in the section that is checked."""

    def __init__(self, text: str, *fields: str) -> None:
        super().__init__(text)
        self.fields = fields


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
    """Projector between tower and LLM: `linear`, `mlpNx_gelu`, or `mlp_downsample`, which makes one token of 2 x 2."""
    projector_init: Literal["random", "calibrated"] = "random"
    """`calibrated` standardises each input channel over the first pictures of the data and scales the output to the
    LLM's embeddings."""
    select_layer: int = -2
    """Which of the tower's hidden states to use; 0: embeddings, -1: the last block's output before the final norm."""
    select_feature: Literal["patch", "cls_patch"] = "patch"
    """`patch` drops the class token, `cls_patch` keeps every token."""
    image_size: int = 336
    """Side of the square picture given to the tower, in pixels."""
    image_mode: ImageMode | None = None
    """How an image becomes square: `pad` with the mean colour, `resize` ignoring the aspect, `square` centre crop;
    null: as the checkpoint at `path` has it, `pad` for a new model."""
    exif_orientation: bool | None = None
    """Turn images upright as their EXIF says; stored with the model and used at inference. The original ignores it.
    null: as the checkpoint at `path` has it, true for a new model."""
    template: str = ""
    """Conversation template stored with the model and used at inference; empty: that of the checkpoint at `path`,
    `vicuna_v1` for a new model."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelSource:
        if bool(self.path) == bool(self.llm or self.vision):
            raise Conflict("give either path, or both llm and vision", "path", "llm", "vision")
        if not self.path and not (self.llm and self.vision):
            raise Conflict("llm and vision go together; one of them is missing", "llm", "vision")
        return self


class Lora(Config):
    """Low-rank adapters in the LLM (arXiv 2106.09685), learnt in its place; the projector learns beside them."""

    rank: int = Field(default=0, ge=0)
    """Rank of the adapters, 0 for none; the original trains 64."""
    alpha: float = Field(default=16.0, gt=0)
    """The product of an adapter is scaled by alpha / rank."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Share of an adapter's input that is dropped while it learns."""
    targets: tuple[str, ...] = ()
    """Names of the Linears that get one, such as `q_proj`; empty: all of the LLM but its head."""
    bits: Literal[4, 8, 16] = 16
    """Bits of the frozen LLM: 4 (NF4) and 8 need bitsandbytes and a CUDA device (QLoRA, arXiv 2305.14314)."""


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
    lora: Lora = Lora()
    """Adapters that learn instead of the LLM's own weights; needs `llm` in `tune`."""

    @model_validator(mode="after")
    def _adapters(self) -> Stage:
        if self.lora.rank and "llm" not in self.tune:
            raise Conflict("lora puts adapters into the LLM, but tune does not name llm", "lora.rank", "tune")
        if self.lora.rank and "vision" in self.tune:
            raise Conflict("lora leaves the tower as it is; take vision out of tune", "lora.rank", "tune")
        if self.lora.rank and self.llm_parts:
            raise Conflict(
                "give lora.targets or llm_parts, not both; lora.rank=0 trains without adapters",
                "lora.rank",
                "llm_parts",
            )
        return self


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
            raise Conflict("give repeat or weight, not both", "repeat", "weight")
        if self.split == "val" and not self.val_fraction:
            raise Conflict("split is val, but val_fraction is 0: nothing is held back", "split", "val_fraction")
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
    """Samples that may be unreadable: they are skipped and listed in `faults.jsonl`; one more stops the run. A sample
    counts once, however often epochs, repeats or a resumed run come back to it."""

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
    """Rows that one forward pass holds on one rank; less where a rank's share of the batch is no multiple of it."""


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
    max_bad_steps: int = Field(default=0, ge=0)
    """Steps whose loss or gradient is not finite that may be left out, their samples listed in `bad_steps.jsonl`; one
    more stops the run."""

    @model_validator(mode="after")
    def _one_unit(self) -> Budget:
        if bool(self.epochs) == bool(self.tokens):
            raise Conflict("give exactly one of epochs and tokens", "epochs", "tokens")
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
    checkpoint_every: int = Field(default=1, ge=1)
    """With `gradient_checkpointing`: recompute every nth block only, and keep what the others need."""
    sharding: Literal["full", "hybrid", "replicate"] = "full"
    """On several ranks: `full` deals weights, gradients and optimizer to all of them (FSDP2), `hybrid` to the ranks of
    one node, each node holding all, `replicate` gives every rank the whole model and shares gradients alone."""
    reshard: bool = True
    """With sharding: let go of a block's gathered weights after its forward pass and gather them again for the
    backward pass; false keeps them, for less traffic and more memory."""
    compile: bool = False
    """Compile the decoder blocks with `torch.compile`."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Seconds that a rank waits for the others before the run ends with an error."""
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
    keep_last: int = Field(default=2, ge=1)
    """Checkpoints that are kept, the newest ones; with 1 there is no other to resume from if it is damaged."""
    keep_best: bool = False
    """Also keep the checkpoint after the best evaluation; needs `monitor.eval_every_steps`."""
    async_save: bool = True
    """Write checkpoints while training goes on."""
    layout: str = "native"
    """Layout of the trained model."""


class Prompt(Config):
    """A question asked again and again while the model learns."""

    text: str
    """The question."""
    image: str = ""
    """Path of the picture that it is about; empty: none."""


class Monitor(Config):
    """What is looked at while the run goes on. `metrics.jsonl` and `report.html` are always written."""

    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Services that the metrics are also sent to; each is a package of its own."""
    project: str = "vila"
    """Project that wandb and trackio file the run under."""
    prompts: tuple[Prompt, ...] = ()
    """Questions whose answers go into the report."""
    prompt_every_steps: int = Field(default=0, ge=0)
    """Steps between answers to `prompts`; 0: at the end alone."""
    eval_every_steps: int = Field(default=0, ge=0)
    """Steps between evaluations; 0: none."""
    eval_data: str = ""
    """Directory that `eval_benchmark` reads."""
    eval_benchmark: str = "easy_vqa"
    """Benchmark that an evaluation runs."""
    eval_items: int = Field(default=200, ge=1)
    """Questions of an evaluation, a fixed choice."""
    peak_tflops: float = Field(default=0.0, ge=0)
    """Peak of one device in 1e12 operations a second, which utilisation (MFU) is measured against; 0: known from the
    device's name, or not shown."""


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
    monitor: Monitor = Monitor()
    """What is looked at meanwhile."""
    output: Output
    """Where results go."""

    @property
    def needs_images(self) -> str:
        """Why the stage cannot train on text alone; empty if it can."""
        if "llm" not in self.stage.tune:
            return f"stage.tune is {', '.join(self.stage.tune)}, which gets no gradient from text alone"
        if self.model.projector_init == "calibrated" and not self.model.path:
            return "model.projector_init=calibrated measures the images of the data"
        return ""

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        conflicts: list[Conflict] = []

        def refuse(text: str, *fields: str) -> None:
            conflicts.append(Conflict(text, *fields))

        packing = self.data.packing
        wanted, other = ("rows", "samples") if packing == "rows" else ("samples", "rows")
        if not getattr(self.batch, wanted) or getattr(self.batch, other):
            refuse(
                f"data.packing is {packing!r}, so batch.{wanted} states the batch and batch.{other} must be 0",
                "data.packing",
                f"batch.{wanted}",
                f"batch.{other}",
            )
        if self.compute.feature_cache and "vision" in self.stage.tune:
            refuse(
                "compute.feature_cache needs a frozen tower, but stage.tune names vision",
                "compute.feature_cache",
                "stage.tune",
            )
        if self.stage.lora.rank and not self.model.path:
            refuse(
                "stage.lora adapts a whole model; give model.path, so that the adapter can name its base",
                "stage.lora.rank",
                "model.llm",
            )
        if self.output.keep_best and not self.monitor.eval_every_steps:
            refuse(
                "output.keep_best needs evaluations; set monitor.eval_every_steps",
                "output.keep_best",
                "monitor.eval_every_steps",
            )
        if conflicts:
            fields = dict.fromkeys(field for conflict in conflicts for field in conflict.fields)
            raise Conflict("; ".join(map(str, conflicts)), *fields)
        return self
