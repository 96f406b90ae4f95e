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
from vqd_scale.preparation.config import CaptionsConfig, EncodingConfig, TokenizeConfig, ViewsConfig
from vqd_scale.preparation.reduce_tokens import reduce_by_map, remap_shards
from vqd_scale.preparation.tokenize_shards import TokenSetMeta, tokenize_shards
from vqd_scale.text.clip import CaptionTokenizer
from vqd_scale.tokenizers.base import to_signal
from vqd_scale.tokenizers.config import TamingGumbelConfig, VQGANConfig
from vqd_scale.tokenizers.taming import TamingGumbel
from vqd_scale.tokenizers.vqgan import VQGAN

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


def image_samples(start: int, count: int) -> list[Sample]:
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
        ShardRecipe("000000.tar", 5, lambda: image_samples(0, 5)),
        ShardRecipe("000001.tar", 3, lambda: [*image_samples(5, 2), {KEY: "bad", "png": b"no", "txt": "?"}]),
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


def test_tokens_equal_tokenizer_and_other_members_are_copied(config: TokenizeConfig) -> None:
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


def test_codes_do_not_depend_on_batch_and_second_run_writes_nothing(
    config: TokenizeConfig, tmp_path: Path
) -> None:
    first = tokenized(config)
    again = tokenized(config)
    assert first == again
    other_batch_config = config.model_copy(update={"output": tmp_path / "other", "batch_size": 3})
    for shard, other_shard in zip(first.shards, tokenized(other_batch_config).shards, strict=True):
        assert shard.sha256 == other_shard.sha256


def test_metadata_records_tokenizer_and_vocabulary(config: TokenizeConfig, tmp_path: Path) -> None:
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


def test_sampled_codes_are_opt_in_repeatable_and_recorded(config: TokenizeConfig, tmp_path: Path) -> None:
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
    sampled = best.model_copy(
        update={"output": tmp_path / "drawn", "encoding": EncodingConfig(sample_codes=3)}
    )
    again = sampled.model_copy(update={"output": tmp_path / "again", "batch_size": 3})
    digests = [[shard.sha256 for shard in tokenized(one).shards] for one in (best, best, sampled, again)]
    assert digests[0] == digests[1]
    assert digests[2] == digests[3]
    assert not set(digests[0]) & set(digests[2])
    assert TokenSetMeta.of(ShardSet.open(best.output)).encoding == "best codes, fp32"
    assert TokenSetMeta.of(ShardSet.open(sampled.output)).encoding == "codes sampled with seed 3, fp32"
    with pytest.raises(UserError, match="another"):
        tokenize_shards(best.model_copy(update={"encoding": EncodingConfig(sample_codes=3)}), CPU)
    with pytest.raises(UserError, match="VQGAN gives no probabilities"):
        tokenize_shards(config.model_copy(update={"encoding": EncodingConfig(sample_codes=3)}), CPU)


def test_bfloat16_codes_mostly_agree_and_are_recorded(config: TokenizeConfig, tmp_path: Path) -> None:
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


def test_mismatched_sizes_and_shards_raise_user_error(config: TokenizeConfig) -> None:
    with pytest.raises(UserError, match="not a multiple"):
        tokenize_shards(config.model_copy(update={"size": 18}), CPU)
    with pytest.raises(UserError, match="contain no tokens"):
        TokenSetMeta.of(ShardSet.open(config.images))
    assert next(iter(read_shard(ShardSet.open(config.images).shards[0])))[KEY] == "00000"


def content(folder: Location) -> dict[str, bytes]:
    """Return every file of a dataset, without leftovers of a kill."""
    assert isinstance(folder, Path)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".partial"}


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_worker_count_does_not_change_the_bytes(config: TokenizeConfig, tmp_path: Path, workers: int) -> None:
    tokenized(config)
    worker_config = config.model_copy(update={"output": tmp_path / "many"})
    for worker in range(1, workers):
        assert tokenize_shards(worker_config, CPU, Worker(worker, workers)) is None
        with pytest.raises(UserError, match="half-made"):
            ShardSet.open(worker_config.output)
    assert tokenize_shards(worker_config, CPU, Worker(0, workers)) is not None
    assert content(worker_config.output) == content(config.output)
    # A second run by one of two workers leaves the complete dataset unchanged.
    assert tokenize_shards(worker_config, CPU, Worker(1, 2)) == ShardSet.open(worker_config.output)
    assert content(worker_config.output) == content(config.output)


