"""A bundle with random weights that generates 8 x 8 pixels."""

from pathlib import Path

import torch

from vqd_scale.diffusion.config import Paper
from vqd_scale.models.bundle import Model, save_bundle, save_tokenizer
from vqd_scale.models.config import BundleConfig
from vqd_scale.nn.config import DenoiserConfig, TextCondition
from vqd_scale.text.config import Tower
from vqd_scale.tokenizers.config import VQGANConfig
from vqd_scale.tokenizers.vqgan import VQGAN

CONFIG = BundleConfig(
    codebook_size=9,
    grid=(4, 4),
    denoiser=DenoiserConfig(width=16, layers=1, heads=2, init_std=0.5, condition=TextCondition(width=16)),
    text=Tower(context_length=8, width=16, heads=2, layers=1, bpe_merges=300),
    diffusion=Paper(steps=10),
)
SHAPE = VQGANConfig(
    codebook_size=9, code_dim=4, channels=8, channel_multipliers=(1, 2), num_res_blocks=1, norm="none"
)


def write_model(folder: Path) -> Path:
    """Write the bundle and its tokenizer."""
    torch.manual_seed(0)
    vqgan = VQGAN(SHAPE)
    vqgan.quantize.embedding.copy_(torch.randn(9, 4))
    save_tokenizer(folder / "tokenizer", SHAPE, vqgan.state_dict())
    save_bundle(folder / "bundle", CONFIG, Model(CONFIG).state_dict(), folder / "tokenizer")
    return folder / "bundle"
