"""Schema of recipes: typed fields of a training run. The docstring below a field is its help and documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vila.core.vision_spec import ImageMode

Module = Literal["vision", "projector", "llm"]


class Conflict(ValueError):
    """Values of several fields exclude each other. fields: their names inside the section that is validated."""

    def __init__(self, text: str, *fields: str) -> None:
        super().__init__(text)
        self.fields = fields


class Config(BaseModel):
    """Base of all recipe sections: frozen; unknown keys are errors; docstrings below fields become help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelSource(Config):
    """Initial model of a stage: a whole checkpoint (`path`), or a new model of an LLM and a vision tower."""

    path: str = ""
    """Directory of a whole model, usually the output of the previous stage. Excludes `llm` and `vision`."""
    llm: str = ""
    """Directory or hub id of the LLM and its tokenizer, for a new model."""
    vision: str = ""
    """Directory or hub id of the vision tower, for a new model."""
    projector: str = "mlp2x_gelu"
    """Projector of a new model: `linear`, `mlpNx_gelu` (N linear layers with GELU between), or `mlp_downsample`, which
    merges 2 x 2 patches into one token."""
    projector_init: Literal["random", "calibrated"] = "random"
    """Initialisation of a new projector. `calibrated`: input channels are standardised with statistics of the first
    images of the data, and the output is scaled to the LLM's embeddings."""
    select_layer: int = -2
    """Index of the hidden state of the tower to use. 0: embeddings; -1: output of the last block, before the final
    norm."""
    select_feature: Literal["patch", "cls_patch"] = "patch"
    """`patch`: without the class token; `cls_patch`: all tokens."""
    image_size: int = 336
    """Side of the square input image of the tower, in pixels."""
    image_mode: ImageMode | None = None
    """How an image is made square. `pad`: pad with the mean colour; `resize`: resize, ignoring the aspect ratio;
    `square`: centre crop. null: setting of the checkpoint at `path`, `pad` for a new model."""
    exif_orientation: bool | None = None
    """Apply the EXIF orientation of images; stored with the model and used at inference. Upstream ignores EXIF.
    null: setting of the checkpoint at `path`, true for a new model."""
    template: str = ""
    """Conversation template, stored with the model and used at inference. Empty: template of the checkpoint at `path`,
    `vicuna_v1` for a new model."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelSource:
        if bool(self.path) == bool(self.llm or self.vision):
            raise Conflict("give either path, or llm and vision", "path", "llm", "vision")
        if not self.path and not (self.llm and self.vision):
            raise Conflict("llm and vision must be given together", "llm", "vision")
        return self


class Lora(Config):
    """LoRA adapters of the LLM (arXiv 2106.09685), trained instead of its weights; see `stage.lora`."""

    rank: int = Field(default=0, ge=0)
    """Rank of the adapters; 0: no adapters. Upstream uses 64."""
    alpha: float = Field(default=16.0, gt=0)
    """The output of an adapter is scaled by `alpha / rank`."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout probability of the input of an adapter."""
    targets: tuple[str, ...] = ()
    """Names of Linear layers that get an adapter, such as `q_proj`. Empty: all of the LLM except its output head."""
    bits: Literal[4, 8, 16] = 16
    """Bits per weight of the frozen LLM. 4 (NF4) and 8 need bitsandbytes and CUDA (QLoRA, arXiv 2305.14314)."""


