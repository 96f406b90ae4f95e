"""Base classes of convolutional autoencoders with a discrete codebook."""

from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqd_scale.core.errors import UserError
from vqd_scale.tokenizers.base import (
    Images,
    ImageTokenizer,
    Latents,
    SamplingKey,
    TokenGrid,
    check_signal,
    check_tokens,
)
from vqd_scale.tokenizers.codebook.quantizer import CodeIds, Vectors
from vqd_scale.tokenizers.config import ConvolutionsConfig
from vqd_scale.tokenizers.convolutions import Decoder, Encoder


class Quantizer(Protocol):
    """Codebook interface: vectors to code ids and back."""

    @property
    def codes(self) -> int:
        """K, the number of codes."""
        ...

    def nearest(self, vectors: Vectors) -> CodeIds:
        """Return the id of the best code of each vector."""
        ...

    def lookup(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape width"]:
        """Return the vectors of code ids."""
        ...


QuantizerType = TypeVar("QuantizerType", bound=Quantizer)


class Reconstruction(NamedTuple):
    """Output of one forward pass of an autoencoder.

    Attributes:
        images: Reconstructed images [batch, 3, height, width] in about [-1, 1].
        latents: Encoder outputs [batch * rows * columns, code_width].
        ids: Codes of the latents [batch * rows * columns]; all zero when quantization is off.
        commitment: Commitment loss per sample [batch]: mean squared distance of the latents to their codes,
            with gradients for the latents.
        codebook: Codebook loss per sample: the same distance, with gradients for the codes; ``None`` where
            the codes are not trained by gradients.
        divergence: KL(q(code) ‖ uniform) per sample, in nats per token; ``None`` without code probabilities.
    """

    images: Tensor
    latents: Tensor
    ids: Tensor
    commitment: Tensor
    codebook: Tensor | None = None
    divergence: Tensor | None = None


class Autoencoder(ImageTokenizer, Generic[QuantizerType]):
    """Encoder, codebook and decoder.

    With ``latent_channels``, 1x1 convolutions precede and follow the codebook.

    Args:
        config: Architecture of the convolutions.
        code_width: Dimension of a code's vector.
        quantize: Codebook.
    """

    def __init__(self, config: ConvolutionsConfig, code_width: int, quantize: QuantizerType) -> None:
        super().__init__()
        width = config.latent_channels or code_width
        self.config = config
        self.factor = config.factor
        self.codes = quantize.codes
        self.encoder = Encoder(config, width)
        self.quantize = quantize
        self.decoder = Decoder(config, width)
        has_projection = config.latent_channels is not None
        self.quant_conv = Pointwise(width, code_width) if has_projection else nn.Identity()
        self.post_quant_conv = Pointwise(code_width, width) if has_projection else nn.Identity()

    def encode(self, images: Images, sampling_key: SamplingKey | None = None) -> TokenGrid:
        """Encode images in [-1, 1] to codes 0..K-1; deterministic unless ``sampling_key`` is given.

        Raises:
            ValueError: The images have another range, dtype or shape (see `check_signal`), or the number of
                slots differs from the number of images.
            UserError: ``sampling_key`` is given, but the tokenizer has no code probabilities; or the vectors
                contain NaN or infinity, to which any code would be the nearest.
        """
        check_signal(images, self.factor)
        if sampling_key is not None and len(sampling_key.slots) != len(images):
            count = len(sampling_key.slots)
            raise ValueError(f"expected one slot for each of {len(images)} images, got {count}")
        z = self.latents(images).float()
        if not bool(z.isfinite().all()):
            raise UserError(
                "the encoder's vectors contain NaN or infinity: in float16 its values overflow, take "
                "bfloat16 or float32; in other dtypes its weights are unusable."
            )
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)
        ids = self.quantize.nearest(flat) if sampling_key is None else self._sample_codes(flat, sampling_key)
        return ids.unflatten(0, (z.shape[0], z.shape[2], z.shape[3]))

    def decode(self, tokens: TokenGrid) -> Images:
        """Decode codes to float32 images in about [-1, 1].

        Raises:
            ValueError: A token is not a code.
        """
        check_tokens(tokens, self.codes)
        return self.reconstruct(self.quantize.lookup(tokens).permute(0, 3, 1, 2)).float()

    def code_vectors(self) -> Float[Tensor, "codes width"]:
        """Return the vector of every code."""
        parameter = next(self.encoder.parameters())
        return self.quantize.lookup(torch.arange(self.codes, device=parameter.device))

    def latents(self, images: Images) -> Latents:
        """Return the vectors of images before quantization."""
        return self.quant_conv(self.encoder(images))

    def reconstruct(self, z: Latents) -> Images:
        """Decode vectors to images, in the dtype of the decoder's weights."""
        return self.decoder(self.post_quant_conv(z))

    def compute_in(self, dtype: torch.dtype) -> None:
        """Run the convolutions in another dtype, channels last, which is faster on GPUs and some CPUs.

        The codebook and its 1x1 convolutions, which select the codes, stay float32.
        """
        for part in (self.encoder, self.decoder):
            part.to(dtype).to(memory_format=torch.channels_last)

    def _sample_codes(self, vectors: Vectors, sampling_key: SamplingKey) -> CodeIds:
        del vectors, sampling_key
        raise UserError(
            f"tokenizer: {type(self).__name__} gives no probabilities to sample codes from; encode without "
            f"sampling."
        )


class StraightThrough(Autoencoder[QuantizerType]):
    """Autoencoder trained with the straight-through estimator."""

    def forward(self, images: Images, *, quantized: bool = True) -> Reconstruction:
        """Reconstruct images; gradients pass the codebook by the straight-through estimator.

        Args:
            images: Float images in [-1, 1]; height and width multiples of `factor`.
            quantized: False bypasses the codebook, for the first training steps.
        """
        z = self.latents(images)
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)
        if not quantized:
            ids = torch.zeros(len(flat), dtype=torch.int64, device=z.device)
            return Reconstruction(self.reconstruct(z), flat, ids, z.new_zeros(len(z)))
        ids = self.quantize.nearest(flat.detach())
        grid = (z.shape[0], z.shape[2], z.shape[3])
        vectors = self.quantize.lookup(ids).unflatten(0, grid).permute(0, 3, 1, 2)
        commitment = (z - vectors.detach()).square().flatten(1).mean(dim=1)
        codebook = (vectors - z.detach()).square().flatten(1).mean(dim=1) if vectors.requires_grad else None
        return Reconstruction(self.reconstruct(z + (vectors - z).detach()), flat, ids, commitment, codebook)


class Pointwise(nn.Conv2d):
    """1x1 convolution in the dtype of its weights, for inputs of any dtype.

    Args:
        width: Number of input channels.
        out_width: Number of output channels.
    """

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__(width, out_width, 1)

    def forward(self, input: Float[Tensor, "batch width h w"]) -> Float[Tensor, "batch following h w"]:
        """Apply the convolution."""
        return super().forward(input.to(self.weight.dtype))
