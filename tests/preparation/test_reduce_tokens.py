import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vqd_scale.cli.reduce_codebook import main
from vqd_scale.core.atomic_io import read_json
from vqd_scale.core.errors import UserError
from vqd_scale.data.shards.decode import decode_array
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import KEY, ShardRecipe, read_shard, write_shard_set
from vqd_scale.models.bundle import load_tokenizer, save_tokenizer, tokenizer_fingerprint
from vqd_scale.preparation.reduce_tokens import count_codes, reduce_by_map, reduce_tokenizer, remap_shards
from vqd_scale.preparation.tokenize_shards import TokenSetMeta
from vqd_scale.tokenizers.codebook.reduction import Reduced
from vqd_scale.tokenizers.config import VQGANConfig
from vqd_scale.tokenizers.vqgan import VQGAN

CODES = 10
USED = [1, 4, 5, 8]
CPU = torch.device("cpu")
SHAPE = VQGANConfig(
    codebook_size=CODES, code_dim=4, channels=8, channel_multipliers=(1, 2), num_res_blocks=1, norm="none"
)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Folder with a tokenizer of 10 codes, of which the token shards use 4."""
    tokenizer_at(tmp_path / "full", seed=0)
    meta = TokenSetMeta(CODES, (2, 3), tokenizer_fingerprint(tmp_path / "full"), "words", {"a.tar": "b"})
    recipes = [
        ShardRecipe(f"{number:06d}.tar", 7, lambda number=number: [sample(number, row) for row in range(7)])
        for number in range(2)
    ]
    write_shard_set(tmp_path / "tokens", {"kind": "tokens", **asdict(meta)}, recipes, "tokens")
    return tmp_path


def tokenizer_at(folder: Path, seed: int) -> VQGAN:
    torch.manual_seed(seed)
    tokenizer = VQGAN(SHAPE)
    tokenizer.quantize.embedding.normal_()
    save_tokenizer(folder, SHAPE, tokenizer.state_dict())
    return tokenizer


def sample(shard: int, row: int) -> dict[str, object]:
    generator = np.random.default_rng(100 * shard + row)
    return {
        KEY: f"{shard}{row}",
        "tokens.npy": np.array(USED, np.uint16)[generator.integers(4, size=6)],
        "text.npy": np.arange(5, dtype=np.int32),
        "txt": f"picture {row}",
    }


def tokens_of(folder: Path) -> torch.Tensor:
    shards = ShardSet.open(folder).shards
    rows = [decode_array(row["tokens.npy"]).astype(np.int64) for shard in shards for row in read_shard(shard)]
    return torch.from_numpy(np.stack(rows))


def test_codes_are_counted_over_all_shards(world: Path) -> None:
    counts = count_codes(world / "tokens")
    assert torch.equal(counts, torch.bincount(tokens_of(world / "tokens").flatten(), minlength=CODES))
    assert counts.nonzero()[:, 0].tolist() == USED


@pytest.mark.parametrize(("unused", "codes"), [("bucket", 5), ("nearest", 4)])
def test_remapped_shards_decode_to_equal_images(world: Path, unused: str, codes: int) -> None:
    """Decoded images and all other members of a sample are bit equal after remapping."""
    full, fewer_codes, counted = (str(world / name) for name in ("full", "fewer", "counts.json"))
    for step in (
        ["count", str(world / "tokens"), counted],
        ["reduce", full, fewer_codes, "--counts", counted, "--unused", unused],
        ["remap", str(world / "tokens"), str(world / "out"), "--tokenizer", full, "--reduced", fewer_codes],
    ):
        main(step)
    reduced_tokenizer, full_tokenizer = (
        load_tokenizer(world / "fewer", CPU),
        load_tokenizer(world / "full", CPU),
    )
    before, after = tokens_of(world / "tokens"), tokens_of(world / "out")
    assert reduced_tokenizer.codes == codes == int(after.max()) + 1
    assert torch.equal(
        reduced_tokenizer.decode(after.view(-1, 2, 3)), full_tokenizer.decode(before.view(-1, 2, 3))
    )
    meta = TokenSetMeta.of(ShardSet.open(world / "out"))
    meta.check(world / "fewer", None, world / "out")
    assert (meta.codes, meta.grid, meta.source) == (codes, (2, 3), {"a.tar": "b"})
    other_members = [
        [{name: value for name, value in row.items() if name != "tokens.npy"} for row in read_shard(shard)]
        for folder in ("tokens", "out")
        for shard in ShardSet.open(world / folder).shards
    ]
    assert other_members[:2] == other_members[2:]
    assert read_json(world / "counts.json", "counts")["used"] == 0.4


def test_rare_codes_map_to_the_bucket(world: Path) -> None:
    counts = torch.tensor([0, 9, 0, 0, 2, 9, 0, 0, 9, 0])
    reduced = reduce_tokenizer(world / "full", world / "fewer", counts, min_count=3)
    remap_shards(world / "tokens", world / "out", world / "full", world / "fewer")
    before, after = tokens_of(world / "tokens"), tokens_of(world / "out")
    assert torch.equal(after, reduced.map[before])
    assert torch.equal(after == 0, before == 4)


def test_map_of_another_tokenizer_is_checked(world: Path) -> None:
    map = torch.tensor([0, 1, 0, 0, 2, 3, 0, 0, 4, 0])
    save_file({"map": map}, world / "map.safetensors")
    main(["reduce", str(world / "full"), str(world / "a"), "--map", str(world / "map.safetensors")])
    reduce_tokenizer(world / "full", world / "b", count_codes(world / "tokens"))
    first, second = (load_tokenizer(world / name, CPU) for name in ("a", "b"))
    assert isinstance(first, Reduced)
    assert isinstance(second, Reduced)
    assert torch.equal(first.map, second.map)
    with pytest.raises(UserError, match="maps 9 codes, but the tokenizer has 10"):
        reduce_by_map(world / "full", world / "c", map[:-1])


def remap(world: Path, full: str, reduced: str) -> None:
    remap_shards(world / "tokens", world / "out", world / full, world / reduced)


def reduce(world: Path, full: str, counted: int) -> None:
    reduce_tokenizer(world / full, world / "x", torch.ones(counted, dtype=torch.int64))


@pytest.mark.parametrize(
    ("refused", "arguments", "message"),
    [
        (remap, ("other", "fewer"), "from another tokenizer"),
        (remap, ("full", "strange"), "is not a reduction of the tokenizer"),
        (remap, ("full", "full"), "is not a reduction of the tokenizer"),
        (reduce, ("fewer", 5), "reduced already"),
        (reduce, ("full", 9), "has 10 codes, but those of 9 were counted"),
        (reduce, ("full", 10), "nothing to reduce"),
    ],
)
def test_mismatched_map_is_refused(
    world: Path, refused: Callable[..., None], arguments: tuple[str | int, ...], message: str
) -> None:
    counts = count_codes(world / "tokens")
    reduce_tokenizer(world / "full", world / "fewer", counts)
    tokenizer_at(world / "other", seed=1)
    reduce_tokenizer(world / "other", world / "strange", counts)
    with pytest.raises(UserError, match=message):
        refused(world, *arguments)
    assert not (world / "out").exists()


@pytest.mark.parametrize("change", ["other", "tokenizer", "shape", "number"])
def test_counts_of_another_tokenizer_are_refused(
    world: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = world / "counts.json"
    main(["count", str(world / "tokens"), str(counts)])
    tokenizer_at(world / "other", seed=1)
    content = read_json(counts, "counts")
    if change == "tokenizer":
        del content["tokenizer"]
    content["counts"] = {"shape": 5, "number": [10**30] * CODES}.get(change, content["counts"])
    counts.write_text(json.dumps(content))
    full = "other" if change == "other" else "full"
    with pytest.raises(SystemExit) as end:
        main(["reduce", str(world / full), str(world / "fewer"), "--counts", str(counts)])
    assert end.value.code == 2
    assert str(counts) in capsys.readouterr().err
    assert not (world / "fewer").exists()


def test_remapped_shards_of_other_tokens_are_not_reused(world: Path) -> None:
    reduce_tokenizer(world / "full", world / "fewer", count_codes(world / "tokens"))
    remap(world, "full", "fewer")
    source = ShardSet.open(world / "tokens")
    shutil.rmtree(world / "tokens")
    recipe = ShardRecipe("000000.tar", 7, lambda: [sample(5, row) for row in range(7)])
    write_shard_set(world / "tokens", source.meta, [recipe], "tokens")
    with pytest.raises(UserError, match="remapped"):
        remap(world, "full", "fewer")


@pytest.mark.parametrize("meta", [{"grid": None}, {"codes": "9"}, {"source": []}])
def test_tokens_described_in_another_shape_are_refused(world: Path, meta: dict[str, Any]) -> None:
    source = ShardSet.open(world / "tokens")
    with pytest.raises(UserError, match="description of these tokens cannot be read"):
        TokenSetMeta.of(replace(source, meta={**source.meta, **meta}))


def test_invalid_token_is_named(world: Path) -> None:
    meta = TokenSetMeta.of(ShardSet.open(world / "tokens"))
    invalid_sample = {KEY: "odd", "tokens.npy": np.array([10], np.uint16)}
    write_shard_set(
        world / "bad",
        {"kind": "tokens", **asdict(meta)},
        [ShardRecipe("a.tar", 1, lambda: [invalid_sample])],
        "t",
    )
    with pytest.raises(UserError, match="'odd' has the token 10, but its tokenizer has 10 codes"):
        count_codes(world / "bad")
