"""Configuration of the training tasks, and the registry of their kinds; needs no torch."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeAlias

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
from typing_extensions import Self

from vqd_scale.core.config import Config, kind_or
from vqd_scale.core.safe_json import Size
from vqd_scale.data.config import DecodeConfig
from vqd_scale.data.transforms import CenterCrop, Transform
from vqd_scale.diffusion.config import ObjectiveConfig, Paper, Schedule, Times, Uniform
from vqd_scale.evaluation.config import Inception
from vqd_scale.nn.config import AutoregressiveConfig, DenoiserConfig, NetworkConfig
from vqd_scale.text.config import TextConfig, Tower
from vqd_scale.tokenizers.config import (
    CHAIN,
    DiscriminatorConfig,
    FSQConfig,
    PerceptualConfig,
    TamingGumbelConfig,
    TamingVQConfig,
    VQGANConfig,
)
from vqd_scale.training.config import (
    AdamWConfig,
    ConstantRate,
    OptimConfig,
    RunConfig,
    StartConfig,
    ValidationConfig,
)

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from vqd_scale.core.world import World
    from vqd_scale.training.tasks.autoencoding import AutoencodingTask
    from vqd_scale.training.tasks.autoregression import AutoregressionTask
    from vqd_scale.training.tasks.denoising import DenoisingTask
    from vqd_scale.training.tasks.refitting import RefitTask

_LATENTS_PER_CODE = 16
"""Number of latents per code for the k-means initialization."""


class TokenRunConfig(RunConfig):
    """Configuration of a run on token shards."""

    tokenizer: Path
    """Bundle of the tokenizer that produced the token shards; copied into the trained model's bundle."""
    text: TextConfig | None = Tower()
    """Caption encoder; ``null`` for a network without text condition."""
    init_from: StartConfig | None = None
    """Trained model that initializes the weights."""
    embedding_init_std: NonNegativeFloat = 0.0
    """If not zero, token embeddings and head are initialized from the tokenizer's codebook, scaled to this
    standard deviation."""
    condition_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of samples trained with the null condition, for classifier-free guidance."""


class TrainConfig(TokenRunConfig):
    """Configuration for training a denoiser on token shards.

    >>> from vqd_scale import TrainConfig
    >>> data = {"path": "tokens", "global_batch_size": 256}
    >>> config = TrainConfig(run="runs/mine", total_images=1_000_000, data=data, tokenizer="tokenizer")
    >>> config.denoiser.layers, config.diffusion.kind, config.optim.lr
    (19, 'paper', 0.0002)
    """

    kind: Literal["denoising"] = "denoising"
    title: ClassVar[str] = "train denoiser"
    denoiser: NetworkConfig = DenoiserConfig()
    """Architecture of the network: image transformer or VQ-DDM's U-Net."""
    diffusion: Schedule = Paper()
    """Noise schedule."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """Weights of the objective's terms."""
    timestep_sampler: Times = Uniform()
    """Distribution from which training samples timesteps."""

    def build(self, world: "World") -> "DenoisingTask":
        """Return the task."""
        from vqd_scale.training.tasks.denoising import DenoisingTask

        return DenoisingTask(self, world)


class AutoregressionConfig(TokenRunConfig):
    """Configuration for training an autoregressive transformer on token shards."""

    kind: Literal["autoregression"] = "autoregression"
    title: ClassVar[str] = "train VQ-AR"
    network: AutoregressiveConfig = AutoregressiveConfig()
    """Architecture of the network."""

    def build(self, world: "World") -> "AutoregressionTask":
        """Return the task."""
        from vqd_scale.training.tasks.autoregression import AutoregressionTask

        return AutoregressionTask(self, world)


TokenRun: TypeAlias = TrainConfig | AutoregressionConfig
TOKEN_RUNS = (TrainConfig, AutoregressionConfig)
"""Runs on token shards by kind; a new one is one class here, whose `build` returns the `Task`."""


