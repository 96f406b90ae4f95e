"""Tokenization from S3 to S3 equals tokenization on a disk."""

from pathlib import Path

import pytest
import torch

from tests.preparation.test_tokenize_shards import SHAPE, image_samples
from tests.s3.proxy import Fault, FaultProxy, in_turn
from vqd_scale.cli.tokenize_shards import main
from vqd_scale.core.atomic_io import Location, file_sizes
from vqd_scale.core.s3 import S3Path
from vqd_scale.core.s3_client import RetryPolicy, client_of
from vqd_scale.data.shards.shard_io import KEY, ShardRecipe, write_shard_set
from vqd_scale.models.bundle import save_tokenizer
from vqd_scale.tokenizers.vqgan import VQGAN

pytestmark = pytest.mark.s3


def tokenize(images: Location, out: Location, folder: Path, workers: int = 1) -> None:
    file = folder / "tokenize.yaml"
    file.write_text(
        "size: 16\nbatch_size: 4\nmax_bad_fraction: 0.2\ncaptions: {context_length: 8, bpe_merges: 300}\n"
    )
    paths = [f"images={images}", f"output={out}", f"tokenizer={folder / 'tokenizer'}"]
    for worker in range(workers):
        main([str(file), *paths, "--worker", str(worker), "--num-workers", str(workers)])


def test_tokens_on_s3_equal_local_tokens(
    folder: S3Path, proxy: FaultProxy, short_retries: RetryPolicy, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    vqgan = VQGAN(SHAPE)
    vqgan.quantize.embedding.copy_(torch.randn(9, 4) * 0.1)
    save_tokenizer(tmp_path / "tokenizer", SHAPE, vqgan.state_dict())
    recipes = [
        ShardRecipe("000000.tar", 5, lambda: image_samples(0, 5)),
        ShardRecipe("000001.tar", 3, lambda: [*image_samples(5, 2), {KEY: "bad", "png": b"no", "txt": "?"}]),
    ]
    for place in (tmp_path, folder):
        write_shard_set(place / "images", {"kind": "images"}, recipes, "images")
    tokenize(tmp_path / "images", tmp_path / "tokens", tmp_path)
    proxy.follow(in_turn([Fault("500"), Fault("reset", 900), Fault("truncate", 100)], ending=".tar"))
    tokenize(proxy.to(folder / "images"), folder / "tokens", tmp_path, workers=2)
    assert {"500", "reset", "truncate"} <= set(proxy.faults)
    local_tokens, remote_tokens = tmp_path / "tokens", folder / "tokens"
    names = file_sizes(local_tokens).keys()
    assert {"000000.tar", "000000.npz", "index.json", "quarantine.jsonl", "statistics.json"} <= names
    assert names == file_sizes(remote_tokens).keys()
    for name in names:
        assert (remote_tokens / name).read_bytes() == (local_tokens / name).read_bytes()
    before = modified(remote_tokens)
    tokenize(folder / "images", remote_tokens, tmp_path)
    tar_times = {name: time for name, time in before.items() if name.endswith(".tar")}
    assert tar_times.items() <= modified(remote_tokens).items()


def modified(folder: S3Path) -> dict[str, object]:
    """Return the modification time of each object in a folder."""
    listing = client_of(folder.endpoint).call_s3(
        "list_objects_v2", Bucket=folder.bucket, Prefix=folder.key + "/"
    )
    return {Path(entry["Key"]).name: entry["LastModified"] for entry in listing["Contents"]}
