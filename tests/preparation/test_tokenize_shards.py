import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from webdataset.compat import WebDataset

from vqd_scale.core.atomic_io import Location
from vqd_scale.core.config import load_config, to_yaml
from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, uniforms
from vqd_scale.data.shards.parallel_writer import Worker
from vqd_scale.data.shards.shard_index import Shard, ShardSet
from vqd_scale.data.shards.shard_io import KEY, Sample, ShardRecipe, read_shard, write_shard_set
from vqd_scale.data.transforms import NearCenterCrop
from vqd_scale.models.bundle import load_tokenizer, save_tokenizer
from vqd_scale.preparation import tokenize_shards as tokenize
from vqd_scale.preparation.reduce_tokens import reduce_by_map, remap_shards
from vqd_scale.preparation.tokenize_shards import (
    CaptionsConfig,
    EncodingConfig,
    TokenizeConfig,
    TokenSetMeta,
    ViewsConfig,
    tokenize_shards,
)
from vqd_scale.text.clip import CaptionTokenizer
from vqd_scale.tokenizers.base import to_signal
from vqd_scale.tokenizers.taming import TamingGumbel, TamingGumbelConfig
from vqd_scale.tokenizers.vqgan import VQGAN, VQGANConfig

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SHAPE = VQGANConfig(
    codebook_size=9,
    code_dim=4,
    channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    patch_size=2,
    norm="none",
)


def png(seed: int, side: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, format="PNG")
        return file.getvalue()


def pictures(start: int, count: int) -> list[Sample]:
    return [
        {KEY: f"{n:05d}", "png": png(n), "txt": f"picture {n}", "json": {"number": n}, "cls": n % 3}
        for n in range(start, start + count)
    ]


@pytest.fixture
def config(tmp_path: Path) -> TokenizeConfig:
    torch.manual_seed(0)
    vqgan = VQGAN(SHAPE)
    vqgan.quantize.embedding.copy_(torch.randn(9, 4) * 0.1)
    save_tokenizer(tmp_path / "tokenizer", SHAPE, vqgan.state_dict())
    recipes = [
        ShardRecipe("000000.tar", 5, lambda: pictures(0, 5)),
        ShardRecipe("000001.tar", 3, lambda: [*pictures(5, 2), {KEY: "bad", "png": b"no", "txt": "?"}]),
    ]
    write_shard_set(tmp_path / "images", {"kind": "images"}, recipes, "images")
    return TokenizeConfig(
        images=tmp_path / "images",
        output=tmp_path / "tokens",
        tokenizer=tmp_path / "tokenizer",
        size=16,
        captions=CaptionsConfig(context_length=8, bpe_merges=300),
        max_bad_fraction=0.2,
        batch_size=4,
    )


def tokenized(config: TokenizeConfig) -> ShardSet:
    """By one worker."""
    shards = tokenize_shards(config, CPU)
    assert shards is not None
    return shards


def test_tokens_are_the_tokenizers_and_everything_else_is_kept(config: TokenizeConfig) -> None:
    shards = tokenized(config)
    tokenizer = load_tokenizer(config.tokenizer, CPU)
    assert shards.count == 7
    for number, row in enumerate(row for shard in shards.shards for row in rows(shard)):
        pixels = torch.from_numpy(np.asarray(Image.open(io.BytesIO(png(number)))).copy())
        expected = tokenizer.encode(to_signal(pixels.permute(2, 0, 1)[None])).flatten()
        assert row["tokens.npy"].dtype == np.uint16
        assert row["tokens.npy"].tolist() == expected.tolist()
        assert (row["text.npy"] == CaptionTokenizer(8, 300)([f"picture {number}"])[0]).all()
        assert row["txt"] == f"picture {number}"
        assert row["json"] == {"number": number}
        assert row["cls"] == number % 3
    assert "bad" in (config.output / "quarantine.jsonl").read_text()


def test_codes_do_not_depend_on_the_batch_and_a_second_run_changes_no_byte(
    config: TokenizeConfig, tmp_path: Path
) -> None:
    first = tokenized(config)
    again = tokenized(config)
    assert first == again
    other = config.model_copy(update={"output": tmp_path / "other", "batch_size": 3})
    for mine, theirs in zip(first.shards, tokenized(other).shards, strict=True):
        assert mine.sha256 == theirs.sha256