class AdversarialConfig(Config):
    """Patch discriminator and the weight of its loss."""

    start_images: NonNegativeInt = 250_000
    """Images before the adversarial loss starts; earlier reconstructions are too poor for it to help."""
    weight: NonNegativeFloat = 0.8
    """Weight of the adversarial loss, as a multiple of the adaptive weight (VQ-GAN eq. 7), which makes its
    gradient as large as that of all other losses."""
    adaptive: bool = True
    """Compute the adaptive weight at every step; if false, the adaptive weight is 1."""
    network: DiscriminatorConfig = DiscriminatorConfig()
    """Architecture of the discriminator."""
    optim: OptimConfig = AdamWConfig(lr=4.5e-6, betas=(0.5, 0.9), weight_decay=0.0, schedule=ConstantRate())
    """Optimizer of the discriminator."""


class GANLossesConfig(Config):
    """Perceptual and adversarial losses, in addition to the pixel loss."""

    perceptual: PerceptualConfig | None = None
    """Perceptual distance; disabled if not given."""
    perceptual_weight: NonNegativeFloat = 1.0
    """Weight of the perceptual distance, relative to the pixel loss. Lower it if textures are favored over
    exact colors."""
    discriminator: AdversarialConfig | None = None
    """Discriminator and its loss; disabled if not given."""


TrainedConfig = Annotated[
    Annotated[VQGANConfig, Tag("vqgan")]
    | Annotated[TamingVQConfig, Tag("taming_vq")]
    | Annotated[TamingGumbelConfig, Tag("taming_gumbel")]
    | Annotated[FSQConfig, Tag("fsq")],
    Discriminator(kind_or("vqgan")),
]
"""Autoencoder by type of codebook: EMA codebook, codebook trained by gradients, Gumbel softmax, FSQ."""


class ReconstructionConfig(Config):
    """Weights of the reconstruction loss terms."""

    l1: NonNegativeFloat = 1.0
    """Weight of the mean absolute error."""
    l2: NonNegativeFloat = 0.0
    """Weight of the mean squared error."""
    commitment: NonNegativeFloat = 0.25
    """Weight of the commitment loss, the squared distance of the latents to their codes (beta of VQ-VAE).
    Raise it if latents drift away from the codebook."""
    codebook: NonNegativeFloat = 1.0
    """Weight of the codebook loss, the same distance with gradients to the codes; gradient-trained codebooks
    only."""
    kl: NonNegativeFloat = 5e-4
    """Weight of KL(q(code) ‖ uniform); Gumbel tokenizers only."""

    def pixels(
        self, reconstructions: "Tensor", signal: "Tensor"
    ) -> "tuple[Float[Tensor, ' batch'], Float[Tensor, ' batch']]":
        """Return each sample's pixel loss and mean squared error, for images [batch, 3, height, width]."""
        error = (reconstructions - signal).flatten(1)
        squared = error.square().mean(dim=1)
        return self.l1 * error.abs().mean(dim=1) + self.l2 * squared, squared


class TemperatureConfig(Config):
    """Cosine annealing of the Gumbel-softmax temperature."""

    first: PositiveFloat = 1.0
    """Initial temperature."""
    last: PositiveFloat = 1 / 16
    """Final temperature; VQ-GAN's Gumbel model ends at 1/16. Lower it for codes closer to one-hot vectors."""
    anneal_images: PositiveInt = 1_000_000
    """Length of the annealing in images."""

    def at(self, images: int) -> float:
        """Return the temperature after ``images`` images."""
        progress = min(1.0, images / self.anneal_images)
        return self.last + (self.first - self.last) * (1 + math.cos(math.pi * progress)) / 2


class TokenizerValidationConfig(ValidationConfig):
    """Validation images, and the networks for the metrics of the report at the end of the run."""

    inception: Inception | None = None
    """Inception weights for rFID; without them the report has no rFID. Set it to compare with published
    tokenizers."""