class Stage(Config):
    """Trainable modules and learning rates."""

    tune: tuple[Module, ...] = Field(min_length=1)
    """Trainable modules. The others are frozen and stay in eval mode."""
    lr: float = Field(gt=0, lt=1)
    """Peak learning rate, reached after warm-up."""
    lr_projector: float | None = Field(default=None, gt=0, lt=1)
    """Peak learning rate of the projector; null: `lr`."""
    llm_parts: tuple[str, ...] = ()
    """Trainable modules of each decoder block, such as `self_attn`; needs llm in `tune`. Empty: the whole LLM."""
    tune_embeddings: bool = True
    """Whether token embeddings and output head are trainable, if `tune` names llm."""
    lora: Lora = Lora()
    """LoRA adapters, trained instead of the LLM's own weights; needs llm in `tune`."""

    @model_validator(mode="after")
    def _adapters(self) -> Stage:
        if self.lora.rank and "llm" not in self.tune:
            raise Conflict("lora.rank needs llm in tune", "lora.rank", "tune")
        if self.lora.rank and "vision" in self.tune:
            raise Conflict("lora.rank excludes vision in tune", "lora.rank", "tune")
        if self.lora.rank and self.llm_parts:
            text = "llm_parts excludes adapters; set lora.targets, or lora.rank=0"
            raise Conflict(text, "lora.rank", "llm_parts")
        return self


class MixtureEntry(Config):
    """One data set of the mixture."""

    format: str
    """Name of a dataset format, such as `messages` or `llava_json`."""
    path: str
    """File or directory that the format reads."""
    image_root: str = ""
    """Base directory of relative image paths. Empty: the directory of `path`."""
    repeat: float = Field(default=1.0, gt=0)
    """Passes over the data set per epoch of the mixture; 0.5: half of its samples."""
    weight: float | None = Field(default=None, gt=0)
    """Sampling weight relative to the other data sets, instead of `repeat`. Either all data sets have a weight or none.
    An epoch then has as many samples as all data sets together."""
    max_samples: int | None = Field(default=None, gt=0)
    """Size of a fixed pseudo-random subset to use; null: all samples."""
    split: Literal["train", "val"] = "train"
    """Part of the data set to use: `val` is the held-out part, see `val_fraction`."""
    val_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of samples held out as `val`; the choice depends only on the index of a sample."""
    template: str = ""
    """Conversation template of this data set; empty: `data.template`."""
    image_mode: ImageMode | None = None
    """How images of this data set are made square, see `model.image_mode`; null: as the model."""
    options: dict[str, Any] = {}
    """Options of the format, see `docs/data.md`."""

    @model_validator(mode="after")
    def _one_share(self) -> MixtureEntry:
        if self.weight is not None and self.repeat != 1:
            raise Conflict("give repeat or weight, not both", "repeat", "weight")
        if self.split == "val" and not self.val_fraction:
            raise Conflict("split=val needs a val_fraction > 0", "split", "val_fraction")
        return self


class Data(Config):
    """Training data and its packing."""

    mixture: tuple[MixtureEntry, ...] = Field(min_length=1)
    """Data sets of the stage. An epoch has each of them `repeat` times, or samples them by `weight`. An entry
    `{mixture: NAME}` is replaced by the list of that name in `data.mixtures`; so is text such as `a+b*2`."""
    mixtures: dict[str, tuple[MixtureEntry, ...]] = {}
    """Named lists of data sets for `data.mixture`, which are substituted when the recipe is loaded."""
    template: str = ""
    """Conversation template of the stage; empty: template of the model."""
    max_length: int = Field(gt=8)
    """Maximum number of tokens of a packed sequence, image tokens included."""
    max_images: int = Field(default=0, ge=0)
    """Maximum number of images of a packed sequence, which bounds the memory of a step; 0: no limit."""
    packing: Literal["rows", "grouped", "none"] = "rows"
    """`rows`: pack whole samples into sequences of `max_length`; they do not attend to each other. `none`: one padded
    sample per sequence. `grouped`: as `none`, with samples of similar length in a step."""
    look_ahead: int = Field(default=64, ge=1)
    """Number of samples that packing chooses from when it fills a sequence."""
    overlong: Literal["error", "drop", "truncate"] = "error"
    """Policy for samples longer than `max_length`. `error`: stop; `drop`: skip the sample; `truncate`: remove whole
    question-answer pairs from its end. Skipped and truncated samples are counted."""
    max_faults: int = Field(default=0, ge=0)
    """Maximum number of unreadable samples. They are skipped and listed in `faults.jsonl`; one more stops the run. A
    sample is counted once, also over several epochs and resumed runs."""

    @model_validator(mode="after")
    def _weights(self) -> Data:
        weighted = [entry.weight is not None for entry in self.mixture]
        if any(weighted) and not all(weighted):
            raise ValueError(f"mixture.{weighted.index(False)} has no weight; give one to all data sets or to none")
        return self


class Batch(Config):
    """Size of an optimizer step."""

    rows: int = Field(default=0, ge=0)
    """Global batch size in packed sequences (`packing: rows`): the sum over ranks and gradient accumulation."""
    samples: int = Field(default=0, ge=0)
    """Global batch size in samples (`packing: none` or `grouped`): the sum over ranks and gradient accumulation."""
    micro: int = Field(default=1, ge=1)
    """Micro-batch: sequences per forward pass on one rank. Reduced if the batch of a rank is not a multiple of it."""


class Optim(Config):
    """AdamW and its learning-rate schedule: linear warm-up, then cosine decay to zero."""

    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    """Fraction of the steps used for warm-up."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; not applied to norms and biases."""
    beta1: float = Field(default=0.9, gt=0, lt=1)
    """Decay rate of the first moment."""
    beta2: float = Field(default=0.999, gt=0, lt=1)
    """Decay rate of the second moment."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Maximum gradient norm over all parameters (gradient clipping)."""