@pytest.mark.parametrize("moment", ["statistics_of", "finish_set", "forget_parts"])
def test_two_workers_finishing_at_the_same_time(
    config: TokenizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    tokenized(config)
    two_worker_config = config.model_copy(update={"output": tmp_path / "both"})
    assert tokenize_shards(two_worker_config, CPU, Worker(0, 2)) is None
    usual = getattr(tokenize, moment)
    earlier_results: list[ShardSet | None] = []

    def meanwhile(*arguments: object) -> object:
        monkeypatch.setattr(tokenize, moment, usual)
        earlier_results.append(tokenize_shards(two_worker_config, CPU, Worker(0, 2)))
        return usual(*arguments)

    monkeypatch.setattr(tokenize, moment, meanwhile)
    assert tokenize_shards(two_worker_config, CPU, Worker(1, 2)) == earlier_results[0] is not None
    assert content(two_worker_config.output) == content(config.output)


def test_invalid_worker_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="from 0 to 3"):
        Worker(4, 4)


@pytest.mark.ranks
def test_kill_at_any_point_and_restart(config: TokenizeConfig, tmp_path: Path) -> None:
    tokenized(config)
    ends = killing(config, "points", tmp_path / "killed", 13)
    # After the last of these points everything is written.
    assert ends.split() == ["0"] + 12 * ["-9"]
    for folder in (tmp_path / "killed").iterdir():
        assert content(folder) == content(config.output), folder


