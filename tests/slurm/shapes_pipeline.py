"""The shapes dataset, its tokenizer, and its tokens.

A separate program, because its imports are slow and should stay out of the tests' process:

    python -m tests.slurm.shapes_pipeline FOLDER
"""

import sys
from pathlib import Path

from tests.slurm.recipe import CAPTIONS, write_yaml
from vqd_scale.cli import make_shards, tokenize_shards, train_tokenizer

CODES, SIDE = 32, 32

TOKENIZER = {
    "total_images": 320,
    "transform": {"size": SIDE},
    "engine": {"precision": "fp32", "zero": {"stage": 1}},
    "vqgan": {
        "codebook_size": CODES,
        "code_dim": 8,
        "channels": 16,
        "channel_multipliers": [1],
        "num_res_blocks": 1,
        "patch_size": 8,
        "norm": "none",
    },
    "codebook_warmup_images": 64,
    "dead_code_reset_every_images": 32,
    "optim": {"lr": 1e-3, "warmup_images": 64},
    "ema": {"half_life_images": 64},
}


def write_shapes_pipeline(folder: Path) -> None:
    """Write shards, a tokenizer, and tokens of both splits."""
    shards, tokenizer = folder / "shards", folder / "tokenizer"
    sizes = ["train_samples=256", "held_out_samples=96", "samples_per_shard=32", f"image_size={SIDE}"]
    make_shards.main(["shapes", str(shards), *sizes])
    data = {"path": str(shards / "train"), "global_batch_size": 16, "shuffle_window": 32}
    path = write_yaml(folder / "tokenizer.yaml", TOKENIZER | {"run": str(tokenizer), "data": data})
    train_tokenizer.main([str(path)])
    for part in ("train", "held_out"):
        values = {
            "images": str(shards / part),
            "output": str(folder / "tokens" / part),
            "tokenizer": str(tokenizer / "export"),
            "size": SIDE,
            "captions": CAPTIONS,
        }
        tokenize_shards.main([str(write_yaml(folder / f"tokenize-{part}.yaml", values))])


if __name__ == "__main__":
    write_shapes_pipeline(Path(sys.argv[1]))