class Budget(Config):
    """Length of the stage: epochs or tokens. Exactly one of them is given."""

    epochs: float = Field(default=0.0, ge=0)
    """Number of epochs of the mixture."""
    tokens: int = Field(default=0, ge=0)
    """Number of training tokens, image tokens included; rounded up to whole steps."""
    max_bad_steps: int = Field(default=0, ge=0)
    """Maximum number of steps with a non-finite loss or gradient. They are skipped, with their samples listed in
    `bad_steps.jsonl`; one more stops the run."""

    @model_validator(mode="after")
    def _one_unit(self) -> Budget:
        if bool(self.epochs) == bool(self.tokens):
            raise Conflict("give exactly one of epochs and tokens", "epochs", "tokens")
        return self


class Compute(Config):
    """Precision, memory and parallelism."""

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of weights and activations in the forward pass; master weights are float32. `auto`: bfloat16 if the device
    supports it."""
    feature_cache: bool = False
    """Cache the vision features of each image on disk; needs a frozen vision tower."""
    gradient_checkpointing: bool = False
    """Recompute the activations of decoder blocks in the backward pass, to save memory."""
    checkpoint_every: int = Field(default=1, ge=1)
    """With `gradient_checkpointing`: recompute only every Nth decoder block."""
    sharding: Literal["full", "hybrid", "replicate"] = "full"
    """With several ranks. `full`: shard weights, gradients and optimizer state over all ranks (FSDP2); `hybrid`: shard
    over the ranks of a node and replicate over nodes (HSDP); `replicate`: whole model on every rank, gradients are
    all-reduced (DDP)."""
    reshard: bool = True
    """With sharding: free the gathered weights of a block after its forward pass. false: keep them for the backward
    pass, for less communication and more memory."""
    compile: bool = False
    """Compile the decoder blocks with `torch.compile`."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Timeout of collective operations between ranks, in seconds."""
    workers: int = Field(default=-1, ge=-1)
    """Data loader processes per rank; 0: load in the training process. -1: the number of CPUs, at most 4, and 0 with
    `feature_cache`. Batches do not depend on it."""


class Output(Config):
    """Output directory and checkpoints."""

    dir: Path
    """Directory of the run: `model/`, `checkpoint/`, `metrics.jsonl`, `recipe.yaml`."""
    checkpoint_every_s: float = Field(default=600.0, gt=0)
    """Seconds between checkpoints. A checkpoint is also written when the run is interrupted."""
    checkpoint_every_steps: int = Field(default=0, ge=0)
    """Steps between checkpoints, in addition to `checkpoint_every_s`; 0: only by time."""
    keep_last: int = Field(default=2, ge=1)
    """Number of newest checkpoints to keep. With 1 there is no fallback if that one is damaged."""
    keep_best: bool = False
    """Also keep the checkpoint with the best evaluation score; needs `monitor.eval_every_steps`."""
    async_save: bool = True
    """Write checkpoints in the background, during training."""
    layout: str = "native"
    """Checkpoint layout of the trained model, see `docs/checkpoints.md`."""


