"""Tokenizer runs on small images on one or several ranks: ``tokenizer_scenarios.py FOLDER OUT RUN...``.

Each returns its rows of metrics and a digest of its files.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vqd_scale.core.config import validated
from vqd_scale.core.world import World, join_world, leave_world
from vqd_scale.data.shards.shard_io import KEY, ShardRecipe, write_shard_set
from vqd_scale.training.logging.metrics import read_metrics
from vqd_scale.training.loop import train
from vqd_scale.training.tasks.config import TOKENIZER_RUNS

SIDE, LANES, IMAGES = 32, 4, 24
COMPARED = ("loss", "squared_error", "codes_used", "perceptual", "discriminator", "adversarial_weight")

VQGAN: dict[str, Any] = {
    "codebook_size": 8,
    "code_dim": 4,
    "channels": 32,
    "channel_multipliers": [1, 2],
    "num_res_blocks": 1,
    "latent_channels": 6,
}
ADVERSARY = {
    "start_images": 16,
    "network": {"channels": 32, "layers": 1},
    "optim": {"lr": 1e-3, "betas": [0.5, 0.9], "weight_decay": 0.0, "schedule": {"kind": "constant"}},
}
CRITICS = {"perceptual": {"kind": "pyramid"}, "discriminator": ADVERSARY}
KINDS: dict[str, dict[str, Any]] = {
    "averaged": {"vqgan": VQGAN, "codebook_warmup_images": 12, "dead_code_reset_every_images": 12},
    "learned": {"vqgan": {**VQGAN, "kind": "taming_vq", "attention": [], "mid_attention": False}},
    "gumbel": {
        "vqgan": {**VQGAN, "kind": "taming_gumbel", "attention": [], "mid_attention": False},
        "temperature": {"anneal_images": 48},
    },
    "grid": {
        "vqgan": {key: VQGAN[key] for key in VQGAN if "code" not in key} | {"kind": "fsq", "levels": [3, 3]}
    },
}


OPTIM = {"lr": 1e-3, "betas": [0.5, 0.9], "schedule": {"kind": "constant"}}
# From its second step on Adam amplifies the order in which a Gumbel codebook's gradients are added: at
# the rate of the others, one rank that adds a batch in two parts is 2e-3 from itself after five steps.
KINDS["gumbel, slowly"] = {**KINDS["gumbel"], "optim": {**OPTIM, "lr": 1e-5}}


def write_images(folder: Path) -> None:
    """Write deterministic smooth patterns."""

    def samples() -> list[dict[str, object]]:
        generator = np.random.default_rng(0)
        sample_rows: list[dict[str, object]] = []
        for number in range(IMAGES):
            coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            sample_rows.append({KEY: f"{number:04d}", "png": np.asarray(image), "txt": "a pattern"})
        return sample_rows

    write_shard_set(folder, {"kind": "images"}, [ShardRecipe("000000.tar", IMAGES, samples)], "pictures")


def config_of(folder: Path, run: Path, images: int, **changed: Any) -> Any:
    return validated(
        TOKENIZER_RUNS,
        {
            "run": str(run),
            "total_images": images,
            "transform": {"size": SIDE},
            "data": {"path": str(folder), "global_batch_size": LANES, "shuffle_window": 4},
            "engine": {"precision": "fp32", "param_persistence_threshold": 0},
            "optim": OPTIM,
            "losses": CRITICS,
            "ema": {"half_life_images": 16},
            "checkpoint": {"every_images": 12},
            "log": {"every_images": LANES},
            **changed,
        },
        "test",
    )


class Runner:
    """Runs in turn, each in its own folder."""

    def __init__(self, world: World, folder: Path, out: Path) -> None:
        self.world, self.folder, self.out = world, folder, out

    def run(self, name: str, images: int = 48, **changed: Any) -> dict[str, Any]:
        config = config_of(self.folder, self.out / name, images, **changed)
        train(config.build(self.world), config, self.world, name)
        rows = read_metrics(config.run / "metrics.jsonl") if self.world.is_first else []
        newest = max((config.run / "checkpoints").iterdir())
        files = [newest / "state.safetensors", *sorted(newest.glob("slices-*.safetensors"))]
        files.append(config.run / "export" / "model.safetensors")
        return {
            "rows": [{key: row[key] for key in COMPARED if key in row} for row in rows],
            "digests": [hashlib.sha256(file.read_bytes()).hexdigest() for file in files],
        }


def resumed(runner: Runner, name: str, **kind: Any) -> dict[str, Any]:
    """Return the run in one part, and in three: interrupted before the codebook joins, and in the middle."""
    whole_run = runner.run(f"{name}-whole", **kind)
    runner.run(f"{name}-parts", 16, **kind)
    # The state after a kill just before the newest checkpoint is published.
    if runner.world.is_first:
        shutil.rmtree(runner.out / f"{name}-parts" / "checkpoints" / f"{16:012d}")
    for images in (28, 48):
        parts = runner.run(f"{name}-parts", images, **kind)
    return {"whole": whole_run, "parts": parts}


def main() -> None:
    world = join_world()
    runner = Runner(world, Path(sys.argv[1]), Path(sys.argv[2]))
    results: dict[str, Any] = {}
    for name in sys.argv[3:]:
        kind, _, run_variant = name.partition(":")
        options = dict(KINDS.get(kind, {}))
        if kind == "refit":
            options = {
                "kind": "refit",
                "tokenizer": str(runner.out / f"{run_variant}-whole" / "export"),
                "codebook_size": 6,
                "pool": {"size": 300, "images": 16, "chain_length": 20},
            }
            results[name] = resumed(runner, f"refit-{run_variant}", **options)
        elif run_variant == "resumed":
            results[name] = resumed(runner, kind, **options)
        elif run_variant:
            options["engine"] = {
                "precision": "fp32",
                "param_persistence_threshold": 0,
                **json.loads(run_variant),
            }
            results[name] = runner.run(f"{kind}-{len(results)}", **options)
        else:
            results[name] = runner.run(f"{kind}-{len(results)}", **options)
    if world.is_first:
        (runner.out / "results.json").write_text(json.dumps(results))
    leave_world()


if __name__ == "__main__":
    main()
