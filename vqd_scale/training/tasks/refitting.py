"""Training task of ReFiT (Hu et al., arXiv 2112.01799): rebuild a tokenizer's codebook, then fine-tune.

A codebook with mostly unused codes is replaced by the k-means centers of the encoder outputs on the training
images. Encoder and pre-quantization convolution are frozen. Codebook, post-quantization convolution and
decoder are fine-tuned for the new codes.
"""

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError
from vqd_scale.core.progress import progress_bar
from vqd_scale.core.world import World
from vqd_scale.data.loading.batch import ImageBatch
from vqd_scale.data.loading.sample_readers import ImageSamples
from vqd_scale.data.loading.stream import Stream
from vqd_scale.models.bundle import load_tokenizer, save_tokenizer
from vqd_scale.tokenizers.base import to_signal
from vqd_scale.tokenizers.codebook.quantizer import Codebook
from vqd_scale.tokenizers.codebook.reservoir import Reservoir
from vqd_scale.tokenizers.codebook.seeding import CHAIN, afkmc2, kmeans
from vqd_scale.tokenizers.convolutions import ResidualBlock
from vqd_scale.tokenizers.registry import build_tokenizer
from vqd_scale.tokenizers.taming import TamingVQ
from vqd_scale.tokenizers.vqgan import VQGAN
from vqd_scale.training.partition import Partition, fill
from vqd_scale.training.tasks.autoencoding import (
    AutoencodingConfig,
    ReconstructionConfig,
    autoencoder_flops,
    buffers_of,
    check_size,
    critics_state,
    judged_by,
    load_critics_state,
)
from vqd_scale.training.tasks.base import Forward, Losses, mean_of
from vqd_scale.training.tasks.gan_losses import GANLosses

_LEARNED = "quantize.embedding.weight"


class PoolConfig(Config):
    """Pool of encoder outputs for k-means: a uniform sample of all outputs of the pool's images."""

    size: PositiveInt = 20_000
    """Number of vectors (P), much larger than the number of codes. VQ-DDM's code uses 20,000; 100,000 is
    worth the time."""
    images: PositiveInt = 20_000
    """Number of images encoded for the pool, the first ones of the run."""
    chain_length: PositiveInt = CHAIN
    """Length of the Markov chains of AFK-MC² seeding."""


class RefitConfig(AutoencodingConfig):
    """Configuration for rebuilding a trained tokenizer's codebook and fine-tuning its decoder."""

    kind: Literal["refit"] = "refit"
    tokenizer: Path
    """Bundle of the tokenizer whose codebook is replaced."""
    codebook_size: PositiveInt = 1024
    """Number of codes in the new codebook (K')."""
    pool: PoolConfig = PoolConfig()
    dead_code_reset_every_images: PositiveInt | None = Field(default=None)
    """Images between two dead-code resets; disabled if not given. EMA codebooks only."""

    @model_validator(mode="after")
    def _pool_is_larger(self) -> Self:
        if self.codebook_size > self.pool.size:
            raise ValueError(
                f"codebook_size {self.codebook_size} cannot be placed at a pool of {self.pool.size} vectors"
            )
        return self


class RefitStep(nn.Module):
    """Module wrapped by the engine: latents of the frozen encoder to losses.

    Args:
        tokenizer: Tokenizer whose codebook and decoder are trained.
        weights: Weights of the loss terms.
    """

    def __init__(self, tokenizer: VQGAN | TamingVQ, weights: ReconstructionConfig) -> None:
        super().__init__()
        self.quantize = tokenizer.quantize
        self.post_quant_conv = tokenizer.post_quant_conv
        self.decoder = tokenizer.decoder
        self.weights = weights

    def forward(
        self,
        images: UInt8[Tensor, "batch 3 height width"],
        z: Float[Tensor, "batch code rows columns"],
    ) -> tuple[Tensor, ...]:
        """Return per-sample loss and reconstructions (differentiable), squared error, latents and codes."""
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)
        ids = self.quantize.nearest(flat)
        # No straight-through estimator: the encoder is frozen, so the codes get the decoder's gradients.
        chosen = self.quantize.lookup(ids).unflatten(0, (z.shape[0], z.shape[2], z.shape[3]))
        chosen = chosen.permute(0, 3, 1, 2)
        made = self.decoder(self.post_quant_conv(chosen))
        loss, squared = self.weights.pixels(made, to_signal(images))
        if chosen.requires_grad:
            loss = loss + self.weights.codebook * (chosen - z).square().flatten(1).mean(dim=1)
        return loss, made, squared.detach(), flat, ids