class Prompt(Config):
    """A question that the model answers during training."""

    text: str
    """The question."""
    image: str = ""
    """Path of the image of the question; empty: none."""


class Monitor(Config):
    """Logging and evaluation during training. `metrics.jsonl` and `report.html` are always written."""

    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Experiment trackers that also receive the metrics; each needs its package."""
    project: str = "vila"
    """Project name for wandb and trackio."""
    prompts: tuple[Prompt, ...] = ()
    """Questions that the model answers during training; the answers are in the report."""
    prompt_every_steps: int = Field(default=0, ge=0)
    """Steps between answers to `prompts`; 0: only at the end."""
    eval_every_steps: int = Field(default=0, ge=0)
    """Steps between evaluations; 0: none."""
    eval_data: str = ""
    """Directory of the data of `eval_benchmark`."""
    eval_benchmark: str = "easy_vqa"
    """Benchmark to evaluate during training."""
    eval_items: int = Field(default=200, ge=1)
    """Number of questions per evaluation, a fixed subset."""
    peak_tflops: float = Field(default=0.0, ge=0)
    """Peak throughput of one device in TFLOP/s, for model FLOPs utilisation (MFU). 0: derived from the name of the
    device; MFU is not shown for unknown devices."""


class Recipe(Config):
    """All settings of one training stage; saved with all defaults in the output directory."""

    name: str
    """Name of the run in logs and reports."""
    seed: int = Field(default=0, ge=0)
    """Seed of initialisation and data order."""
    model: ModelSource
    """Initial model."""
    stage: Stage
    """Trainable modules and learning rates."""
    data: Data
    """Training data and its packing."""
    batch: Batch
    """Size of an optimizer step."""
    budget: Budget
    """Length of the stage."""
    optim: Optim = Optim()
    """AdamW and its learning-rate schedule."""
    compute: Compute = Compute()
    """Precision, memory and parallelism."""
    monitor: Monitor = Monitor()
    """Logging and evaluation during training."""
    output: Output
    """Output directory and checkpoints."""

    @property
    def needs_images(self) -> str:
        """Reason why the stage needs images in every step; empty if it can train on text alone."""
        if "llm" not in self.stage.tune:
            return f"stage.tune is {', '.join(self.stage.tune)}, which gets no gradient from text"
        if self.model.projector_init == "calibrated" and not self.model.path:
            return "model.projector_init=calibrated measures the images of the data"
        return ""

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        packing = self.data.packing
        wanted, other = ("rows", "samples") if packing == "rows" else ("samples", "rows")
        is_batch_wrong = not getattr(self.batch, wanted) or getattr(self.batch, other)
        rules = (
            (is_batch_wrong, f"data.packing={packing} needs batch.{wanted} > 0 and batch.{other}=0",
             "data.packing", f"batch.{wanted}", f"batch.{other}"),
            (self.compute.feature_cache and "vision" in self.stage.tune,
             "compute.feature_cache excludes vision in stage.tune", "compute.feature_cache", "stage.tune"),
            (self.stage.lora.rank and not self.model.path,
             "stage.lora needs model.path, the base model of the adapters", "stage.lora.rank", "model.llm"),
            (self.output.keep_best and not self.monitor.eval_every_steps,
             "output.keep_best needs monitor.eval_every_steps > 0", "output.keep_best", "monitor.eval_every_steps"),
        )  # fmt: skip
        conflicts = [Conflict(text, *fields) for is_broken, text, *fields in rules if is_broken]
        if conflicts:
            fields = dict.fromkeys(field for conflict in conflicts for field in conflict.fields)
            raise Conflict("; ".join(map(str, conflicts)), *fields)
        return self
