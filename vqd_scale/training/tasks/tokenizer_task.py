"""Base of the tasks that train a tokenizer: images, EMA codebook, GAN losses, their state, and export."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vqd_scale.core.outputs import EXPORT
from vqd_scale.core.tensors import with_prefix, without_prefix
from vqd_scale.core.world import World
from vqd_scale.data.loading.batch import ImageBatch
from vqd_scale.data.loading.sample_readers import ImageSamples
from vqd_scale.models.bundle import save_tokenizer
from vqd_scale.nn.flops import cost_of
from vqd_scale.tokenizers.autoencoder import Autoencoder
from vqd_scale.tokenizers.base import to_signal
from vqd_scale.tokenizers.codebook.quantizer import Codebook
from vqd_scale.tokenizers.convolutions import ResidualBlock
from vqd_scale.training.periods import is_due
from vqd_scale.training.tasks.base import Forward, Losses, Task, mean_of
from vqd_scale.training.tasks.config import AutoencodingConfig, TrainedConfig
from vqd_scale.training.tasks.gan_losses import GANLosses

_CODEBOOK = "codebook."
_GAN_LOSSES = "gan_losses."


class TokenizerTask(Task[ImageBatch]):
    """Base of the tasks that train a tokenizer; a subclass sets the module.

    Its forward returns each sample's loss and reconstruction (differentiable), squared error, latents and
    codes.

    Args:
        config: Run configuration.
        world: This process's rank and device.
        shape: Architecture of the trained tokenizer.

    Attributes:
        prefix: Prefix of the tokenizer's parameters in the module.
        tokenizer: Trained tokenizer.
        codebook: EMA codebook of the tokenizer, if it has one.
    """

    prefix: ClassVar[str] = ""
    units = (ResidualBlock,)

    def __init__(self, config: AutoencodingConfig, world: World, shape: TrainedConfig) -> None:
        self.config = config
        self.world = world
        self.shape: TrainedConfig = shape
        torch.manual_seed(config.seed)
        self.tokenizer: Autoencoder[Any] = shape.build()
        quantize: nn.Module = self.tokenizer.quantize
        self.codebook = quantize if isinstance(quantize, Codebook) else None
        self.gan_losses = GANLosses(config, world)
        self._latents: Tensor | None = None

    @abstractmethod
    def inputs(self, batch: ImageBatch, images: int | None) -> tuple[Tensor, ...]:
        """Return the inputs of the module's forward; ``images`` seen is ``None`` in validation."""

    @property
    def forward_flops(self) -> int:
        """FLOPs of encoding and decoding one image."""
        size = self.config.transform.size
        with torch.device("meta"):
            copy: Autoencoder[Any] = self.shape.build()
            network = nn.Sequential(copy.encoder, copy.quant_conv, copy.post_quant_conv, copy.decoder)
            return 2 * cost_of(network, torch.zeros(1, 3, size, size)).multiply_accumulates

    def samples(self) -> ImageSamples:
        """Return images without captions as the kind of samples."""
        return ImageSamples(self.config.transform, decode=self.config.decode, captioned=False)

    def losses(self, forward: Forward, batch: ImageBatch, images: int) -> Losses:
        """Compute all losses; update an EMA codebook and the discriminator with this batch."""
        valid = batch.valid
        loss, reconstructions, squared_error, latents, ids = forward(*self.inputs(batch, images))
        statistics = {"squared_error": mean_of(squared_error, valid)}
        statistics |= self.update_codebook(latents, ids, valid, images)
        gan_loss, gan_statistics = self.gan_losses(reconstructions, to_signal(batch.images), valid, images)
        return Losses(loss if gan_loss is None else loss + gan_loss, statistics | gan_statistics)

    def update_codebook(self, latents: Tensor, ids: Tensor, valid: Tensor, images: int) -> dict[str, Tensor]:
        """Update an EMA codebook with a batch's latents and return statistics of the codes; collective."""
        # A weight, not a selection: the number of selected rows makes the host wait for the device.
        weight = valid.repeat_interleave(len(ids) // len(valid)).float()
        if self.codebook is not None:
            self.codebook.update(latents, ids, weight, self.world.sum)
            self._latents = latents
        counts = weight.new_zeros(self.tokenizer.codes).index_add_(0, ids, weight)
        used = (counts > 0).sum().double()
        return {"codes_used": torch.stack([used, torch.ones_like(used)])}

    def validate(self, forward: Forward, batch: ImageBatch) -> dict[str, Tensor]:
        """Compute the squared error of the reconstructions; a Gumbel tokenizer's codes are sampled."""
        _, _, squared_error, _, _ = forward(*self.inputs(batch, None))
        return {"squared_error": mean_of(squared_error, batch.valid)}

    def on_step_end(self, images: int) -> None:
        """Reset dead codes if due."""
        period, batch = self.config.dead_code_reset_every_images, self.config.data.global_batch_size
        if self.codebook is None or self._latents is None or period is None:
            return
        if is_due(period, images, batch):
            latents = self.world.concatenated(self._latents)
            self.codebook.reset_dead_codes(latents, self.config.seed, images // period)

    def state(self) -> dict[str, Tensor]:
        """Return the EMA codebook, if there is one, and the discriminator."""
        codebook = {} if self.codebook is None else self.codebook.state_dict()
        return with_prefix(_CODEBOOK, codebook) | with_prefix(_GAN_LOSSES, self.gan_losses.state())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state`."""
        if self.codebook is not None:
            self.codebook.load_state_dict(without_prefix(state, _CODEBOOK))
        self.gan_losses.load_state(without_prefix(state, _GAN_LOSSES))

    def export(self, parameters: Mapping[str, Tensor], folder: Path) -> None:
        """Write a bundle for `vqd_scale.models.bundle.load_tokenizer`."""
        # Trained weights may be sharded over the ranks: `parameters` replaces all of them.
        weights = {**self.tokenizer.state_dict(), **without_prefix(parameters, self.prefix)}
        weights = {name: value.cpu() for name, value in weights.items()}
        save_tokenizer(folder, self.shape, weights, EXPORT)
