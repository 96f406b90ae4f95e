"""VQ-GAN tokenizers published by its authors, with the weight names of their files (arXiv 2012.09841).

There are two codebooks: nearest learned vector, and for the Gumbel models the most probable code of a
classifier. Both can be trained here: learned vectors by gradients, the classifier by Gumbel softmax. This
module reads no files; `taming_config` converts the content of a published YAML file to a configuration.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import ConfigDict, Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from vqd_scale.core.config import Config, validated
from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, sample_codes, uniforms
from vqd_scale.tokenizers.autoencoder import Autoencoder, Pointwise, Reconstruction, StraightThrough
from vqd_scale.tokenizers.base import Images, SamplingKey
from vqd_scale.tokenizers.codebook.quantizer import CodeIds, Vectors, chunks, nearest_codes
from vqd_scale.tokenizers.config import TamingGumbelConfig, TamingVQConfig

_SMALLEST = 1e-30
"""Lower bound that keeps the logarithms of Gumbel noise finite."""


class LearnedCodebook(nn.Module):
    """Codebook of K learned vectors; a latent gets the nearest code.

    Args:
        codes: K.
        width: Dimension of a code's vector.
    """

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, width)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)

    @property
    def codes(self) -> int:
        """K, the number of codes."""
        return self.embedding.num_embeddings

    def nearest(self, vectors: Vectors) -> CodeIds:
        """Return the id of each vector's nearest code (squared Euclidean distance)."""
        return nearest_codes(vectors, self.embedding.weight)

    def lookup(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape width"]:
        """Return the vectors of code ids."""
        return self.embedding(ids)


class GumbelCodebook(nn.Module):
    """Codebook of K learned vectors and a classifier that maps latents to codes.

    The published code samples from the classifier even after training (argmax of logits plus Gumbel noise, at
    temperature 1). Here encoding takes the most probable code by default; `sample` is optional.

    Args:
        codes: K.
        width: Dimension of a latent and of a code's vector.
    """

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.proj = Pointwise(width, codes)
        self.embed = nn.Embedding(codes, width)

    @property
    def codes(self) -> int:
        """K, the number of codes."""
        return self.embed.num_embeddings

    def nearest(self, vectors: Vectors) -> CodeIds:
        """Return the most probable code of each vector."""
        return torch.cat([self._logits(part).argmax(dim=1) for part in chunks(vectors, self.codes)])

    def sample(self, vectors: Vectors, uniform_numbers: Float[Tensor, " count"]) -> CodeIds:
        """Sample each vector's code from its probabilities, with one uniform number per vector."""
        parts = chunks(vectors, self.codes)
        numbers = uniform_numbers.split(len(parts[0]))
        probabilities = (self._logits(part).softmax(dim=1) for part in parts)
        return torch.cat([sample_codes(*pair) for pair in zip(probabilities, numbers, strict=True)])

    def lookup(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape width"]:
        """Return the vectors of code ids."""
        return self.embed(ids)

    def gumbel_softmax(
        self, vectors: Vectors, uniform_numbers: Float[Tensor, "count codes"], temperature: Float[Tensor, ""]
    ) -> tuple[Vectors, CodeIds, Float[Tensor, " count"]]:
        """Sample codes by straight-through Gumbel softmax (Jang et al., arXiv 1611.01144).

        Args:
            vectors: Latents.
            uniform_numbers: Uniform numbers in [0, 1), one per vector and code.
            temperature: Softmax temperature of the mixtures that gradients pass through; lower is closer to
                one-hot.

        Returns:
            The vectors of the sampled codes, the codes, and KL(q(code) ‖ uniform) in nats.
        """
        logits = self._logits(vectors)
        exponential = -uniform_numbers.clamp(min=_SMALLEST).log()
        noise = -exponential.clamp(min=_SMALLEST).log()
        mixture = ((logits + noise) / temperature).softmax(dim=1)
        ids = mixture.argmax(dim=1)
        hard = functional.one_hot(ids, self.codes).to(mixture)
        logs = logits.log_softmax(dim=1)
        divergence = (logs.exp() * (logs + math.log(self.codes))).sum(dim=1)
        return (hard - mixture.detach() + mixture) @ self.embed.weight.float(), ids, divergence

    def _logits(self, vectors: Vectors) -> Float[Tensor, "count codes"]:
        weight = self.proj.weight.flatten(1).float()
        bias = None if self.proj.bias is None else self.proj.bias.float()
        with torch.autocast(vectors.device.type, enabled=False):
            return functional.linear(vectors.float(), weight, bias)


class TamingVQ(StraightThrough[LearnedCodebook]):
    """Published VQ-GAN with a nearest-vector codebook.

    Args:
        config: Architecture of the autoencoder.
    """

    def __init__(self, config: TamingVQConfig) -> None:
        super().__init__(config, config.code_dim, LearnedCodebook(config.codebook_size, config.code_dim))


class TamingGumbel(Autoencoder[GumbelCodebook]):
    """Published VQ-GAN with a Gumbel codebook.

    Args:
        config: Architecture of the autoencoder.
    """

    def __init__(self, config: TamingGumbelConfig) -> None:
        super().__init__(config, config.code_dim, GumbelCodebook(config.codebook_size, config.code_dim))

    def forward(
        self, images: Images, sampling_key: SamplingKey, temperature: Float[Tensor, ""]
    ) -> Reconstruction:
        """Reconstruct images from sampled codes, as in the training of the published models.

        Args:
            images: Float images in [-1, 1]; height and width multiples of `factor`.
            sampling_key: Key of the random numbers used to sample codes.
            temperature: See `GumbelCodebook.gumbel_softmax`.
        """
        z = self.latents(images)
        shape = (z.shape[0], z.shape[2], z.shape[3])
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)
        count = len(flat) // shape[0] * self.codes
        numbers = uniforms(sampling_key.seed, Purpose.GUMBEL, sampling_key.slots, count).view(len(flat), -1)
        vectors, ids, divergence = self.quantize.gumbel_softmax(flat, numbers, temperature)
        reconstructed = self.reconstruct(vectors.unflatten(0, shape).permute(0, 3, 1, 2))
        divergence = divergence.view(shape[0], -1).mean(dim=1)
        return Reconstruction(reconstructed, flat, ids, z.new_zeros(len(z)), divergence=divergence)

    def _sample_codes(self, vectors: Vectors, sampling_key: SamplingKey) -> CodeIds:
        seed, slots = sampling_key
        # float64: float32 is too coarse for the rarest codes.
        numbers = uniforms(seed, Purpose.ENCODING, slots, len(vectors) // len(slots), dtype=torch.float64)
        return self.quantize.sample(vectors, numbers.flatten())


class _Published(Config):
    """Part of a published YAML file; keys without influence on the weights are ignored."""

    model_config = ConfigDict(extra="ignore")


class _Convolutions(_Published):
    double_z: Literal[False] = False
    in_channels: Literal[3] = 3
    out_ch: Literal[3] = 3
    resamp_with_conv: Literal[True] = True
    attn_type: Literal["vanilla"] = "vanilla"
    ch: int
    ch_mult: tuple[int, ...] = Field(min_length=1, max_length=16)
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    resolution: PositiveInt
    z_channels: int


class _Params(_Published):
    embed_dim: int
    n_embed: int
    ddconfig: _Convolutions


class _Model(_Published):
    target: str
    params: dict[str, Any]


class _File(_Published):
    model: _Model


def taming_config(values: Mapping[str, Any], source: str) -> TamingVQConfig | TamingGumbelConfig:
    """Convert a published YAML file's content to a configuration.

    Args:
        values: Content of a VQ-GAN's file, or of a transformer's whose first stage is a VQ-GAN.
        source: Name of the file, for error messages.

    Raises:
        UserError: The content does not describe a supported VQ-GAN.
    """
    model = validated(_File, values, source).model
    if "first_stage_config" in model.params:
        model = validated(_Model, model.params["first_stage_config"], f"{source}: first_stage_config")
    name = model.target.rpartition(".")[2]
    kinds = {"VQModel": TamingVQConfig, "VQModelInterface": TamingVQConfig, "GumbelVQ": TamingGumbelConfig}
    if name not in kinds:
        raise UserError(f"{source}: model.target must be one of {', '.join(kinds)}, not {name!r:.200}.")
    params = validated(_Params, model.params, f"{source}: {name}'s params")
    shape = params.ddconfig
    if shape.ch_mult[0] != 1:
        raise UserError(f"{source}: ddconfig.ch_mult must start with 1, not with {shape.ch_mult[0]}.")
    sides = [shape.resolution // 2**level for level in range(len(shape.ch_mult))]
    fields = {
        "codebook_size": params.n_embed,
        "code_dim": params.embed_dim,
        "channels": shape.ch,
        "channel_multipliers": shape.ch_mult,
        "num_res_blocks": shape.num_res_blocks,
        "attention": [level for level, side in enumerate(sides) if side in shape.attn_resolutions],
        "latent_channels": shape.z_channels,
    }
    return validated(kinds[name], fields, source)
