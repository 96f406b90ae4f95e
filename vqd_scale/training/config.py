"""Configuration common to all training tasks, and the registry of optimizers and learning-rate schedules.

Periods and horizons are in images. Needs no torch.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from vqd_scale.core.atomic_io import Location
from vqd_scale.core.config import Config, kind_or
from vqd_scale.core.safe_json import Size
from vqd_scale.data.config import StreamConfig

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from vqd_scale.training.optim import PlateauFeedback

STACKS = "stacks-{:05d}.txt"
"""Name of the file in a run folder for the stacks of a rank that hung."""


Decay = Annotated[float, Field(ge=0, lt=1)]
"""Decay of a moment per step."""


class ZeroConfig(Config):
    """ZeRO sharding. Results are the same for all settings up to the order of summation."""

    stage: int = Field(default=3, ge=1, le=3)
    """ZeRO stage: 1 shards the optimizer state, 2 also the gradients, 3 also the weights."""
    offload_optimizer: bool = False
    """Keep the optimizer state and run the optimizer step on the host (CPU offload)."""
    hpz_partition_size: PositiveInt = 1
    """Stage 3: number of ranks, usually the ranks of a node, that share a secondary partition of the weights.
    The backward pass then gathers within the node (hpZ of ZeRO++, arXiv 2306.10209); 1 disables it."""

    @model_validator(mode="after")
    def _second_copies_are_of_spread_weights(self) -> "ZeroConfig":
        if self.hpz_partition_size > 1 and self.stage < 3:
            raise ValueError(f"hpz_partition_size {self.hpz_partition_size} needs stage 3, not {self.stage}")
        return self


class EngineConfig(Config):
    """Sharding, precision and execution of the model."""

    zero: ZeroConfig = ZeroConfig()
    """ZeRO sharding."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Compute dtype of the network. Master weights and optimizer moments are always float32. On a CPU with
    only AVX2, a bf16 step takes nine times as long; a warning reports it."""
    gradient_accumulation_steps: Size = 1
    """Micro-batches per rank and step; a larger number needs less memory."""
    param_persistence_threshold: NonNegativeInt = 100_000
    """Stage 3: parameters with fewer elements stay unsharded; their optimizer state is still sharded."""
    bucket_size: PositiveInt = 50_000_000
    """Number of elements per gather or reduce message."""
    compile: bool = False
    """Compile each block with torch.compile: minutes at the start, then faster steps."""
    deterministic: bool = False
    """On GPUs, use deterministic algorithms, so runs are reproducible on the same number of the same GPUs;
    slower. A warning names operations without a deterministic version. CPU runs are always reproducible."""


class RateSchedule(Config):
    """Base of the learning-rate schedules."""

    def multiplier(self, progress: float) -> float:
        """Return the factor on the peak learning rate after a fraction of the run."""
        return 1.0

    def feedback(self, batch: int) -> "PlateauFeedback | None":
        """Return the dependence of the learning rate on the loss; ``None`` for a function of images alone."""
        return None


class ConstantRate(RateSchedule):
    """Constant learning rate."""

    kind: Literal["constant"] = "constant"


class Cooldown(RateSchedule):
    """Constant learning rate, then linear decay to zero."""

    kind: Literal["cooldown"] = "cooldown"
    cooldown_fraction: float = Field(default=0.2, gt=0, le=1)
    """Fraction of the run, at its end, over which the learning rate decays."""

    def multiplier(self, progress: float) -> float:
        """Return the factor on the peak learning rate after a fraction of the run."""
        return min(1.0, (1 - progress) / self.cooldown_fraction)


class Cosine(RateSchedule):
    """Cosine decay from the peak learning rate to zero."""

    kind: Literal["cosine"] = "cosine"

    def multiplier(self, progress: float) -> float:
        """Return the factor on the peak learning rate after a fraction of the run."""
        return (1 + math.cos(math.pi * progress)) / 2


class Plateau(RateSchedule):
    """Learning rate reduced on a loss plateau, as in VQ-Diffusion's training.

    The loss is the mean over the global batch, so all ranks take the same decision. It is smoothed, so one
    low batch loss does not become the best. Observation starts after the warmup.
    """

    kind: Literal["plateau"] = "plateau"
    factor: float = Field(default=0.5, gt=0, lt=1)
    """Factor on the learning rate at a reduction."""
    patience_images: PositiveInt = 1_920_000
    """Images without improvement before a reduction (the released model: 60,000 steps of 32 images)."""
    threshold: float = Field(default=0.1, ge=0, lt=1)
    """Relative decrease of the loss that counts as an improvement."""
    minimum: NonNegativeFloat = 1e-6
    """Lowest learning rate after reductions."""
    smoothing_images: PositiveInt = 32_000
    """Half-life, in images, of the moving average of the loss."""

    def feedback(self, batch: int) -> "PlateauFeedback":
        """Return the reduction of the learning rate on a plateau."""
        from vqd_scale.training.optim import PlateauFeedback

        return PlateauFeedback(self, batch)


Schedule = Annotated[ConstantRate | Cooldown | Cosine | Plateau, Field(discriminator="kind")]
"""Learning-rate schedules by kind; a new schedule is one class here."""


class BatchScaling(Config):
    """Scaling of the learning rate with the global batch size."""

    reference_batch_size: PositiveInt
    """Global batch size for which ``lr`` is given."""
    rule: Literal["linear", "square-root"] = "square-root"
    """Linear for SGD-like noise (Goyal et al., 2017), square root for Adam (Malladi et al., 2022)."""

    def multiplier(self, batch: int) -> float:
        """Return the factor on the learning rate at a global batch size."""
        ratio = batch / self.reference_batch_size
        return ratio if self.rule == "linear" else math.sqrt(ratio)


class BaseOptimConfig(Config):
    """Learning rate, weight decay and gradient clipping, common to all optimizers."""

    moments: ClassVar[tuple[str, ...]]
    """Names of the optimizer's moments, each a tensor of the weights' shape; they are part of checkpoints."""

    lr: PositiveFloat = 2e-4
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.045
    """Decoupled weight decay, relative to the learning rate."""
    weight_decay_on: Literal["matrices", "everything"] = "matrices"
    """Parameters with weight decay. ``matrices``: matrices and convolution kernels. ``everything``: biases,
    norms, embeddings and the null condition as well."""
    gradient_clipping: PositiveFloat = 1.0
    """Maximum global gradient norm."""
    warmup_images: NonNegativeInt = 0
    """Length of the linear learning-rate warmup in images."""
    warmup_start_lr: NonNegativeFloat = 0.0
    """Learning rate at the start of the warmup."""
    schedule: Schedule = Cooldown()
    """Learning-rate schedule after the warmup."""
    lr_scaling: BatchScaling | None = None
    """If given, ``lr`` is scaled from ``reference_batch_size`` to ``data.global_batch_size``."""


class AdamWConfig(BaseOptimConfig):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    moments = ("exp_avg", "exp_avg_sq")
    betas: tuple[Decay, Decay] = (0.9, 0.96)
    """Decays of the first and second moment per step."""

    def build(self, groups: "list[dict[str, Any]]") -> "Optimizer":
        """Return the optimizer of parameter groups."""
        from torch.optim import AdamW

        # Fused: one pass over weights, gradients and moments instead of ten.
        return AdamW(groups, lr=self.lr, betas=self.betas, fused=True)


class LionConfig(BaseOptimConfig):
    """Lion (Chen et al., arXiv 2302.06675): one moment, half the optimizer state of AdamW.

    All elements are updated by the learning rate, so ``lr`` is 3 to 10 times smaller than for AdamW, and
    ``weight_decay`` larger by the same factor.
    """

    kind: Literal["lion"] = "lion"
    moments = ("exp_avg",)
    lr: PositiveFloat = 5e-5
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """Decays per step: of the moment in the update, and of the stored moment."""
    weight_decay: NonNegativeFloat = 0.18
    """Decoupled weight decay, relative to the learning rate."""

    def build(self, groups: "list[dict[str, Any]]") -> "Optimizer":
        """Return the optimizer of parameter groups."""
        from vqd_scale.training.lion import Lion

        return Lion(groups, lr=self.lr, betas=self.betas)


OptimConfig = Annotated[
    Annotated[AdamWConfig, Tag("adamw")] | Annotated[LionConfig, Tag("lion")],
    Discriminator(kind_or("adamw")),
]
"""Optimizers by kind; a new optimizer is one class here, whose `build` returns it."""


class EMAConfig(Config):
    """Decay of the EMA."""

    half_life_images: PositiveInt = 500_000
    """Half-life of the average in images."""
    warmup_ratio: PositiveFloat = 0.05
    """Upper bound of the half-life as a fraction of images seen. It discounts the initial weights early in a
    run."""


class SpikeConfig(Config):
    """Skipping of batches with a loss spike."""

    factor: float = Field(default=3.0, gt=1)
    """Skip threshold for a batch's loss, as a multiple of the moving average of the loss."""
    half_life_images: PositiveInt = 50_000
    """Half-life of the moving average in images. No batch is skipped before this many images."""
    max_consecutive: NonNegativeInt = 5
    """Maximum number of consecutive skipped batches; one more stops or rewinds the run."""
    rewind: bool = False
    """Rewind to the weights of the last checkpoint instead of stopping, and continue with the next data. At
    most one rewind per checkpoint. Set it for unattended runs."""


