"""Datasets in MSCOCO's and img2dataset's layouts, from the download to a trained model."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from webdataset.writer import TarWriter

from tests.data.sources.test_coco import IDS, captions_file
from tests.data.sources.test_img2dataset import jpeg, metadata
from tests.preparation.test_tokenize_shards import SHAPE
from tests.training import rank_processes
from vqd_scale.cli import make_shards, tokenize_shards
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import KEY
from vqd_scale.models.bundle import save_tokenizer
from vqd_scale.preparation.tokenize_shards import TokenSetMeta
from vqd_scale.tokenizers.vqgan import VQGAN

pytestmark = pytest.mark.ranks

TOKENIZE = {"size": 32, "captions": {"context_length": 8, "bpe_merges": 300}, "batch_size": 4}
TRAIN = {
    "total_images": 32,
    "engine": {"precision": "fp32", "param_persistence_threshold": 0},
    "denoiser": {"width": 16, "layers": 1, "heads": 2, "condition": {"kind": "text", "width": 16}},
    "text": {"kind": "tower", "context_length": 8, "width": 16, "heads": 2, "layers": 1, "bpe_merges": 300},
    "diffusion": {"kind": "paper", "steps": 10},
    "log": {"every_images": 8},
}


def coco(folder: Path) -> Path:
    """Write the unpacked archives of MSCOCO 2014's training split."""
    names = {number: f"COCO_train2014_{number:012d}.jpg" for number in IDS}
    (folder / "annotations").mkdir(parents=True)
    (folder / "train2014").mkdir()
    captions = json.dumps(captions_file("train2014", names))
    (folder / "annotations" / "captions_train2014.json").write_text(captions)
    for number, name in names.items():
        (folder / "train2014" / name).write_bytes(jpeg(number))
    return folder


def laion(folder: Path) -> Path:
    """Write two tars and statistics as img2dataset does."""
    folder.mkdir()
    for shard in range(2):
        rows = [metadata(6 * shard + place) | {"width": 512, "height": 384} for place in range(6)]
        with TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for place, row in enumerate(rows):
                members = {"jpg": jpeg(6 * shard + place), "txt": row["caption"]}
                writer.write({KEY: row["key"], **members, "json": json.dumps(row).encode()})
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": 8, "successes": 6}))
    return folder


def test_train_on_coco_and_laion_layouts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vqgan = VQGAN(SHAPE)
    vqgan.quantize.embedding.copy_(torch.randn(9, 4) * 0.1)
    save_tokenizer(tmp_path / "tokenizer", SHAPE, vqgan.state_dict())
    (tmp_path / "tokenize.yaml").write_text(yaml.safe_dump(TOKENIZE))
    shards = {name: tmp_path / f"{name}-shards" for name in ("coco", "laion")}
    tokens = {name: tmp_path / f"{name}-tokens" for name in shards}

    make_shards.main(["coco", str(coco(tmp_path / "coco")), str(shards["coco"]), "year=2014", "split=train"])
    art = ["--config", "configs/shards/laion-art.yaml"]
    make_shards.main(["img2dataset", str(laion(tmp_path / "laion")), "--output", str(shards["laion"]), *art])
    for name in shards:
        for worker in range(2):
            paths = [f"images={shards[name]}", f"output={tokens[name]}", f"tokenizer={tmp_path}/tokenizer"]
            worker_arguments = ["--worker", str(worker), "--num-workers", "2"]
            tokenize_shards.main([str(tmp_path / "tokenize.yaml"), *paths, *worker_arguments])

    token_sets = {name: ShardSet.open(folder) for name, folder in tokens.items()}
    assert token_sets["coco"].count == len(IDS)
    assert sum(token_sets["coco"].captions) == sum(number % 3 + 1 for number in IDS)
    # Accepted by the filters of laion-art: at least three words, a high aesthetic score, and safe.
    assert token_sets["laion"].count == len({1, 3, 5, 7, 9, 11} - {3, 9} - {7})
    assert TokenSetMeta.of(token_sets["laion"]).grid == (8, 8)

    sources = [{"path": str(folder)} for folder in tokens.values()]
    data = {"sources": sources, "global_batch_size": 4, "shuffle_window": 4, "captions": "random"}
    run = {"run": str(tmp_path / "model"), "tokenizer": str(tmp_path / "tokenizer"), "data": data}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(TRAIN | run))
    completed = rank_processes.run(
        "vqd_scale.cli.train", f"{tmp_path}/train.yaml", ranks=1, output_folder=tmp_path / "said"
    )
    assert completed.returncode == 0, completed.stderr
    assert (tmp_path / "model" / "export" / "config.json").is_file()
    assert not list((tmp_path / "model").glob("quarantine*"))
