"""Checkpoints in Microsoft's layout with random weights: names and shapes from their description."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tests.tokenizers.plain_implementation import Published, build
from vqd_scale.tokenizers.config import ITHQ, OPENIMAGES_GUMBEL_F8, TamingVQConfig

State = dict[str, Tensor]

STEPS = 100
WIDTH, LAYERS, HEADS, TEXT_WIDTH, TEXT_LAYERS, POSITIONS, MERGES = 24, 2, 2, 64, 2, 8, 300

SLIM = {"channels": 32, "channel_multipliers": (1, 2), "attention": (1,), "latent_channels": 6, "code_dim": 4}
ITHQ_SLIM = ITHQ.model_copy(update={"codebook_size": 9, **SLIM})
GUMBEL_SLIM = OPENIMAGES_GUMBEL_F8.model_copy(update={"codebook_size": 13, **SLIM})
VQ_SLIM = TamingVQConfig(codebook_size=9, **SLIM)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Kind:
    """Variant of the published models: text (ITHQ, COCO), class (ImageNet), none (FFHQ)."""

    condition: Literal["text", "class", "none"] = "text"
    feed_forward: Literal["fc", "conv"] = "fc"
    codes: int = 9
    side: int = 4
    positions: int = 4
    classes: int = 5


def network_shapes(kind: Kind) -> dict[str, tuple[int, ...]]:
    """``transformer.transformer.*``, without the first word."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(stem: str, width: int, following: int, *kernel: int) -> None:
        shapes[f"{stem}.weight"] = (following, width, *kernel)
        shapes[f"{stem}.bias"] = (following,)

    def adaptive(stem: str, rows: int) -> None:
        shapes[f"{stem}.emb.weight"] = (rows, WIDTH)
        linear(f"{stem}.linear", WIDTH, 2 * WIDTH)

    def norm(stem: str) -> None:
        shapes[f"{stem}.weight"] = shapes[f"{stem}.bias"] = (WIDTH,)

    shapes["content_emb.emb.weight"] = (kind.codes + 1, WIDTH)
    for side in ("height", "width"):
        shapes[f"content_emb.{side}_emb.weight"] = (kind.positions, WIDTH)
    for layer in range(LAYERS):
        block = f"blocks.{layer}"
        adaptive(f"{block}.ln1", STEPS)
        for part in ("query", "key", "value", "proj"):
            linear(f"{block}.{'attn1' if kind.condition == 'text' else 'attn'}.{part}", WIDTH, WIDTH)
        if kind.condition == "text":
            adaptive(f"{block}.ln1_1", STEPS)
            for part in ("query", "proj"):
                linear(f"{block}.attn2.{part}", WIDTH, WIDTH)
            for part in ("key", "value"):
                linear(f"{block}.attn2.{part}", TEXT_WIDTH, WIDTH)
            shapes[f"{block}.attn2.mask"] = (1, 1, kind.side**2, kind.side**2)
        if kind.condition == "class":
            adaptive(f"{block}.ln2", kind.classes)
        else:
            norm(f"{block}.ln2")
        if kind.feed_forward == "fc":
            linear(f"{block}.mlp.0", WIDTH, 4 * WIDTH)
            linear(f"{block}.mlp.2", 4 * WIDTH, WIDTH)
        else:
            linear(f"{block}.mlp.conv1", WIDTH, 2 * WIDTH, 3, 3)
            linear(f"{block}.mlp.conv2", 2 * WIDTH, WIDTH, 3, 3)
    norm("to_logits.0")
    linear("to_logits.1", WIDTH, kind.codes)
    return {f"transformer.{name}": shape for name, shape in shapes.items()}


