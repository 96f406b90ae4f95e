"""The tokenizers that VQ-GAN's authors published, by their weights' names (Esser et al., arXiv 2012.09841).

They can be trained here, too: learned vectors by gradients, the classifier by Gumbel softmax.

Two codebooks: the nearest of learned vectors, and for the Gumbel models the most probable code of a
classifier. Reading their files is not done here; what their YAML files say becomes a configuration by
`taming_config`.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from vqd_scale.core.config import validated
from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, drawn_codes, uniforms
from vqd_scale.tokenizers.autoencoder import Autoencoder, Pointwise, Reconstruction, StraightThrough
from vqd_scale.tokenizers.base import Draws
from vqd_scale.tokenizers.codebook.quantizer import chunks, nearest_codes
from vqd_scale.tokenizers.convolutions import ConvolutionsConfig

_SMALLEST = 1e-30
"""Keeps the logarithms of Gumbel noise finite."""


class _TamingConfig(ConvolutionsConfig):
    codebook_size: PositiveInt
    code_dim: PositiveInt = 256
    attention: tuple[int, ...] = (3,)
    mid_attention: bool = True
    latent_channels: PositiveInt | None = 256


class TamingVQConfig(_TamingConfig):
    """Shape of a published VQ-GAN with the nearest of learned vectors; f8 unless told otherwise."""

    kind: Literal["taming_vq"] = "taming_vq"


class TamingGumbelConfig(_TamingConfig):
    """Shape of a published VQ-GAN with a Gumbel codebook; f8 unless told otherwise."""

    kind: Literal["taming_gumbel"] = "taming_gumbel"


OPENIMAGES_GUMBEL_F8 = TamingGumbelConfig(codebook_size=8192)
"""``vqgan_gumbel_f8``, which VQ-Diffusion's models of COCO, CUB-200 and CC use with 2887 codes left."""
IMAGENET_F16 = TamingVQConfig(codebook_size=16384, channel_multipliers=(1, 1, 2, 2, 4), attention=(4,))
"""``vqgan_imagenet_f16_16384``, which VQ-Diffusion's ImageNet model uses with 974 codes left."""
FFHQ_F16 = TamingVQConfig(codebook_size=1024, channel_multipliers=(1, 1, 2, 2, 4), attention=(4,))
"""The first stage of the published FFHQ transformer, and the shape of ``vqgan_imagenet_f16_1024``."""


class LearnedCodebook(nn.Module):
    """K learned vectors; a latent's code is the nearest.

    Args:
        codes: K.
        width: The length of a code's vector.
    """

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, width)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)

    @property
    def codes(self) -> int:
        """K, the number of codes."""
        return self.embedding.num_embeddings

    def nearest(self, vectors: Float[Tensor, "count width"]) -> Int[Tensor, " count"]:
        """The id of the nearest code of each vector (squared Euclidean distance)."""
        return nearest_codes(vectors, self.embedding.weight)

    def lookup(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape width"]:
        """The vectors of codes."""
        return self.embedding(ids)


class GumbelCodebook(nn.Module):
    """K learned vectors beside a classifier of latents, which need not resemble them.

    The published code samples with it even after training (the argmax of logits plus Gumbel noise, at
    temperature 1). Here the most probable code is the rule, and `sample` the exception.

    Args:
        codes: K.
        width: The length of a latent and of a code's vector.
    """

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.proj = Pointwise(width, codes)
        self.embed = nn.Embedding(codes, width)

    @property
    def codes(self) -> int:
        """K, the number of codes."""
        return self.embed.num_embeddings

    def nearest(self, vectors: Float[Tensor, "count width"]) -> Int[Tensor, " count"]:
        """The most probable code of each vector."""
        return torch.cat([self._logits(part).argmax(dim=1) for part in chunks(vectors, self.codes)])

    def sample(
        self, vectors: Float[Tensor, "count width"], drawn: Float[Tensor, " count"]
    ) -> Int[Tensor, " count"]:
        """Draw each vector's code from its probabilities, by one uniform number each."""
        parts = chunks(vectors, self.codes)
        numbers = drawn.split(len(parts[0]))
        return torch.cat(
            [
                drawn_codes(self._logits(part).softmax(dim=1), number)
                for part, number in zip(parts, numbers, strict=True)
            ]
        )

    def lookup(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape width"]:
        """The vectors of codes."""
        return self.embed(ids)

    def relaxed(
        self,
        vectors: Float[Tensor, "count width"],
        drawn: Float[Tensor, "count codes"],
        temperature: Float[Tensor, ""],
    ) -> tuple[Float[Tensor, "count width"], Int[Tensor, " count"], Float[Tensor, " count"]]:
        """Sampled codes, through which gradients pass as through mixtures (Jang et al., arXiv 1611.01144).

        Args:
            vectors: Latents.
            drawn: Uniform numbers in [0, 1), one for each code.
            temperature: Of the mixtures; the lower, the nearer to single codes.

        Returns:
            The vectors of the sampled codes, the codes, and the divergence of the probabilities from equal
            ones in nats.
        """
        logits = self._logits(vectors)
        exponential = -drawn.clamp(min=_SMALLEST).log()
        noise = -exponential.clamp(min=_SMALLEST).log()
        mixture = ((logits + noise) / temperature).softmax(dim=1)
        ids = mixture.argmax(dim=1)
        hard = functional.one_hot(ids, self.codes).to(mixture)
        logs = logits.log_softmax(dim=1)
        divergence = (logs.exp() * (logs + math.log(self.codes))).sum(dim=1)
        return (hard - mixture.detach() + mixture) @ self.embed.weight.float(), ids, divergence

    def _logits(self, vectors: Float[Tensor, "count width"]) -> Float[Tensor, "count codes"]:
        weight = self.proj.weight.flatten(1).float()
        bias = None if self.proj.bias is None else self.proj.bias.float()
        with torch.autocast(vectors.device.type, enabled=False):
            return functional.linear(vectors.float(), weight, bias)


class TamingVQ(StraightThrough[LearnedCodebook]):
    """A published VQ-GAN with the nearest of learned vectors.

    Args:
        config: The autoencoder's shape.
    """

    def __init__(self, config: TamingVQConfig) -> None:
        super().__init__(config, config.code_dim, LearnedCodebook(config.codebook_size, config.code_dim))
        self.config = config


class TamingGumbel(Autoencoder[GumbelCodebook]):
    """A published VQ-GAN with a Gumbel codebook.

    Args:
        config: The autoencoder's shape.
    """

    def __init__(self, config: TamingGumbelConfig) -> None:
        super().__init__(config, config.code_dim, GumbelCodebook(config.codebook_size, config.code_dim))
        self.config = config

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], draws: Draws, temperature: Float[Tensor, ""]
    ) -> Reconstruction:
        """Reconstruct images from sampled codes, as the published models were trained.

        Args:
            images: Float images in [-1, 1]; height and width multiples of `factor`.
            draws: By which the codes are sampled.
            temperature: See `GumbelCodebook.relaxed`.
        """
        z = self.latents(images)
        shape = (z.shape[0], z.shape[2], z.shape[3])
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)
        places = len(flat) // shape[0]
        count = places * self.codes
        drawn = uniforms(draws.seed, Purpose.GUMBEL, draws.slots, count).view(len(flat), self.codes)
        chosen, ids, divergence = self.quantize.relaxed(flat, drawn, temperature)
        made = self.reconstruct(chosen.unflatten(0, shape).permute(0, 3, 1, 2))
        none = z.new_zeros(len(z))
        return Reconstruction(made, flat, ids, none, divergence=divergence.view(shape[0], -1).mean(dim=1))

    def _sampled(self, vectors: Float[Tensor, "count width"], draws: Draws) -> Int[Tensor, " count"]:
        places = len(vectors) // len(draws.slots)
        # float64: a codebook's tail needs the digits.
        drawn = uniforms(draws.seed, Purpose.ENCODING, draws.slots, places, dtype=torch.float64)
        return self.quantize.sample(vectors, drawn.flatten())


