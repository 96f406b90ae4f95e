"""Training task of a tokenizer: image reconstruction through a codebook."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int, UInt8
from pydantic import Discriminator, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Tag
from torch import Tensor, nn

from vqd_scale.core.config import Config, kind_or
from vqd_scale.core.errors import UserError
from vqd_scale.core.world import World
from vqd_scale.data.loading.batch import ImageBatch
from vqd_scale.data.loading.sample_readers import ImageSamples
from vqd_scale.data.shards.decode import DecodeConfig
from vqd_scale.data.transforms import CenterCrop, Transform
from vqd_scale.evaluation.extractors import Inception
from vqd_scale.models.bundle import save_tokenizer
from vqd_scale.nn.flops import cost_of
from vqd_scale.tokenizers.base import Draws, to_signal
from vqd_scale.tokenizers.codebook.quantizer import Codebook
from vqd_scale.tokenizers.convolutions import ResidualBlock
from vqd_scale.tokenizers.fsq import FSQConfig
from vqd_scale.tokenizers.registry import FullTokenizer, build_tokenizer
from vqd_scale.tokenizers.taming import TamingGumbel, TamingGumbelConfig, TamingVQConfig
from vqd_scale.tokenizers.vqgan import VQGANConfig
from vqd_scale.training.config import RunConfig
from vqd_scale.training.partition import Partition
from vqd_scale.training.tasks.base import Forward, Losses, mean_of
from vqd_scale.training.tasks.gan_losses import GANLosses, GANLossesConfig
from vqd_scale.training.validation import ValidationConfig

_POOL = "pool"
_CRITICS = "critics."
_LATENTS_PER_CODE = 16
"""Number of latents per code for the k-means initialization."""

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
    """Weight of the commitment loss, the squared distance of the latents to their codes (beta of VQ-VAE)."""
    codebook: NonNegativeFloat = 1.0
    """Weight of the codebook loss, the same distance with gradients to the codes; gradient-trained codebooks
    only."""
    kl: NonNegativeFloat = 5e-4
    """Weight of KL(q(code) ‖ uniform); Gumbel tokenizers only."""

    def pixels(
        self, made: Float[Tensor, "batch 3 height width"], signal: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Return each sample's pixel loss and mean squared error."""
        error = (made - signal).flatten(1)
        squared = error.square().mean(dim=1)
        return self.l1 * error.abs().mean(dim=1) + self.l2 * squared, squared


class TemperatureConfig(Config):
    """Cosine annealing of the Gumbel-softmax temperature."""

    first: PositiveFloat = 1.0
    """Initial temperature."""
    last: PositiveFloat = 1 / 16
    """Final temperature."""
    anneal_images: PositiveInt = 1_000_000
    """Length of the annealing in images."""

    def at(self, images: int) -> float:
        """Return the temperature after ``images`` images."""
        done = min(1.0, images / self.anneal_images)
        return self.last + (self.first - self.last) * (1 + math.cos(math.pi * done)) / 2


class TokenizerValidationConfig(ValidationConfig):
    """Validation images, and the networks for the metrics of the report at the end of the run."""

    inception: Inception | None = None
    """Inception weights for rFID; without them the report has no rFID."""


