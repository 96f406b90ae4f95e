"""Two training configurations of F's shape on the shapes dataset, small enough for seconds."""

from pathlib import Path
from typing import Any

import yaml

CAPTIONS = {"context_length": 16, "bpe_merges": 300}
PRETRAINED, FINETUNED = 960, 160
"""Images of each stage; the first is long enough to be disturbed."""

TRAINING = {
    "engine": {"precision": "fp32", "param_persistence_threshold": 0},
    "denoiser": {
        "width": 16,
        "layers": 2,
        "heads": 2,
        "init_std": 0.2,
        "condition": {"kind": "text", "width": 16},
    },
    "text": {"kind": "tower", "width": 16, "heads": 2, "layers": 1, **CAPTIONS},
    "diffusion": {"kind": "paper", "steps": 10},
    "timestep_sampler": {"kind": "importance", "warmup": 2},
    "condition_dropout": 0.1,
    "optim": {"lr": 1e-3, "warmup_images": 32, "schedule": {"kind": "cooldown", "cooldown_fraction": 0.2}},
    "ema": {"half_life_images": 64},
    "checkpoint": {"every_images": 160},
    "log": {"every_images": 8},
    "health": {"hang_seconds": 120.0},
}


def write_recipe(folder: Path, shapes_folder: Path, runs: Path) -> None:
    """Write the stages ``pretrain.yaml`` and ``finetune.yaml``; the second starts from the first."""
    common = TRAINING | {"tokenizer": str(shapes_folder / "tokenizer" / "export")}
    folder.mkdir(parents=True, exist_ok=True)
    stages = (("pretrain", "train", PRETRAINED), ("finetune", "held_out", FINETUNED))
    for stage, part, images in stages:
        data = {"path": str(shapes_folder / "tokens" / part), "global_batch_size": 8, "shuffle_window": 16}
        values: dict[str, Any] = common | {"run": str(runs / stage), "total_images": images, "data": data}
        if stage == "finetune":
            values["init_from"] = {"bundle": str(runs / "pretrain" / "export")}
        write_yaml(folder / f"{stage}.yaml", values)


def write_yaml(path: Path, values: dict[str, Any]) -> Path:
    """Write a YAML file and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path