@pytest.mark.long
@pytest.mark.ranks
def test_twenty_random_kills_and_restarts(config: TokenizeConfig, tmp_path: Path) -> None:
    recipes = [
        ShardRecipe(f"{shard:06d}.tar", 20, lambda shard=shard: image_samples(20 * shard, 20))
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


def killing(config: TokenizeConfig, kill_mode: str, folder: Path, count: int) -> str:
    folder.mkdir()
    file = folder.with_suffix(".yaml")
    file.write_text(to_yaml(config))
    completed = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.preparation.kill_points",
            str(file),
            kill_mode,
            str(folder),
            str(count),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def test_too_many_bad_samples_stop_and_are_reported(config: TokenizeConfig) -> None:
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
    statistics = json.loads((config.output / "statistics.json").read_text())
    assert (statistics["samples"], statistics["captions"], statistics["counts"]) == (7, 7, counts)
    assert statistics["failures"] == {"is not a readable image (of no known kind)": 1}
    assert (statistics["usage"]["codes"], statistics["usage"]["tokens"]) == (9, 7 * 16)
    assert statistics["usage"]["perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_all_captions_of_an_image_are_tokenized(config: TokenizeConfig, tmp_path: Path) -> None:
    several = ["picture 1", "one picture", "a third"]
    samples = [
        {KEY: "a", "png": png(1), "txt": "picture 1", "json": {"captions": several}},
        {KEY: "b", "png": png(2), "txt": "picture 2", "json": {"captions": ["picture 2"]}},
        {KEY: "c", "png": png(3), "txt": "picture 3", "json": {"caption": "picture 3"}},
        {KEY: "d", "png": png(4), "txt": "picture 4", "json": {"captions": ["picture 4", " "]}},
        {KEY: "e", "png": png(5), "txt": "", "json": {"captions": ["", *several[1:]]}},
        {KEY: "f", "png": png(6), "txt": " ", "json": {"captions": ["\n", ""]}},
        {KEY: "g", "png": png(6), "txt": "picture", "json": b'{"captions": ["picture", "so nice \\ud83d"]}'},
    ]
    write_shard_set(
        tmp_path / "several",
        {},
        [ShardRecipe("000000.tar", 7, lambda: samples)],
        "images",
        max_bad_fraction=1,
    )
    config = config.model_copy(update={"images": tmp_path / "several", "max_bad_fraction": 0.5})
    shards = tokenized(config)
    ids = CaptionTokenizer(8, 300)
    expected = [ids(several), ids(["picture 2"]), ids(["picture 3"])[0], ids(["picture 4"]), ids(several[1:])]
    for row, of_row in zip(rows(shards.shards[0]), expected, strict=True):
        assert row["text.npy"].tolist() == of_row.tolist()
    assert shards.captions == (8,)
    assert "has an empty caption" in (config.output / "quarantine.jsonl").read_text()


MEMBERS: dict[str, list[dict[str, Any]]] = {
    "caption": [
        {"caption": "words", "txt": "0"},
        {"caption": "words", "json": {"captions": ["words", "others"]}},
    ],
    "json.text": [{"json": {"text": "words"}}, {"txt": "0", "json": {"text": ["words", "others"], "a": 5}}],
}


@pytest.mark.parametrize("member", MEMBERS)
def test_captions_in_another_member(config: TokenizeConfig, tmp_path: Path, member: str) -> None:
    samples = [{KEY: str(n), "png": png(n), **texts} for n, texts in enumerate(MEMBERS[member])]
    samples.append({KEY: "x", "png": png(2), "json": {"b": 5}})
    recipe = ShardRecipe("000000.tar", 3, lambda: samples)
    write_shard_set(tmp_path / "named", {}, [recipe], "images")
    named = CaptionsConfig(context_length=8, bpe_merges=300, member=member)
    options = {"images": tmp_path / "named", "max_bad_fraction": 0.5, "captions": named}
    config = config.model_copy(update=options)
    shards = tokenized(config)
    ids = CaptionTokenizer(8, 300)
    first, second = rows(shards.shards[0])
    assert (first["txt"], second["txt"]) == ("words", "words")
    assert second["text.npy"].tolist() == ids(["words", "others"]).tolist()
    assert first["text.npy"].reshape(-1).tolist() == ids(["words"])[0].tolist()
    assert sum(shards.captions) == 3
    reason = "has no caption in 'json.text'" if "." in member else "has no 'caption', only 'json', 'png'"
    assert reason in (config.output / "quarantine.jsonl").read_text()
    with pytest.raises(UserError, match="caption_member was"):
        tokenized(config.model_copy(update={"captions": named.model_copy(update={"member": "txt"})}))


def test_datasets_without_captions(config: TokenizeConfig, tmp_path: Path) -> None:
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


def test_augmented_views_are_chosen_by_sample_and_view(config: TokenizeConfig, tmp_path: Path) -> None:
    views = ViewsConfig(count=3, seed=5)
    wide = [{KEY: f"{n}", "png": png(n, 40), "txt": "noise"} for n in range(3)]
    write_shard_set(tmp_path / "wide", {}, [ShardRecipe("000000.tar", 3, lambda: wide)], "images")
    config = config.model_copy(update={"images": tmp_path / "wide", "augmented_views": views})
    shards = tokenized(config)
    tokenizer, crop = load_tokenizer(config.tokenizer, CPU), NearCenterCrop(size=16)
    token_rows = rows(shards.shards[0])
    assert [row["__key__"] for row in token_rows] == [f"{n}_{view}" for n in range(3) for view in range(3)]
    for place, row in enumerate(token_rows):
        number, view = divmod(place, 3)
        draws = uniforms(5, Purpose.CROP, torch.tensor([number]), crop.draws, draw=view)[0].tolist()
        square = crop(np.array(Image.open(io.BytesIO(png(number, 40)))), draws)
        pixels = torch.from_numpy(square.copy()).permute(2, 0, 1)[None]
        assert row["tokens.npy"].tolist() == tokenizer.encode(to_signal(pixels)).flatten().tolist()
    assert len({row["tokens.npy"].tobytes() for row in token_rows}) > 6
    assert TokenSetMeta.of(shards).views == "3 near_center crops by seed 5"
    with pytest.raises(UserError, match="views was"):
        tokenize_shards(config.model_copy(update={"augmented_views": None}), CPU)


def test_tokens_of_another_codebook_map_are_refused(config: TokenizeConfig, tmp_path: Path) -> None:
    meta = TokenSetMeta.of(tokenized(config))
    maps = [[0, 1, 2, 0, 3, 0, 0, 0, 0], [0, 1, 2, 3, 0, 0, 0, 0, 0]]
    first_folder, other_folder = (tmp_path / f"reduced-{number}" for number in range(2))
    for folder, map in zip((first_folder, other_folder), maps, strict=True):
        reduce_by_map(config.tokenizer, folder, torch.tensor(map))
    mapped = remap_shards(config.output, tmp_path / "mapped", config.tokenizer, first_folder)
    TokenSetMeta.of(mapped).check(first_folder, None, mapped.folder)
    for wrong in (other_folder, config.tokenizer):
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
def test_recipes_name_tokens_of_their_own_tokenizers(recipe: str) -> None:
    configs = [load_config(TokenizeConfig, path) for path in (ROOT / "configs" / "tokenize").glob("*.yaml")]
    run = yaml.safe_load((ROOT / "configs" / f"{recipe}.yaml").read_text())
    (tokens,) = (config for config in configs if str(config.output) == run["data"]["path"])
    assert str(tokens.tokenizer) == run["tokenizer"]
    assert (tokens.captions is None) == (run.get("text", "some") is None)