def test_the_set_knows_its_tokenizer_and_vocabulary(config: TokenizeConfig, tmp_path: Path) -> None:
    meta = TokenSetMeta.of(tokenized(config))
    assert (meta.codes, meta.grid) == (9, (4, 4))
    meta.check(config.tokenizer, CaptionTokenizer(8, 300), config.output)
    with pytest.raises(UserError, match="not tokenized with"):
        meta.check(config.tokenizer, CaptionTokenizer(9, 300), config.output)
    save_tokenizer(tmp_path / "other", SHAPE, VQGAN(SHAPE).state_dict())
    with pytest.raises(UserError, match="from another tokenizer"):
        meta.check(tmp_path / "other", CaptionTokenizer(8, 300), config.output)


def test_another_tokenizer_into_the_same_folder_is_refused(config: TokenizeConfig, tmp_path: Path) -> None:
    tokenized(config)
    save_tokenizer(tmp_path / "other", SHAPE, VQGAN(SHAPE).state_dict())
    with pytest.raises(UserError, match="another"):
        tokenize_shards(config.model_copy(update={"tokenizer": tmp_path / "other"}), CPU)


def test_trap_23_sampled_codes_are_asked_for_repeat_and_are_said(
    config: TokenizeConfig, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    shape = TamingGumbelConfig(
        codebook_size=9,
        code_dim=4,
        channels=32,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        latent_channels=4,
        attention=(),
    )
    save_tokenizer(tmp_path / "gumbel", shape, TamingGumbel(shape).state_dict())
    best = config.model_copy(update={"tokenizer": tmp_path / "gumbel", "output": tmp_path / "best"})
    drawn = best.model_copy(update={"output": tmp_path / "drawn", "encoding": EncodingConfig(sample_codes=3)})
    again = drawn.model_copy(update={"output": tmp_path / "again", "batch_size": 3})
    digests = [[shard.sha256 for shard in tokenized(one).shards] for one in (best, best, drawn, again)]
    assert digests[0] == digests[1]
    assert digests[2] == digests[3]
    assert not set(digests[0]) & set(digests[2])
    assert TokenSetMeta.of(ShardSet.open(best.output)).encoding == "best codes, fp32"
    assert TokenSetMeta.of(ShardSet.open(drawn.output)).encoding == "codes sampled with seed 3, fp32"
    with pytest.raises(UserError, match="another"):
        tokenize_shards(best.model_copy(update={"encoding": EncodingConfig(sample_codes=3)}), CPU)
    with pytest.raises(UserError, match="VQGAN gives no probabilities"):
        tokenize_shards(config.model_copy(update={"encoding": EncodingConfig(sample_codes=3)}), CPU)


def test_bfloat16_gives_mostly_the_same_codes_and_is_said(config: TokenizeConfig, tmp_path: Path) -> None:
    quick = config.model_copy(
        update={"output": tmp_path / "quick", "encoding": EncodingConfig(precision="bf16")}
    )
    codes = [
        np.concatenate([row["tokens.npy"] for shard in tokenized(one).shards for row in rows(shard)])
        for one in (config, quick)
    ]
    assert (codes[0] == codes[1]).mean() > 0.9
    assert TokenSetMeta.of(ShardSet.open(quick.output)).encoding == "best codes, bf16"


def rows(shard: Shard) -> list[dict[str, Any]]:
    return list(cast(Any, WebDataset(str(shard.path), shardshuffle=False).decode()))


def test_wrong_sizes_and_wrong_shards_are_one_sentence(config: TokenizeConfig) -> None:
    with pytest.raises(UserError, match="not a multiple"):
        tokenize_shards(config.model_copy(update={"size": 18}), CPU)
    with pytest.raises(UserError, match="contain no tokens"):
        TokenSetMeta.of(ShardSet.open(config.images))
    assert next(iter(read_shard(ShardSet.open(config.images).shards[0])))[KEY] == "00000"


def content(folder: Location) -> dict[str, bytes]:
    """Every file of a set, without what a kill may leave behind."""
    assert isinstance(folder, Path)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".partial"}


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_any_number_of_workers_makes_the_same_bytes(
    config: TokenizeConfig, tmp_path: Path, workers: int
) -> None:
    tokenized(config)
    many = config.model_copy(update={"output": tmp_path / "many"})
    for worker in range(1, workers):
        assert tokenize_shards(many, CPU, Worker(worker, workers)) is None
        with pytest.raises(UserError, match="half-made"):
            ShardSet.open(many.output)
    assert tokenize_shards(many, CPU, Worker(0, workers)) is not None
    assert content(many.output) == content(config.output)
    # Once more, by one of others: the set is whole and stays what it is.
    assert tokenize_shards(many, CPU, Worker(1, 2)) == ShardSet.open(many.output)
    assert content(many.output) == content(config.output)