class RefitTask:
    """Implementation of `vqd_scale.training.tasks.base.Task` for ReFiT.

    Args:
        config: Run configuration.
        world: This process's rank and device.

    Raises:
        UserError: The tokenizer has no codebook of vectors, or the image size does not fit the autoencoder.
    """

    def __init__(self, config: RefitConfig, world: World) -> None:
        self.config = config
        self.world = world
        self.units = (ResidualBlock,)
        old = load_tokenizer(config.tokenizer, torch.device("cpu"))
        if not isinstance(old, VQGAN | TamingVQ):
            raise UserError(
                f"{config.tokenizer}: a {type(old).__name__} has no codebook of vectors that the nearest is "
                f"chosen of, so that there is nothing to rebuild; name a VQGAN or a TamingVQ."
            )
        check_size(config.transform.size, old.factor)
        self.shape = old.config.model_copy(update={"codebook_size": config.codebook_size})
        # The codebook's initial values are replaced in `init_weights` or by a checkpoint.
        torch.manual_seed(config.seed)
        self.tokenizer: Any = build_tokenizer(self.shape)
        mended = {name: value for name, value in old.state_dict().items() if not name.startswith("quantize.")}
        own = {name: value for name, value in self.tokenizer.state_dict().items() if name not in mended}
        self.tokenizer.load_state_dict(mended | own)
        self.frozen = nn.ModuleList([self.tokenizer.encoder, self.tokenizer.quant_conv])
        self.frozen.to(world.device).eval().requires_grad_(False)
        self.averaged: Codebook | None = (
            self.tokenizer.quantize if isinstance(self.tokenizer.quantize, Codebook) else None
        )
        self.module = RefitStep(self.tokenizer, config.reconstruction)
        self.critics = GANLosses(config.losses, config, world)
        self.latents: Tensor | None = None

    @property
    def forward_flops(self) -> int:
        """FLOPs of the autoencoder's forward pass, including the frozen encoder."""
        return autoencoder_flops(self.shape, self.config.transform.size)

    def init_weights(self, partition: Partition) -> None:
        """Rebuild the codebook by AFK-MC² seeding and k-means on the pool, identically on all ranks.

        Raises:
            UserError: The pool has fewer distinct vectors than codes.
        """
        pool = self._pool()
        seeds = afkmc2(pool, self.config.codebook_size, self.config.seed, self.config.pool.chain_length)
        found = kmeans(pool, pool[seeds.chosen])
        # Ranks can differ in floating-point rounding: broadcast the first rank's centers.
        centres = torch.cat([found.centres, found.sizes[:, None]], dim=1).to(self.world.device)
        placed = self.world.sum(centres * float(self.world.is_first))
        centres, sizes = placed[:, :-1], placed[:, -1]
        if self.averaged is not None:
            self.averaged.place(centres, sizes)
            return
        fill(partition, partition.masters, {_LEARNED: centres})
        partition.masters_changed()

    def samples(self) -> ImageSamples:
        """Return images without captions as the kind of samples."""
        return ImageSamples(self.config.transform, decode=self.config.decode, captioned=False)

    def losses(self, forward: Forward, batch: ImageBatch, images: int) -> Losses:
        """Compute the reconstruction loss with the new codes and update an EMA codebook."""
        valid, pictures = batch.valid, batch.images
        loss, made, squared, latents, ids = forward(pictures, self._encoded(pictures))
        kept = valid.repeat_interleave(len(ids) // len(valid))
        if self.averaged is not None:
            self.averaged.update(latents[kept], ids[kept], self.world.sum)
            self.latents = latents
        statistics = {
            "squared_error": mean_of(squared, valid),
            "codes_used": torch.tensor([ids[kept].unique().numel(), 1.0]),
        }
        added, more = judged_by(self.critics, self.config.reconstruction, made, pictures, valid, images)
        return Losses(loss if added is None else loss + added, statistics | more)

    def validate(self, forward: Forward, batch: ImageBatch) -> dict[str, Tensor]:
        """Compute the squared error of the reconstructions."""
        _, _, squared, _, _ = forward(batch.images, self._encoded(batch.images))
        return {"squared_error": mean_of(squared, batch.valid)}

    def on_step_end(self, images: int) -> None:
        """Reset dead codes if due."""
        revival, batch = self.config.dead_code_reset_every_images, self.config.data.global_batch_size
        if self.averaged is None or self.latents is None or revival is None:
            return
        turn = images // revival
        if turn != (images - batch) // revival:
            self.averaged.revive(self.world.concatenated(self.latents), self.config.seed, turn)

    def state(self) -> dict[str, Tensor]:
        """Return the EMA codebook, if there is one, and the discriminator."""
        averages = {} if self.averaged is None else self.averaged.state_dict()
        return dict(averages) | critics_state(self.critics)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state`."""
        averages = load_critics_state(self.critics, state)
        if self.averaged is not None:
            self.averaged.load_state_dict(averages)

    def export(self, parameters: Mapping[str, Tensor], folder: Path) -> None:
        """Write a bundle for `vqd_scale.models.bundle.load_tokenizer`."""
        kept = {
            name: value
            for name, value in self.tokenizer.state_dict().items()
            if name.startswith(("encoder.", "quant_conv."))
        }
        whole = kept | buffers_of(self.tokenizer) | dict(parameters)
        save_tokenizer(folder, self.shape, {name: value.cpu() for name, value in whole.items()})

    @torch.no_grad()
    def _encoded(self, pictures: UInt8[Tensor, "batch 3 height width"]) -> Tensor:
        encoder, quant_conv = self.frozen
        return quant_conv(encoder(to_signal(pictures))).float()

    def _pool(self) -> Float[Tensor, "pool width"]:
        config, world = self.config, self.world
        stream = Stream(
            config.data,
            self.samples(),
            seed=config.seed,
            rank=world.rank,
            ranks=world.size,
            cursor=0,
            quarantine=config.run / f"quarantine-pool-{world.rank:05d}.jsonl",
        )
        reservoir = Reservoir(config.pool.size, config.seed)
        bar = progress_bar("pool", config.pool.images, unit="img", quiet=not world.is_first)
        with closing(iter(stream)) as batches, bar:
            for _ in range(0, config.pool.images, config.data.global_batch_size):
                batch = next(batches)
                batch = batch.select(batch.valid)
                z = self._encoded(batch.images.to(world.device))
                if len(z):
                    reservoir.add(z.permute(0, 2, 3, 1).flatten(0, 2).cpu(), batch.slots)
                bar.update(config.data.global_batch_size)
        return reservoir.pooled(lambda tensor: world.concatenated(tensor.to(world.device)).cpu())