def taming_config(values: Mapping[str, Any], source: str) -> TamingVQConfig | TamingGumbelConfig:
    """The configuration that a published YAML file describes.

    Args:
        values: The file's content: a VQ-GAN's, or a transformer's whose first stage is one.
        source: The file's name, for errors.

    Raises:
        UserError: It describes something else, or an autoencoder of another kind.
    """
    model = _mapping(values, "model", source)
    params = _mapping(model, "params", source)
    if "first_stage_config" in params:
        model = _mapping(params, "first_stage_config", source)
        params = _mapping(model, "params", source)
    name = str(model.get("target")).rpartition(".")[2]
    kinds = {"VQModel": TamingVQConfig, "VQModelInterface": TamingVQConfig, "GumbelVQ": TamingGumbelConfig}
    if name not in kinds:
        raise UserError(f"{source}: model.target must be one of {', '.join(kinds)}, not '{name}'.")
    shape = _mapping(params, "ddconfig", source)
    required = {"ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resolution", "z_channels"}
    missing = sorted((required - shape.keys()) | ({"embed_dim", "n_embed"} - params.keys()))
    if missing:
        raise UserError(f"{source}: the model's params lack {', '.join(missing)}.")
    only = {
        "double_z": False,
        "in_channels": 3,
        "out_ch": 3,
        "resamp_with_conv": True,
        "attn_type": "vanilla",
    }
    for key, value in only.items():
        if shape.get(key, value) != value:
            raise UserError(f"{source}: ddconfig.{key} must be {value!r} here, not {shape[key]!r}.")
    if shape["ch_mult"][0] != 1:
        raise UserError(f"{source}: ddconfig.ch_mult must start with 1, not with {shape['ch_mult'][0]!r}.")
    attends = [
        level
        for level in range(len(shape["ch_mult"]))
        if shape["resolution"] // 2**level in shape["attn_resolutions"]
    ]
    described = {
        "codebook_size": params["n_embed"],
        "code_dim": params["embed_dim"],
        "channels": shape["ch"],
        "channel_multipliers": list(shape["ch_mult"]),
        "num_res_blocks": shape["num_res_blocks"],
        "attention": attends,
        "latent_channels": shape["z_channels"],
    }
    return validated(kinds[name], described, source)


def _mapping(values: Mapping[str, Any], key: str, source: str) -> Mapping[str, Any]:
    found = values.get(key)
    if not isinstance(found, Mapping):
        raise UserError(f"{source}: holds no mapping '{key}' as a VQ-GAN's YAML file does.")
    return cast(Mapping[str, Any], found)