class HealthConfig(Config):
    """Health checks of a run."""

    nonfinite_gradient: Literal["stop", "skip"] = "stop"
    """Reaction to a nonfinite gradient. The weights are unchanged in either case."""
    max_consecutive_nonfinite: NonNegativeInt = 5
    """Maximum number of consecutive steps skipped for a nonfinite gradient; one more stops the run. Raise it
    to survive a longer defective part of the data."""
    spike: SpikeConfig | None = None
    """Skipping of loss spikes; disabled by default."""
    skip_batches: tuple[NonNegativeInt, ...] = ()
    """Batches to leave out, each named by the images seen before it, as a message about a batch names it."""
    checksum_every_images: PositiveInt = 1_000_000
    """Images between two comparisons of the weights across ranks (ZeRO stages 1 and 2 only)."""
    hang_seconds: PositiveFloat | None = 1800.0
    """Seconds without progress on any rank before every rank writes its stack traces and exits, to be
    restarted. Progress is a step, a batch of the validation, a sampling step, or a block of a file."""


class CheckpointConfig(Config):
    """Checkpoint period, retention and mirror."""

    every_images: PositiveInt = 500_000
    """Images between two checkpoints."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    keep_every_images: PositiveInt | None = None
    """Period in images of permanent checkpoints: the first one after each multiple is never deleted."""
    asynchronous: bool = True
    """Write in a thread while training continues; needs host memory for a copy of this rank's partition."""
    max_consecutive_failures: NonNegativeInt = 3
    """Maximum number of consecutive failed saves (disk full, no permission) before the run stops."""
    mirror: Location | None = None
    """Mirror, such as S3. Every checkpoint is copied to it, and the newest is fetched if the run folder has
    none."""


