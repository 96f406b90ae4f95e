"""What all tokenizers of convolutions around a codebook share, whatever the codebook."""

from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import Self

from vqd_scale.core.errors import UserError
from vqd_scale.tokenizers.base import Draws, check_signal, check_tokens
from vqd_scale.tokenizers.convolutions import ConvolutionsConfig, Decoder, Encoder


class Quantizer(Protocol):
    """Vectors to codes and back."""

    @property
    def codes(self) -> int:
        """K, the number of codes."""
        ...

    def nearest(self, vectors: Float[Tensor, "count width"]) -> Int[Tensor, " count"]:
        """The id of the code that fits each vector best."""
        ...

    def lookup(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape width"]:
        """The vectors of codes."""
        ...


QuantizerType = TypeVar("QuantizerType", bound=Quantizer)


class Reconstruction(NamedTuple):
    """What one pass through an autoencoder gives.

    Attributes:
        images: [batch, 3, height, width] in about [-1, 1].
        latents: Encoder outputs [batch * rows * columns, code_width].
        ids: Their codes [batch * rows * columns]; all zero while not quantised.
        commitment: Mean squared distance of each sample's latents to their codes, [batch]; moves the latents.
        codebook: The same distance, where it moves the codes; none where no gradient does.
        divergence: Of each sample's code probabilities from equal ones, in nats per token; none without any.
    """

    images: Tensor
    latents: Tensor
    ids: Tensor
    commitment: Tensor
    codebook: Tensor | None = None
    divergence: Tensor | None = None


class Autoencoder(nn.Module, Generic[QuantizerType]):
    """Encoder, codebook and decoder; with ``latent_width`` 1x1 convolutions on both sides of the codebook.

    Args:
        config: Shape of the convolutions.
        code_width: The length of a code's vector.
        quantize: The codebook.
    """

    def __init__(self, config: ConvolutionsConfig, code_width: int, quantize: QuantizerType) -> None:
        super().__init__()
        width = config.latent_channels or code_width
        self.factor = config.factor
        self.encoder = Encoder(config, width)
        self.quantize = quantize
        self.decoder = Decoder(config, width)
        has_own = config.latent_channels is not None
        self.quant_conv = Pointwise(width, code_width) if has_own else nn.Identity()
        self.post_quant_conv = Pointwise(code_width, width) if has_own else nn.Identity()

    @property
    def codes(self) -> int:
        """K, the number of codes."""
        return self.quantize.codes

    def encode(
        self, images: Float[Tensor, "batch 3 height width"], draws: Draws | None = None
    ) -> Int[Tensor, "batch rows columns"]:
        """Images in [-1, 1] to codes 0..K-1, deterministic unless ``draws`` ask for samples.

        Raises:
            ValueError: The images are of another range, dtype or shape (see `check_signal`), or there are not
                as many slots.
            UserError: Samples are asked of a tokenizer that has no probabilities.
        """
        check_signal(images, self.factor)
        if draws is not None and len(draws.slots) != len(images):
            raise ValueError(f"expected one slot for each of {len(images)} images, got {len(draws.slots)}")
        z = self.latents(images).float()
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)
        ids = self.quantize.nearest(flat) if draws is None else self._sampled(flat, draws)
        return ids.unflatten(0, (z.shape[0], z.shape[2], z.shape[3]))

    def decode(self, tokens: Int[Tensor, "batch rows columns"]) -> Float[Tensor, "batch 3 height width"]:
        """Codes to float32 images in about [-1, 1].

        Raises:
            ValueError: A token is no code.
        """
        check_tokens(tokens, self.codes)
        return self.reconstruct(self.quantize.lookup(tokens).permute(0, 3, 1, 2)).float()

    def code_vectors(self) -> Float[Tensor, "codes width"]:
        """The vector of every code."""
        some = next(self.encoder.parameters())
        return self.quantize.lookup(torch.arange(self.codes, device=some.device))

    def latents(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch code rows columns"]:
        """Images to the vectors that are quantised."""
        return self.quant_conv(self.encoder(images))

    def reconstruct(
        self, z: Float[Tensor, "batch code rows columns"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Vectors to images, in the dtype of the decoder's weights."""
        return self.decoder(self.post_quant_conv(z))

    def compute_in(self, dtype: torch.dtype) -> Self:
        """Run the convolutions in another dtype, channels last, which is faster on GPUs and some CPUs.

        What chooses a code (the codebook and the 1x1 convolutions at it) stays float32.
        """
        for part in (self.encoder, self.decoder):
            part.to(dtype).to(memory_format=torch.channels_last)
        return self

    def _sampled(self, vectors: Float[Tensor, "count width"], draws: Draws) -> Int[Tensor, " count"]:
        del vectors, draws
        raise UserError(
            f"tokenizer: {type(self).__name__} gives no probabilities to sample codes from; encode without "
            f"sampling."
        )


class StraightThrough(Autoencoder[QuantizerType]):
    """An autoencoder that is trained by passing gradients from the chosen codes to the latents."""

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], *, quantised: bool = True
    ) -> Reconstruction:
        """Reconstruct images; gradients pass the codebook straight through.

        Args:
            images: Float images in [-1, 1]; height and width multiples of `factor`.
            quantised: False leaves the codebook out, for the first steps of a training.
        """
        z = self.latents(images)
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)
        if not quantised:
            ids = torch.zeros(len(flat), dtype=torch.int64, device=z.device)
            return Reconstruction(self.reconstruct(z), flat, ids, z.new_zeros(len(z)))
        ids = self.quantize.nearest(flat.detach())
        chosen = (
            self.quantize.lookup(ids).unflatten(0, (z.shape[0], z.shape[2], z.shape[3])).permute(0, 3, 1, 2)
        )
        commitment = (z - chosen.detach()).square().flatten(1).mean(dim=1)
        codebook = (chosen - z.detach()).square().flatten(1).mean(dim=1) if chosen.requires_grad else None
        return Reconstruction(self.reconstruct(z + (chosen - z).detach()), flat, ids, commitment, codebook)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution in the dtype of its own weights, whatever that of its input.

    Args:
        width: Channels of the input.
        following: Channels of the output.
    """

    def __init__(self, width: int, following: int) -> None:
        super().__init__(width, following, 1)

    def forward(self, input: Float[Tensor, "batch width h w"]) -> Float[Tensor, "batch following h w"]:
        """Every place by itself."""
        return super().forward(input.to(self.weight.dtype))