class AutoencodingConfig(RunConfig):
    """Configuration common to all runs that train a tokenizer."""

    transform: Transform = CenterCrop()
    """Crop and resize of an image to a square."""
    decode: DecodeConfig = DecodeConfig()
    """Image decoding."""
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    losses: GANLossesConfig = GANLossesConfig()
    """Perceptual and adversarial losses."""
    # Configurations are frozen, so a narrower type is safe.
    validation: TokenizerValidationConfig | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Validation set, evaluated periodically with the EMA weights and in ``report.json`` at the end."""


class TokenizerTrainConfig(AutoencodingConfig):
    """Configuration for training a VQ tokenizer on image shards."""

    kind: Literal["tokenizer"] = "tokenizer"
    vqgan: TrainedConfig = VQGANConfig()
    temperature: TemperatureConfig = TemperatureConfig()
    """Temperature schedule; Gumbel codebooks only."""
    codebook_warmup_images: NonNegativeInt = 10_000
    """Images before an EMA codebook is initialized by k-means and used. Until then the model is a plain
    autoencoder. Other codebooks are used from the start."""
    dead_code_reset_every_images: PositiveInt = 5_000
    """Images between two dead-code resets, which replace dead codes by latents of the current batch."""


class AutoencodingStep(nn.Module):
    """Module wrapped by the engine: images to losses in one forward.

    Args:
        vqgan: Autoencoder.
        weights: Weights of the loss terms.
        seed: Seed of the Gumbel code sampling.
    """

    def __init__(self, vqgan: FullTokenizer, weights: ReconstructionConfig, seed: int) -> None:
        super().__init__()
        self.vqgan = vqgan
        self.weights = weights
        self.seed = seed
        self.quantised = True

    def forward(
        self,
        images: UInt8[Tensor, "batch 3 height width"],
        slots: Int[Tensor, " batch"],
        temperature: Float[Tensor, ""],
    ) -> tuple[Tensor, ...]:
        """Return per-sample loss and reconstructions (differentiable), squared error, latents and codes."""
        signal = to_signal(images)
        output = (
            self.vqgan(signal, Draws(self.seed, slots), temperature)
            if isinstance(self.vqgan, TamingGumbel)
            else self.vqgan(signal, quantised=self.quantised)
        )
        loss, squared = self.weights.pixels(output.images, signal)
        loss = loss + self.weights.commitment * output.commitment
        if output.codebook is not None:
            loss = loss + self.weights.codebook * output.codebook
        if output.divergence is not None:
            loss = loss + self.weights.kl * output.divergence
        return loss, output.images, squared.detach(), output.latents.detach(), output.ids


class AutoencodingTask:
    """Implementation of `vqd_scale.training.tasks.base.Task` for a tokenizer.

    Args:
        config: Run configuration.
        world: This process's rank and device.

    Raises:
        UserError: The image size does not fit the autoencoder, the codebook warmup has too few latents for
            k-means, or the run ends before the codebook is used.
    """

    def __init__(self, config: TokenizerTrainConfig, world: World) -> None:
        self.config = config
        self.world = world
        self.units = (ResidualBlock,)
        torch.manual_seed(config.seed)
        self.vqgan: Any = build_tokenizer(config.vqgan)
        size = config.transform.size
        check_size(size, self.vqgan.factor)
        self.averaged: Codebook | None = (
            self.vqgan.quantize if isinstance(self.vqgan.quantize, Codebook) else None
        )
        self.pool_images = 0
        if self.averaged is not None:
            self.pool_images = -(-_LATENTS_PER_CODE * self.vqgan.codes // (size // self.vqgan.factor) ** 2)
            self._check_start()
        self.module = AutoencodingStep(self.vqgan, config.reconstruction, config.seed)
        self.critics = GANLosses(config.losses, config, world)
        self.pool: list[Tensor] = []
        self.latents: Tensor | None = None

    @property
    def forward_flops(self) -> int:
        """FLOPs of the autoencoder's forward pass."""
        return autoencoder_flops(self.config.vqgan, self.config.transform.size)

    def init_weights(self, partition: Partition) -> None:
        """Do nothing: a tokenizer keeps its default initialization."""

    def samples(self) -> ImageSamples:
        """Return images without captions as the kind of samples."""
        return ImageSamples(self.config.transform, decode=self.config.decode, captioned=False)

    def losses(self, forward: Forward, batch: ImageBatch, images: int) -> Losses:
        """Compute the reconstruction loss and update an EMA codebook with this batch's latents."""
        valid, pictures, slots = batch.valid, batch.images, batch.slots
        codebook = self.averaged
        self.module.quantised = codebook is None or images >= self.config.codebook_warmup_images
        if codebook is not None and self.module.quantised and self.pool:
            codebook.initialise(torch.cat(self.pool), self.config.seed)
            self.pool = []
        temperature = torch.tensor(self.config.temperature.at(images), device=self.world.device)
        loss, made, squared, latents, ids = forward(pictures, slots, temperature)
        statistics = {"squared_error": mean_of(squared, valid)}
        if self.module.quantised:
            kept = valid.repeat_interleave(len(ids) // len(valid))
            if codebook is not None:
                codebook.update(latents[kept], ids[kept], self.world.sum)
                self.latents = latents
            statistics["codes_used"] = torch.tensor([ids[kept].unique().numel(), 1.0])
        elif images >= self.config.codebook_warmup_images - self.pool_images:
            self.pool.append(self.world.concatenated(latents))
        added, more = judged_by(self.critics, self.config.reconstruction, made, pictures, valid, images)
        return Losses(loss if added is None else loss + added, statistics | more)

    def validate(self, forward: Forward, batch: ImageBatch) -> dict[str, Tensor]:
        """Compute the squared error of the reconstructions; a Gumbel tokenizer's codes are sampled."""
        temperature = torch.ones((), device=self.world.device)
        _, _, squared, _, _ = forward(batch.images, batch.slots, temperature)
        return {"squared_error": mean_of(squared, batch.valid)}

    def on_step_end(self, images: int) -> None:
        """Reset dead codes if due."""
        batch = self.config.data.global_batch_size
        turn = images // self.config.dead_code_reset_every_images
        if (
            self.averaged is None
            or self.latents is None
            or turn == (images - batch) // self.config.dead_code_reset_every_images
        ):
            return
        self.averaged.revive(self.world.concatenated(self.latents), self.config.seed, turn)

    def state(self) -> dict[str, Tensor]:
        """Return the EMA codebook, the latents pooled for its initialization, and the discriminator."""
        pool = {_POOL: torch.cat(self.pool)} if self.pool else {}
        averages = {} if self.averaged is None else self.averaged.state_dict()
        return dict(averages) | pool | critics_state(self.critics)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state`."""
        self.pool = [state[_POOL]] if _POOL in state else []
        averages = load_critics_state(self.critics, state)
        if self.averaged is not None:
            self.averaged.load_state_dict({name: averages[name] for name in averages if name != _POOL})

    def export(self, parameters: Mapping[str, Tensor], folder: Path) -> None:
        """Write a bundle for `vqd_scale.models.bundle.load_tokenizer`."""
        weights = {name.removeprefix("vqgan."): value for name, value in parameters.items()}
        buffers = {name: value.cpu() for name, value in buffers_of(self.vqgan).items()}
        save_tokenizer(folder, self.config.vqgan, weights | buffers)

    def _check_start(self) -> None:
        config, codes = self.config, self.vqgan.codes
        if self.pool_images > config.codebook_warmup_images:
            raise UserError(
                f"codebook_warmup_images: placing {codes} codes takes the latents of "
                f"{self.pool_images} images, more than come before image "
                f"{config.codebook_warmup_images}; start the codebook later."
            )
        if config.total_images <= config.codebook_warmup_images:
            raise UserError(
                f"total_images: the run ends at {config.total_images}, before its codebook joins at "
                f"{config.codebook_warmup_images}; train longer, or set codebook_warmup_images."
            )


def judged_by(
    critics: GANLosses,
    weights: ReconstructionConfig,
    made: Tensor,
    pictures: UInt8[Tensor, "batch 3 height width"],
    valid: Tensor,
    images: int,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Return the result of `GANLosses.validate` for reconstructions."""
    signal = to_signal(pictures)
    shown = made.detach().float().requires_grad_()
    pixels, _ = weights.pixels(shown, signal)
    return critics.validate(made, signal, pixels, shown, valid, images)


def critics_state(critics: GANLosses) -> dict[str, Tensor]:
    """Return the GAN losses' part of a task's state."""
    return {f"{_CRITICS}{name}": value for name, value in critics.state().items()}


def load_critics_state(critics: GANLosses, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Restore the GAN losses' part of a task's state and return the rest of the state."""
    critics.load_state(
        {name.removeprefix(_CRITICS): value for name, value in state.items() if name.startswith(_CRITICS)}
    )
    return {name: value for name, value in state.items() if not name.startswith(_CRITICS)}


def check_size(size: int, factor: int) -> None:
    """Check that the image size is a multiple of the tokenizer's downsampling factor.

    Raises:
        UserError: The image size is not a multiple.
    """
    if size % factor:
        raise UserError(f"transform.size: {size} is not a multiple of the factor {factor}.")


def autoencoder_flops(config: TrainedConfig, size: int) -> int:
    """Return the FLOPs of encoding and decoding one image."""
    with torch.device("meta"):
        tokenizer: Any = build_tokenizer(config)
        there = nn.Sequential(
            tokenizer.encoder, tokenizer.quant_conv, tokenizer.post_quant_conv, tokenizer.decoder
        )
        return 2 * cost_of(there, torch.zeros(1, 3, size, size)).multiply_accumulates


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers in a module's state dict."""
    parameters = dict(module.named_parameters())
    return {name: value for name, value in module.state_dict().items() if name not in parameters}
