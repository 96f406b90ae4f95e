"""The task of training a tokenizer: reconstruct pictures through a codebook."""

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import UInt8
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError
from vqd_scale.core.world import World
from vqd_scale.data.batch import ImageBatch
from vqd_scale.data.decode import DecodeConfig
from vqd_scale.data.samples import ImageSamples
from vqd_scale.data.transforms import CenterCrop, Transform
from vqd_scale.inference.bundle import save_tokenizer
from vqd_scale.nn.cost import cost_of
from vqd_scale.tokenizers.base import to_signal
from vqd_scale.tokenizers.convolutions import ResidualBlock
from vqd_scale.tokenizers.vqgan import VQGAN, VQGANConfig
from vqd_scale.training.config import RunConfig
from vqd_scale.training.partition import Partition
from vqd_scale.training.task import Forward, Losses, mean_of

_POOL = "pool"
_LATENTS_PER_CODE = 16
"""How many latents k-means sees for each code that it places."""


class ReconstructionConfig(Config):
    """Weights of the autoencoder's loss."""

    absolute: NonNegativeFloat = 1.0
    """Of the mean absolute error."""
    squared: NonNegativeFloat = 0.0
    """Of the mean squared error."""
    commitment: NonNegativeFloat = 0.25
    """Of the latents' squared distance to their codes (beta of VQ-VAE)."""


class TokenizerTrainConfig(RunConfig):
    """Train a VQ tokenizer on image shards."""

    transform: Transform = CenterCrop()
    """From a picture to a square."""
    decode: DecodeConfig = DecodeConfig()
    """How pictures are unpacked."""
    vqgan: VQGANConfig = VQGANConfig()
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    codebook_start: NonNegativeInt = 10_000
    """Images after which the codebook joins, placed by k-means; a plain autoencoder before."""
    revival: PositiveInt = 5_000
    """Images between two looks for dead codes, which are replaced by latents of the current batch."""


class AutoencodingStep(nn.Module):
    """From pictures to losses in one forward; what the engine wraps.

    Args:
        vqgan: The autoencoder.
        weights: Of the loss's terms.
    """

    def __init__(self, vqgan: VQGAN, weights: ReconstructionConfig) -> None:
        super().__init__()
        self.vqgan = vqgan
        self.weights = weights
        self.quantised = False

    def forward(self, images: UInt8[Tensor, "batch 3 height width"]) -> tuple[Tensor, ...]:
        """Per-sample loss (differentiable), squared error, latents and codes."""
        signal = to_signal(images)
        output = self.vqgan(signal, quantised=self.quantised)
        error = (output.images - signal).flatten(1)
        squared = error.square().mean(dim=1)
        loss = (
            self.weights.absolute * error.abs().mean(dim=1)
            + self.weights.squared * squared
            + self.weights.commitment * output.commitment
        )
        return loss, squared.detach(), output.latents.detach(), output.ids


class AutoencodingTask:
    """See `vqd_scale.training.task.Task`.

    Args:
        config: The run.
        world: This process's place among the ranks.

    Raises:
        UserError: Picture size and autoencoder do not fit, or a batch has too few latents for the codebook.
    """

    def __init__(self, config: TokenizerTrainConfig, world: World) -> None:
        self.config = config
        self.world = world
        self.units = (ResidualBlock,)
        torch.manual_seed(config.seed)
        self.vqgan = VQGAN(config.vqgan)
        size = config.transform.size
        if size % self.vqgan.factor:
            raise UserError(f"transform.size: {size} is not a multiple of the factor {self.vqgan.factor}.")
        self.pool_images = -(-_LATENTS_PER_CODE * config.vqgan.codes // (size // self.vqgan.factor) ** 2)
        if self.pool_images > config.codebook_start:
            raise UserError(
                f"codebook_start: placing {config.vqgan.codes} codes takes the latents of {self.pool_images} "
                f"images, more than come before image {config.codebook_start}; start the codebook later."
            )
        self.module = AutoencodingStep(self.vqgan, config.reconstruction)
        self.pool: list[Tensor] = []
        self.latents: Tensor | None = None

    @property
    def forward_flops(self) -> int:
        """Of the autoencoder."""
        size = self.config.transform.size
        with torch.device("meta"):
            return 2 * cost_of(VQGAN(self.config.vqgan), torch.zeros(1, 3, size, size)).multiply_accumulates

    def begin(self, partition: Partition) -> None:
        """A tokenizer starts from its own first weights."""

    def samples(self) -> ImageSamples:
        """Pictures."""
        return ImageSamples(self.config.transform, decode=self.config.decode, captioned=False)

    def losses(self, forward: Forward, batch: ImageBatch, images: int) -> Losses:
        """Reconstruct, and move the codebook towards this batch's latents."""
        codebook = self.vqgan.quantize
        valid = batch.valid.to(self.world.device, non_blocking=True)
        pictures = batch.images.to(self.world.device, non_blocking=True)
        self.module.quantised = images >= self.config.codebook_start
        if self.module.quantised and self.pool:
            codebook.initialise(torch.cat(self.pool), self.config.seed)
            self.pool = []
        loss, squared, latents, ids = forward(pictures)
        statistics = {"squared_error": mean_of(squared, valid)}
        if self.module.quantised:
            per_picture = len(ids) // len(valid)
            kept = valid.repeat_interleave(per_picture)
            codebook.update(latents[kept], ids[kept], self.world.sum)
            statistics["codes_used"] = torch.tensor([ids[kept].unique().numel(), 1.0])
            self.latents = latents
        elif images >= self.config.codebook_start - self.pool_images:
            self.pool.append(self.world.concatenated(latents))
        return Losses(loss, statistics)

    def judged(self, forward: Forward, batch: ImageBatch) -> dict[str, Tensor]:
        """How far reconstructions are from the pictures."""
        _, squared, _, _ = forward(batch.images.to(self.world.device))
        return {"squared_error": mean_of(squared, batch.valid.to(self.world.device))}

    def stepped(self, images: int) -> None:
        """Look for dead codes when it is time."""
        batch = self.config.data.lanes
        turn = images // self.config.revival
        if self.latents is None or turn == (images - batch) // self.config.revival:
            return
        self.vqgan.quantize.revive(self.world.concatenated(self.latents), self.config.seed, turn)

    def state(self) -> dict[str, Tensor]:
        """The codebook, and before it starts the latents that it will be placed at."""
        pool = {_POOL: torch.cat(self.pool)} if self.pool else {}
        return dict(self.vqgan.quantize.state_dict()) | pool

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take it back."""
        self.pool = [state[_POOL]] if _POOL in state else []
        self.vqgan.quantize.load_state_dict({name: state[name] for name in state if name != _POOL})

    def export(self, parameters: Mapping[str, Tensor], folder: Path) -> None:
        """Write the bundle that `vqd_scale.inference.bundle.load_tokenizer` loads."""
        weights = {name.removeprefix("vqgan."): value for name, value in parameters.items()}
        codebook = {
            f"quantize.{name}": value.cpu() for name, value in self.vqgan.quantize.state_dict().items()
        }
        save_tokenizer(folder, self.config.vqgan, weights | codebook)