@pytest.mark.parametrize("moment", ["statistics_of", "finish_set", "forget_parts"])
def test_two_workers_that_are_done_at_the_same_time(
    config: TokenizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    tokenized(config)
    both = config.model_copy(update={"output": tmp_path / "both"})
    assert tokenize_shards(both, CPU, Worker(0, 2)) is None
    usual = getattr(tokenize, moment)
    others: list[ShardSet | None] = []

    def meanwhile(*arguments: object) -> object:
        monkeypatch.setattr(tokenize, moment, usual)
        others.append(tokenize_shards(both, CPU, Worker(0, 2)))
        return usual(*arguments)

    monkeypatch.setattr(tokenize, moment, meanwhile)
    assert tokenize_shards(both, CPU, Worker(1, 2)) == others[0] is not None
    assert content(both.output) == content(config.output)


def test_workers_that_do_not_exist() -> None:
    with pytest.raises(UserError, match="from 0 to 3"):
        Worker(4, 4)


@pytest.mark.ranks
def test_killed_at_any_point_and_started_again(config: TokenizeConfig, tmp_path: Path) -> None:
    tokenized(config)
    ends = killing(config, "points", tmp_path / "killed", 13)
    # After the last of these points nothing is left to be written.
    assert ends.split() == ["0"] + 12 * ["-9"]
    for folder in (tmp_path / "killed").iterdir():
        assert content(folder) == content(config.output), folder


@pytest.mark.long
@pytest.mark.ranks
def test_killed_twenty_times_at_random_moments(config: TokenizeConfig, tmp_path: Path) -> None:
    recipes = [
        ShardRecipe(f"{shard:06d}.tar", 20, lambda shard=shard: pictures(20 * shard, 20))
        for shard in range(6)
    ]
    write_shard_set(tmp_path / "more", {"kind": "images"}, recipes, "images")
    config = config.model_copy(update={"images": tmp_path / "more"})
    tokenized(config)
    killing(config, "moments", tmp_path / "killed", 20)
    sets = [folder for folder in (tmp_path / "killed").iterdir() if folder.name != "alone"]
    assert sets
    for folder in sets:
        assert content(folder) == content(config.output), folder


def killing(config: TokenizeConfig, what: str, folder: Path, count: int) -> str:
    folder.mkdir()
    file = folder.with_suffix(".yaml")
    file.write_text(to_yaml(config))
    done = subprocess.run(
        [sys.executable, "-m", "tests.preparation.killed", str(file), what, str(folder), str(count)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_too_many_bad_samples_end_the_work_and_are_reported(config: TokenizeConfig) -> None:
    with pytest.raises(UserError, match=r"more than max_bad_fraction=0.1 of the 8 samples"):
        tokenize_shards(config.model_copy(update={"max_bad_fraction": 0.1}), CPU)
    assert "no known kind" in (config.output / "quarantine.jsonl").read_text()
    with pytest.raises(UserError, match="half-made"):
        ShardSet.open(config.output)
    assert tokenized(config).count == 7


def test_statistics(config: TokenizeConfig) -> None:
    shards = tokenized(config)
    codes = np.concatenate([row["tokens.npy"] for shard in shards.shards for row in rows(shard)])
    counts = [int((codes == code).sum()) for code in range(9)]
    shares = np.array([count for count in counts if count]) / len(codes)
    found = json.loads((config.output / "statistics.json").read_text())
    assert (found["samples"], found["captions"], found["counts"]) == (7, 7, counts)
    assert found["failures"] == {"is not a readable image (of no known kind)": 1}
    assert (found["usage"]["codes"], found["usage"]["tokens"]) == (9, 7 * 16)
    assert found["usage"]["perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_all_captions_of_a_picture_get_their_ids(config: TokenizeConfig, tmp_path: Path) -> None:
    several = ["picture 1", "one picture", "a third"]
    samples = [
        {KEY: "a", "png": png(1), "txt": "picture 1", "json": {"captions": several}},
        {KEY: "b", "png": png(2), "txt": "picture 2", "json": {"captions": ["picture 2"]}},
        {KEY: "c", "png": png(3), "txt": "picture 3", "json": {"caption": "picture 3"}},
        {KEY: "d", "png": png(4), "txt": "picture 4", "json": {"captions": ["picture 4", " "]}},
    ]
    write_shard_set(
        tmp_path / "several",
        {},
        [ShardRecipe("000000.tar", 4, lambda: samples)],
        "images",
        max_bad_fraction=1,
    )
    config = config.model_copy(update={"images": tmp_path / "several", "max_bad_fraction": 0.5})
    shards = tokenized(config)
    ids = CaptionTokenizer(8, 300)
    expected = [ids(several), ids(["picture 2"]), ids(["picture 3"])[0]]
    for row, of_row in zip(rows(shards.shards[0]), expected, strict=True):
        assert row["text.npy"].tolist() == of_row.tolist()
    assert shards.captions == (5,)
    assert "has an empty caption" in (config.output / "quarantine.jsonl").read_text()


def test_sets_without_captions(config: TokenizeConfig, tmp_path: Path) -> None:
    samples = [{KEY: "a", "png": png(1), "cls": 4}, {KEY: "b", "png": png(2), "txt": "b", "cls": 0}]
    write_shard_set(tmp_path / "classes", {}, [ShardRecipe("000000.tar", 2, lambda: samples)], "images")
    config = config.model_copy(update={"images": tmp_path / "classes"})
    with pytest.raises(UserError, match="'a' for one has no 'txt'"):
        tokenize_shards(config, CPU)
    config = config.model_copy(update={"captions": None, "output": tmp_path / "silent"})
    shards = tokenized(config)
    first, second = rows(shards.shards[0])
    assert first.keys() & {"txt", "text.npy"} == set()
    assert (first["cls"], second["cls"], second["txt"]) == (4, 0, "b")
    meta = TokenSetMeta.of(shards)
    meta.check(config.tokenizer, None, config.output)
    with pytest.raises(UserError, match="have no caption ids"):
        meta.check(config.tokenizer, CaptionTokenizer(8, 300), config.output)


def test_views_are_crops_that_the_sample_and_the_view_choose(config: TokenizeConfig, tmp_path: Path) -> None:
    views = ViewsConfig(count=3, seed=5)
    wide = [{KEY: f"{n}", "png": png(n, 40), "txt": "noise"} for n in range(3)]
    write_shard_set(tmp_path / "wide", {}, [ShardRecipe("000000.tar", 3, lambda: wide)], "images")
    config = config.model_copy(update={"images": tmp_path / "wide", "augmented_views": views})
    shards = tokenized(config)
    tokenizer, crop = load_tokenizer(config.tokenizer, CPU), NearCenterCrop(size=16)
    found = rows(shards.shards[0])
    assert [row["__key__"] for row in found] == [f"{n}_{view}" for n in range(3) for view in range(3)]
    for place, row in enumerate(found):
        number, view = divmod(place, 3)
        draws = uniforms(5, Purpose.CROP, torch.tensor([number]), crop.draws, draw=view)[0].tolist()
        square = crop(np.array(Image.open(io.BytesIO(png(number, 40)))), draws)
        pixels = torch.from_numpy(square.copy()).permute(2, 0, 1)[None]
        assert row["tokens.npy"].tolist() == tokenizer.encode(to_signal(pixels)).flatten().tolist()
    assert len({row["tokens.npy"].tobytes() for row in found}) > 6
    assert TokenSetMeta.of(shards).views == "3 near_center crops by seed 5"
    with pytest.raises(UserError, match="views was"):
        tokenize_shards(config.model_copy(update={"augmented_views": None}), CPU)


def test_tokens_of_another_codebook_map_are_refused(config: TokenizeConfig, tmp_path: Path) -> None:
    meta = TokenSetMeta.of(tokenized(config))
    maps = [[0, 1, 2, 0, 3, 0, 0, 0, 0], [0, 1, 2, 3, 0, 0, 0, 0, 0]]
    one, other = (tmp_path / f"reduced-{number}" for number in range(2))
    for folder, map in zip((one, other), maps, strict=True):
        reduce_by_map(config.tokenizer, folder, torch.tensor(map))
    mapped = remap_shards(config.output, tmp_path / "mapped", config.tokenizer, one)
    TokenSetMeta.of(mapped).check(one, None, mapped.folder)
    for wrong in (other, config.tokenizer):
        with pytest.raises(UserError, match="from another tokenizer"):
            TokenSetMeta.of(mapped).check(wrong, None, mapped.folder)
    assert meta.device == "cpu"


@pytest.mark.parametrize(
    "recipe",
    [
        "f/pretrain",
        "l/pretrain",
        "published/coco",
        "published/cub200-s",
        "published/ffhq",
        "published/imagenet",
    ],
)
def test_recipes_find_the_tokens_of_their_own_tokenizers(recipe: str) -> None:
    made = [load_config(TokenizeConfig, path) for path in (ROOT / "configs" / "tokenize").glob("*.yaml")]
    run = yaml.safe_load((ROOT / "configs" / f"{recipe}.yaml").read_text())
    (tokens,) = (config for config in made if str(config.output) == run["data"]["path"])
    assert str(tokens.tokenizer) == run["tokenizer"]
    assert (tokens.captions is None) == (run.get("text", "some") is None)