def clip_shapes() -> dict[str, tuple[int, ...]]:
    """``transformer.condition_emb.*``, without the first word."""
    width = TEXT_WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (512 + MERGES + 2, width),
        "positional_embedding": (POSITIONS, width),
        "text_projection": (width, width),
    }
    for stem in (
        "ln_final",
        *(f"transformer.resblocks.{n}.ln_{m}" for n in range(TEXT_LAYERS) for m in (1, 2)),
    ):
        shapes[f"{stem}.weight"] = shapes[f"{stem}.bias"] = (width,)
    for layer in range(TEXT_LAYERS):
        block = f"transformer.resblocks.{layer}"
        for name, rows in (("attn.in_proj_weight", 3), ("attn.out_proj.weight", 1), ("mlp.c_fc.weight", 4)):
            shapes[f"{block}.{name}"] = (rows * width, width)
        shapes[f"{block}.mlp.c_proj.weight"] = (width, 4 * width)
        for name, rows in (("attn.in_proj_bias", 3), ("attn.out_proj.bias", 1), ("mlp.c_fc.bias", 4)):
            shapes[f"{block}.{name}"] = (rows * width,)
        shapes[f"{block}.mlp.c_proj.bias"] = (width,)
    return {f"condition_emb.{name}": shape for name, shape in shapes.items()}


def schedule_tables(codes: int) -> State:
    """The buffers of the released schedule: cumulative ones with the identity as an extra last element."""
    line = torch.arange(STEPS, dtype=torch.float64) / (STEPS - 1)
    identity = torch.tensor([1.0, 0.0], dtype=torch.float64)
    cumulative = [0.99999 + line * (0.000009 - 0.99999), 0.000009 + line * (0.99999 - 0.000009)]
    keep, mask = (torch.cat([part, last[None]]) for part, last in zip(cumulative, identity, strict=True))
    a = keep[:STEPS] / torch.cat([identity[:1], keep[: STEPS - 1]])
    c = 1 - (1 - mask[:STEPS]) / (1 - torch.cat([identity[1:], mask[: STEPS - 1]]))
    tables = {
        "log_at": a.log(),
        "log_bt": ((1 - a - c) / codes).log(),
        "log_ct": c.log(),
        "log_cumprod_at": keep.log(),
        "log_cumprod_bt": ((1 - keep - mask) / codes).log(),
        "log_cumprod_ct": mask.log(),
        "log_1_min_ct": (1 - c + 1e-40).log(),
        "log_1_min_cumprod_ct": (1 - mask + 1e-40).log(),
    }
    return {name: table.float() for name, table in tables.items()} | {
        "Lt_history": torch.rand(STEPS),
        "Lt_count": torch.full((STEPS,), 11.0),
    }


def random_state(kind: Kind, seed: int, *, learned: bool) -> State:
    """Return the contents of ``ema``: network, CLIP for text models, schedule, embedding of no caption."""
    torch.manual_seed(seed)
    shapes = network_shapes(kind) | (clip_shapes() if kind.condition == "text" else {})
    state = {
        name: torch.randn(shape) / math.sqrt(shape[-1] if len(shape) > 1 else 4)
        for name, shape in shapes.items()
    }
    state |= schedule_tables(kind.codes)
    if learned:
        state["empty_text_embed"] = torch.randn(POSITIONS, TEXT_WIDTH, dtype=torch.float64)
    return state


def checkpoint_of(kind: Kind, codec: Published, *, learned: bool = True) -> dict[str, Any]:
    """Return a full checkpoint in which ``ema`` and ``model`` differ as after training."""
    last = {f"transformer.{name}": value for name, value in random_state(kind, 1, learned=learned).items()}
    ends = {"encoder": ["enc"], "quant_conv": ["enc"], "quantize": ["enc", "dec"]}
    for name, value in codec_state(codec).items():
        for end in ends.get(name.partition(".")[0], ["dec"]):
            last[f"content_codec.{end}.{name}"] = value
    return {
        "last_epoch": 49,
        "last_iter": 1234,
        "model": last,
        "ema": random_state(kind, 2, learned=learned),
        "clip_grad_norm": {"start_iteration": 0, "end_iteration": 5000, "max_norm": 0.5},
        "optimizer_and_scheduler": {
            "none": {
                "optimizer": {
                    "module": {"state": {0: {"step": 7, "exp_avg": torch.zeros(3)}}},
                    "step_iteration": 1,
                },
                "scheduler": {"module": {"best": 0.25, "num_bad_epochs": 3}},
                "start_epoch": 0,
            }
        },
    }


def codec_state(codec: Published) -> State:
    """Return a tokenizer's random weights under its authors' names."""
    return dict(build(codec, seed=3).state_dict())


def write(folder: Path, checkpoint: dict[str, Any], name: str = "ithq_learnable.pth") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, folder / name)
    return folder / name
