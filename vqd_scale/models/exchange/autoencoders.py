"""Import of published tokenizers, with the architecture from their weights or their YAML file."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vqd_scale.core.config import read_yaml
from vqd_scale.core.errors import UserError
from vqd_scale.core.tensors import read_tensors
from vqd_scale.models.exchange.conversion import TokenizerPlan, tokenizer_weights
from vqd_scale.models.exchange.key_mapping import Exchange, count_numbered
from vqd_scale.tokenizers.config import TamingGumbelConfig, TamingVQConfig, VQGANConfig
from vqd_scale.tokenizers.taming import taming_config
from vqd_scale.tokenizers.weights import from_taming

_DROPPED = (
    # GAN losses, and the transformer of which the tokenizer is the first stage.
    r"loss\..+",
    r"(transformer|cond_stage_model)\..+",
    r"first_stage_model\.loss\..+",
)


def plan_taming(path: Path, description: Path) -> TokenizerPlan:
    """Plan the import of a tokenizer from taming-transformers' weights and their YAML file.

    Raises:
        UserError: A file is missing, damaged, or of another kind.
    """
    config = taming_config(read_yaml(description), str(description))
    targets = tokenizer_weights(config, str(description))
    exchange = Exchange(str(path), read_tensors(path), targets, from_taming, _DROPPED)
    return TokenizerPlan(config, exchange)


def autoencoder_config(
    state: Mapping[str, Tensor], source: str
) -> VQGANConfig | TamingVQConfig | TamingGumbelConfig:
    """Infer the architecture and codebook of a published tokenizer from its weights.

    Raises:
        UserError: The weights are not those of such a tokenizer.
    """

    def shape(name: str) -> list[int]:
        if name not in state:
            raise UserError(f"{source}: the tokenizer has no weight '{name}', which determines its shape.")
        return list(state[name].shape)

    channels = shape("encoder.conv_in.weight")[0]
    levels = count_numbered(state, r"encoder\.down\.(\d+)\.")
    convolutions = {
        "channels": channels,
        "channel_multipliers": [
            shape(f"encoder.down.{level}.block.0.conv1.weight")[0] // channels for level in range(levels)
        ],
        "num_res_blocks": count_numbered(state, r"encoder\.down\.0\.block\.(\d+)\."),
        "attention": [
            level for level in range(levels) if f"encoder.down.{level}.attn.0.norm.weight" in state
        ],
        "mid_attention": True,
        "latent_channels": shape("quant_conv.weight")[1],
    }
    if "quantize.proj.weight" in state:
        codes, width = shape("quantize.embed.weight")
        return TamingGumbelConfig.model_validate({"codebook_size": codes, "code_dim": width, **convolutions})
    if "quantize.embedding" in state:
        codes, width = shape("quantize.embedding")
        return VQGANConfig.model_validate({"codebook_size": codes, "code_dim": width, **convolutions})
    codes, width = shape("quantize.embedding.weight")
    return TamingVQConfig.model_validate({"codebook_size": codes, "code_dim": width, **convolutions})
