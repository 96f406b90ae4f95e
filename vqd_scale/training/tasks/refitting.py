"""Training task of ReFiT (Hu et al., arXiv 2112.01799): rebuild a tokenizer's codebook, then fine-tune.

A codebook with mostly unused codes is replaced by the k-means centers of the encoder outputs on the training
images. Encoder and pre-quantization convolution are frozen. Codebook, post-quantization convolution and
decoder are fine-tuned for the new codes.
"""

from contextlib import closing
from typing import Any, cast

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vqd_scale.core.errors import UserError
from vqd_scale.core.progress import progress_bar
from vqd_scale.core.world import World
from vqd_scale.data.loading.batch import ImageBatch
from vqd_scale.data.loading.stream import Stream
from vqd_scale.models.bundle import load_tokenizer
from vqd_scale.tokenizers.autoencoder import Autoencoder
from vqd_scale.tokenizers.base import to_signal
from vqd_scale.tokenizers.codebook.reservoir import Reservoir
from vqd_scale.tokenizers.codebook.seeding import afkmc2, kmeans
from vqd_scale.tokenizers.taming import TamingVQ
from vqd_scale.tokenizers.vqgan import VQGAN
from vqd_scale.training.partition import Partition, fill
from vqd_scale.training.tasks.config import ReconstructionConfig, RefitConfig, TrainedConfig
from vqd_scale.training.tasks.tokenizer_task import TokenizerTask

_CODES = "quantize.embedding.weight"
"""Parameter of a codebook that is trained by gradients."""


class RefitStep(nn.Module):
    """Module wrapped by the engine: latents of the frozen encoder to losses.

    Args:
        tokenizer: Tokenizer whose codebook and decoder are trained.
        weights: Weights of the loss terms.
    """

    def __init__(self, tokenizer: Autoencoder[Any], weights: ReconstructionConfig) -> None:
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
        codes = self.quantize.lookup(ids).unflatten(0, (z.shape[0], z.shape[2], z.shape[3]))
        codes = codes.permute(0, 3, 1, 2)
        reconstructions = self.decoder(self.post_quant_conv(codes))
        loss, squared_error = self.weights.pixels(reconstructions, to_signal(images))
        if codes.requires_grad:
            loss = loss + self.weights.codebook * (codes - z).square().flatten(1).mean(dim=1)
        return loss, reconstructions, squared_error.detach(), flat, ids


class RefitTask(TokenizerTask):
    """Training task of ReFiT.

    Args:
        config: Run configuration.
        world: This process's rank and device.

    Raises:
        UserError: The tokenizer has no codebook of vectors, or the image size does not fit the autoencoder.
    """

    def __init__(self, config: RefitConfig, world: World) -> None:
        original = load_tokenizer(config.tokenizer, torch.device("cpu"))
        if not isinstance(original, VQGAN | TamingVQ):
            raise UserError(
                f"{config.tokenizer}: a {type(original).__name__} has no codebook of vectors to rebuild; "
                "give the bundle of a VQGAN or a TamingVQ."
            )
        if config.transform.size % original.factor:
            raise UserError(
                f"transform.size: {config.transform.size} is not a multiple of the factor {original.factor}."
            )
        # The codebook's initial values are replaced in `init_weights` or by a checkpoint.
        shape = original.config.model_copy(update={"codebook_size": config.codebook_size})
        super().__init__(config, world, cast(TrainedConfig, shape))
        self.config = config
        codebook = {
            name: value for name, value in self.tokenizer.state_dict().items() if name.startswith("quantize.")
        }
        self.tokenizer.load_state_dict(original.state_dict() | codebook)
        self.frozen = nn.ModuleList([self.tokenizer.encoder, self.tokenizer.quant_conv])
        self.frozen.to(world.device).eval().requires_grad_(False)
        self.module = RefitStep(self.tokenizer, config.reconstruction)

    def init_weights(self, partition: Partition) -> None:
        """Rebuild the codebook by AFK-MC² seeding and k-means on the pool, identically on all ranks.

        Raises:
            UserError: The pool has fewer distinct vectors than codes.
        """
        pool = self._pool()
        seeds = afkmc2(pool, self.config.codebook_size, self.config.seed, self.config.pool.chain_length)
        clusters = kmeans(pool, pool[seeds])
        # Ranks can differ in floating-point rounding: broadcast the first rank's centers.
        table = torch.cat([clusters.centers, clusters.sizes[:, None]], dim=1).to(self.world.device)
        table = self.world.sum(table * float(self.world.is_first))
        centers, sizes = table[:, :-1], table[:, -1]
        if self.codebook is not None:
            self.codebook.set_codes(centers, sizes)
            return
        fill(partition, partition.masters, {_CODES: centers})
        partition.masters_changed()

    def inputs(self, batch: ImageBatch, images: int | None) -> tuple[Tensor, ...]:
        """Return images and the frozen encoder's latents."""
        return batch.images, self._encode(batch.images)

    @torch.no_grad()
    def _encode(self, images: UInt8[Tensor, "batch 3 height width"]) -> Tensor:
        encoder, quant_conv = self.frozen
        return quant_conv(encoder(to_signal(images))).float()

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
                z = self._encode(batch.images.to(world.device))
                if len(z):
                    reservoir.add(z.permute(0, 2, 3, 1).flatten(0, 2).cpu(), batch.slots)
                bar.update(config.data.global_batch_size)
        return reservoir.gather(lambda tensor: world.concatenated(tensor.to(world.device)).cpu())