class AutoencodingConfig(RunConfig):
    """Configuration common to all runs that train a tokenizer."""

    transform: Transform = CenterCrop()
    """Crop and resize of an image to a square."""
    decode: DecodeConfig = DecodeConfig()
    """Image decoding."""
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    """Weights of the reconstruction loss terms."""
    losses: GANLossesConfig = GANLossesConfig()
    """Perceptual and adversarial losses."""
    dead_code_reset_every_images: PositiveInt | None = None
    """Images between two dead-code resets, which replace dead codes by latents of the current batch; disabled
    if not given. EMA codebooks only."""
    # Configurations are frozen, so a narrower type is safe.
    validation: TokenizerValidationConfig | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Validation set, evaluated periodically with the EMA weights and in ``report.json`` at the end."""


class TokenizerTrainConfig(AutoencodingConfig):
    """Configuration for training a VQ tokenizer on image shards."""

    kind: Literal["tokenizer"] = "tokenizer"
    title: ClassVar[str] = "train tokenizer"
    vqgan: TrainedConfig = VQGANConfig()
    """Architecture of the tokenizer and type of its codebook."""
    temperature: TemperatureConfig = TemperatureConfig()
    """Temperature schedule; Gumbel codebooks only."""
    codebook_warmup_images: NonNegativeInt = 10_000
    """Images before an EMA codebook is initialized by k-means and used. Until then the model is a plain
    autoencoder. Other codebooks are used from the start."""
    dead_code_reset_every_images: PositiveInt | None = 5_000
    """Images between two dead-code resets; disabled if not given. EMA codebooks only."""

    @property
    def pool_images(self) -> int:
        """Number of images whose latents initialize an EMA codebook; 0 for other codebooks."""
        if not isinstance(self.vqgan, VQGANConfig):
            return 0
        latents = max(1, self.transform.size // self.vqgan.factor) ** 2
        return -(-_LATENTS_PER_CODE * self.vqgan.codebook_size // latents)

    @model_validator(mode="after")
    def _images_fit(self) -> Self:
        if self.transform.size % self.vqgan.factor:
            raise ValueError(
                f"transform.size {self.transform.size} is not a multiple of the factor {self.vqgan.factor}"
            )
        return self

    @model_validator(mode="after")
    def _codebook_is_initialized(self) -> Self:
        if not isinstance(self.vqgan, VQGANConfig):
            return self
        if self.pool_images > self.codebook_warmup_images:
            raise ValueError(
                f"codebook_warmup_images: initializing {self.vqgan.codebook_size} codes takes the latents of "
                f"{self.pool_images} images, more than {self.codebook_warmup_images}; lengthen the warmup"
            )
        if self.total_images <= self.codebook_warmup_images:
            raise ValueError(
                f"total_images: the run ends at {self.total_images}, before the codebook's warmup ends at "
                f"{self.codebook_warmup_images}; train longer, or shorten codebook_warmup_images"
            )
        return self

    def build(self, world: "World") -> "AutoencodingTask":
        """Return the task."""
        from vqd_scale.training.tasks.autoencoding import AutoencodingTask

        return AutoencodingTask(self, world)


class PoolConfig(Config):
    """Pool of encoder outputs for k-means: a uniform sample of all outputs of the pool's images."""

    size: int = Field(default=20_000, ge=1, le=1 << 24)
    """Number of vectors (P), much larger than the number of codes. VQ-DDM's code uses 20,000; 100,000 is
    worth the time."""
    images: int = Field(default=20_000, ge=1, le=1 << 24)
    """Number of images encoded for the pool, the first ones of the run."""
    chain_length: PositiveInt = CHAIN
    """Length of the Markov chains of AFK-MC² seeding. Raise it for seeds closer to those of k-means++; time
    grows in proportion."""


class RefitConfig(AutoencodingConfig):
    """Configuration for rebuilding a trained tokenizer's codebook and fine-tuning its decoder."""

    kind: Literal["refit"] = "refit"
    title: ClassVar[str] = "refit tokenizer"
    tokenizer: Path
    """Bundle of the tokenizer whose codebook is replaced."""
    codebook_size: Size = 1024
    """Number of codes in the new codebook (K')."""
    pool: PoolConfig = PoolConfig()
    """Pool of encoder outputs from which the new codes are computed."""

    @model_validator(mode="after")
    def _pool_is_larger(self) -> Self:
        if self.codebook_size > self.pool.size:
            raise ValueError(
                f"codebook_size {self.codebook_size} cannot be placed at a pool of {self.pool.size} vectors"
            )
        return self

    def build(self, world: "World") -> "RefitTask":
        """Return the task."""
        from vqd_scale.training.tasks.refitting import RefitTask

        return RefitTask(self, world)


TokenizerRun: TypeAlias = TokenizerTrainConfig | RefitConfig
TOKENIZER_RUNS = (TokenizerTrainConfig, RefitConfig)
"""Runs on image shards by kind; a new one is one class here, whose `build` returns the `Task`."""
