"""Training task of a tokenizer: image reconstruction through a codebook."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from vqd_scale.core.world import World
from vqd_scale.data.loading.batch import ImageBatch
from vqd_scale.tokenizers.autoencoder import Autoencoder
from vqd_scale.tokenizers.base import SamplingKey, to_signal
from vqd_scale.tokenizers.taming import TamingGumbel
from vqd_scale.training.tasks.base import Forward, Losses
from vqd_scale.training.tasks.config import ReconstructionConfig, TokenizerTrainConfig
from vqd_scale.training.tasks.tokenizer_task import TokenizerTask

_POOL = "pool"


class AutoencodingStep(nn.Module):
    """Module wrapped by the engine: images to losses in one forward.

    Args:
        vqgan: Autoencoder.
        weights: Weights of the loss terms.
        seed: Seed of the Gumbel code sampling.
    """

    def __init__(self, vqgan: Autoencoder[Any], weights: ReconstructionConfig, seed: int) -> None:
        super().__init__()
        self.vqgan = vqgan
        self.weights = weights
        self.seed = seed
        self.quantized = True

    def forward(
        self,
        images: UInt8[Tensor, "batch 3 height width"],
        slots: Int[Tensor, " batch"],
        temperature: Float[Tensor, ""],
    ) -> tuple[Tensor, ...]:
        """Return per-sample loss and reconstructions (differentiable), squared error, latents and codes."""
        signal = to_signal(images)
        output = (
            self.vqgan(signal, SamplingKey(self.seed, slots), temperature)
            if isinstance(self.vqgan, TamingGumbel)
            else self.vqgan(signal, quantized=self.quantized)
        )
        loss, squared_error = self.weights.pixels(output.images, signal)
        loss = loss + self.weights.commitment * output.commitment
        if output.codebook is not None:
            loss = loss + self.weights.codebook * output.codebook
        if output.divergence is not None:
            loss = loss + self.weights.kl * output.divergence
        return loss, output.images, squared_error.detach(), output.latents.detach(), output.ids


class AutoencodingTask(TokenizerTask):
    """Training task of a tokenizer.

    Args:
        config: Run configuration.
        world: This process's rank and device.
    """

    prefix = "vqgan."

    def __init__(self, config: TokenizerTrainConfig, world: World) -> None:
        super().__init__(config, world, config.vqgan)
        self.config = config
        self._step = AutoencodingStep(self.tokenizer, config.reconstruction, config.seed)
        self.module = self._step
        self._pool: list[Tensor] = []

    def losses(self, forward: Forward, batch: ImageBatch, images: int) -> Losses:
        """Compute all losses; at the end of its warmup, first initialize an EMA codebook."""
        self._step.quantized = self.codebook is None or images >= self.config.codebook_warmup_images
        if self.codebook is not None and self._step.quantized and self._pool:
            self.codebook.initialize(torch.cat(self._pool), self.config.seed)
            self._pool = []
        return super().losses(forward, batch, images)

    def inputs(self, batch: ImageBatch, images: int | None) -> tuple[Tensor, ...]:
        """Return images, slots and the temperature of the Gumbel softmax, 1 for validation."""
        temperature = 1.0 if images is None else self.config.temperature.at(images)
        return batch.images, batch.slots, torch.full((), temperature, device=self.world.device)

    def update_codebook(self, latents: Tensor, ids: Tensor, valid: Tensor, images: int) -> dict[str, Tensor]:
        """Update an EMA codebook, or pool latents for its initialization at the end of its warmup."""
        if self._step.quantized:
            return super().update_codebook(latents, ids, valid, images)
        if images >= self.config.codebook_warmup_images - self.config.pool_images:
            self._pool.append(self.world.concatenated(latents))
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return the state of `TokenizerTask` and the latents pooled for the codebook's initialization."""
        return super().state() | ({_POOL: torch.cat(self._pool)} if self._pool else {})

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state`."""
        super().load_state(state)
        self._pool = [state[_POOL]] if _POOL in state else []