class StartConfig(Config):
    """Trained model that initializes the weights, for fine-tuning."""

    bundle: Path
    """Bundle of the model, or folder of the finished run that exported it."""
    init_missing: tuple[str, ...] = ()
    """Names of weights missing in the bundle, such as ``text.null``, which get the default initialization."""


class WandbConfig(Config):
    """Weights & Biases logging."""

    mode: Literal["online", "offline", "disabled"] = "offline"
    """W&B mode. ``offline`` writes to the run folder for a later ``wandb sync``, because compute nodes often
    have no internet access."""
    project: str = "vqd-scale"
    """W&B project; set it to group the runs of one experiment."""
    entity: str | None = None
    """W&B user or team; set it if runs belong to a team. Default: the entity of the login."""
    name: str | None = None
    """Name of the W&B run; defaults to the name of the run folder."""


class LogConfig(Config):
    """Metric logging; ``metrics.jsonl`` is always written."""

    every_images: PositiveInt = 10_000
    """Images between two log rows."""
    tensorboard: bool = False
    """Write TensorBoard event files to the subfolder ``tensorboard`` of the run folder."""
    wandb: WandbConfig | None = None
    """Weights & Biases logging; disabled if not given."""


class SampleImagesConfig(Config):
    """Sample images of the EMA weights, for monitoring a run."""

    prompts: tuple[str, ...] = Field(min_length=1)
    """Prompts, one image each."""
    every_images: PositiveInt = 1_000_000
    """Images between two grids; the last grid is at the end of the run."""
    steps: PositiveInt = 25
    """Number of sampling steps."""
    guidance: NonNegativeFloat = 3.0
    """Scale of classifier-free guidance."""
    seed: NonNegativeInt = 0
    """Seed of the samples."""


class ValidationConfig(Config):
    """Validation set and evaluation period."""

    path: Path
    """Validation shards, of the same kind as the training shards but with other samples."""
    every_images: PositiveInt = 1_000_000
    """Images between two evaluations; the last evaluation is at the end of the run."""
    samples: int = Field(default=2048, ge=1, le=1 << 24)
    """Maximum number of validation samples, taken in a fixed order."""
    batch_size: Size = 64
    """Batch size per rank."""


class RunConfig(Config):
    """Configuration of a run, extended by each task."""

    run: Path
    """Run folder. If it already contains this run, training resumes from the newest valid checkpoint."""
    total_images: PositiveInt
    """Length of the run in images, rounded up to a full batch."""
    data: StreamConfig
    """Training data."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of all randomness of the run: weights, data order, noise and condition dropout."""
    engine: EngineConfig = EngineConfig()
    """Sharding, precision and execution."""
    optim: OptimConfig = AdamWConfig()
    """Optimizer and learning rate."""
    ema: EMAConfig = EMAConfig()
    """Moving average of the weights, used for validation and export."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoint period, retention and mirror."""
    log: LogConfig = LogConfig()
    """Metric logging."""
    health: HealthConfig = HealthConfig()
    """Health checks."""
    validation: ValidationConfig | None = None
    """Validation set, evaluated periodically with the EMA weights."""
    sample_images: SampleImagesConfig | None = None
    """Image grid of fixed prompts, generated periodically; text-to-image models only."""
