import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.training.rank_threads import on_ranks
from vqd_scale.cli import eval_coco_fid
from vqd_scale.core.errors import UserError
from vqd_scale.core.world import World
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import ShardRecipe, write_shard_set
from vqd_scale.evaluation import evaluate as score
from vqd_scale.evaluation.config import (
    Captions,
    Classes,
    EvaluationConfig,
    EvaluationSamplingConfig,
    Inception,
    KernelConfig,
    RandomNetwork,
    ReferenceConfig,
    TokenizerLatents,
)
from vqd_scale.evaluation.evaluate import Result, evaluate
from vqd_scale.evaluation.extractors import FEATURES
from vqd_scale.evaluation.frechet import FeatureStatistics, frechet_distance
from vqd_scale.evaluation.metrics import metric_name
from vqd_scale.evaluation.prompts import choose_prompts, prompts_digest
from vqd_scale.evaluation.resumable_chunks import EvaluationStopped, ResumableChunks, statistics_of
from vqd_scale.models.generate import generate_batch, model_identity
from vqd_scale.models.pipeline import TextToImage

FEATURE_COUNT = 6


def protocol(shards: Path, count: int = 23, **changes: Any) -> EvaluationConfig:
    settings: dict[str, Any] = {
        "name": "test",
        "data": shards,
        "prompts": Captions(count=count),
        "sampling": EvaluationSamplingConfig.model_validate(
            {"sampler": {"kind": "strided", "steps": 2}, "batch_size": 4}
        ),
        "extractor": RandomNetwork(features=FEATURE_COUNT),
        "kid": KernelConfig(subsets=3, size=10),
        "inception_splits": 2,
        "neighbors": 3,
        "report_images": 2,
    }
    return EvaluationConfig(**settings | changes)


def scored(
    config: EvaluationConfig,
    model: Path,
    out: Path,
    ranks: int = 1,
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    def run(world: World) -> Result | None:
        pipe = TextToImage.load(model, device="cpu")
        return evaluate(config, pipe, {"name": "model"}, out, world, stop)

    results = on_ranks(ranks, run)
    assert results[1:] == [None] * (ranks - 1)
    assert results[0] is not None
    return results[0]


@pytest.fixture(scope="module")
def single_rank_result(
    model: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Result, Path]:
    out = tmp_path_factory.mktemp("alone")
    return scored(protocol(shards), model, out), out


def assert_reports_equal(actual: Any, expected: Any, tolerance: float) -> None:
    if isinstance(actual, dict):
        assert actual.keys() == expected.keys()
        for key in actual:
            assert_reports_equal(actual[key], expected[key], tolerance)
    else:
        assert actual == (pytest.approx(expected, rel=tolerance) if isinstance(actual, float) else expected)


def test_figures_equal_one_pass_over_all_images(
    single_rank_result: tuple[Result, Path], shards: Path
) -> None:
    result, out = single_rank_result
    parts = ResumableChunks(out / "parts", 23, 4)
    features = parts.column(FEATURES)
    # 23 is not a multiple of the batch size.
    assert result.report["count"] == len(features) == 23
    chosen = choose_prompts(Captions(count=23), ShardSet.open(shards))
    assert len({prompt.member for prompt in chosen}) == 23
    assert result.report["prompts"] == prompts_digest(chosen)
    figures = result.report["figures"]
    assert figures.keys() >= {
        f"{name}_random" for name in ("frechet_distance", "kernel_distance", "precision", "inception_score")
    }
    # The scene reader's accuracy on images of random weights is the chance level.
    assert 0 < figures["alignment"]["mean"] < 0.6


@pytest.mark.parametrize("ranks", [2, 3])
def test_figures_do_not_depend_on_ranks(
    single_rank_result: tuple[Result, Path], model: Path, shards: Path, tmp_path: Path, ranks: int
) -> None:
    result = scored(protocol(shards), model, tmp_path, ranks)
    assert_reports_equal(result.report, single_rank_result[0].report, 1e-6)
    for part in ResumableChunks(tmp_path / "parts", 23, 4).numbers:
        path = Path("parts") / f"{part:06d}.safetensors"
        assert (tmp_path / path).read_bytes() == (single_rank_result[1] / path).read_bytes()


def test_streamed_statistics_equal_one_pass(tmp_path: Path) -> None:
    values = 100 + torch.randn(23, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = ResumableChunks(tmp_path, 23, 4)

    def make(numbers: range) -> dict[str, Tensor]:
        return {FEATURES: values[numbers.start : numbers.stop]}

    def run(world: World) -> FeatureStatistics:
        parts.work(make, world, "", lambda: False)
        return statistics_of(parts, 5, world)

    expected_statistics = FeatureStatistics.of(values)
    # Eight ranks for six chunks: two ranks have none.
    for ranks in (1, 2, 3, 8):
        for rank_statistics in on_ranks(ranks, run):
            assert rank_statistics.count == 23
            torch.testing.assert_close(rank_statistics.mean, expected_statistics.mean, rtol=1e-12, atol=0)
            torch.testing.assert_close(
                rank_statistics.scatter, expected_statistics.scatter, rtol=1e-10, atol=1e-10
            )
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()


def test_stopped_evaluation_resumes_to_equal_report(
    single_rank_result: tuple[Result, Path], model: Path, shards: Path, tmp_path: Path
) -> None:
    stop_answers = iter([False, True, False, False, True])
    for _ in range(2):
        with pytest.raises(EvaluationStopped):
            scored(protocol(shards), model, tmp_path, stop=lambda: next(stop_answers))
    # A partial file of a killed process is not a chunk.
    (tmp_path / "parts" / "000003.safetensors.partial").write_bytes(b"half")
    result = scored(protocol(shards), model, tmp_path, ranks=2)
    assert_reports_equal(result.report, single_rank_result[0].report, 1e-6)
    resumed = scored(protocol(shards), model, tmp_path)
    assert resumed.report == single_rank_result[0].report


def test_remaining_chunks_are_redistributed(tmp_path: Path) -> None:
    parts = ResumableChunks(tmp_path, 24, 4)
    generated_chunks: dict[int, list[int]] = {0: [], 1: []}

    def run(world: World) -> None:
        def make(numbers: range) -> dict[str, Tensor]:
            generated_chunks[world.rank].append(numbers.start // 4)
            return {FEATURES: torch.arange(numbers.start, numbers.stop)}

        parts.work(make, world, "", lambda: False)

    on_ranks(2, run)
    assert generated_chunks == {0: [0, 2, 4], 1: [1, 3, 5]}
    # The second rank has no chunk yet, and both ranks now share its chunks.
    for part in (1, 3, 5):
        parts.path(part).unlink()
    on_ranks(2, run)
    assert generated_chunks == {0: [0, 2, 4, 1, 5], 1: [1, 3, 5, 3]}
    assert parts.column(FEATURES).tolist() == list(range(24))


def test_chunks_of_another_sampling_are_refused(
    single_rank_result: tuple[Result, Path], model: Path, shards: Path
) -> None:
    drawing = protocol(shards).sampling.model_copy(update={"seed": 1})
    with pytest.raises(UserError, match=r"begun with sampling.seed 0, not 1; give another --output"):
        scored(protocol(shards, sampling=drawing), model, single_rank_result[1])


def test_mismatched_reference_statistics_are_refused(
    single_rank_result: tuple[Result, Path], model: Path, shards: Path, tmp_path: Path
) -> None:
    file = tmp_path / "reference.safetensors"
    file_protocol = protocol(shards, reference=ReferenceConfig(file=file))
    scored(file_protocol, model, tmp_path / "first")
    with pytest.raises(UserError, match=r"other real images \(images 23, not 60\); name another"):
        scored(
            protocol(shards, reference=ReferenceConfig(file=file, images="all")), model, tmp_path / "second"
        )
    with pytest.raises(UserError, match=r"extractor.seed 0, not 1"):
        scored(
            protocol(
                shards,
                reference=ReferenceConfig(file=file),
                extractor=RandomNetwork(features=FEATURE_COUNT, seed=1),
            ),
            model,
            tmp_path / "third",
        )
    statistics = file.read_bytes()
    # Another version's resize gives different real images.
    replace_metadata(file, "bicubic, anti-aliased, 8 bits", "bilinear, 8 bits")
    with pytest.raises(UserError, match=r'filter "bilinear, 8 bits", not "bicubic, anti-aliased, 8 bits"'):
        scored(file_protocol, model, tmp_path / "fourth")
    for content in (b"no statistics at all", statistics[:-1] + bytes([statistics[-1] ^ 1])):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"reference\.safetensors: (is )?damaged"):
            scored(file_protocol, model, tmp_path / "fifth")
    del single_rank_result


def replace_metadata(file: Path, old: str, new: str) -> None:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(old.encode(), new.encode())
    assert header != content[8 : 8 + length]
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


def test_repeated_images_count_with_multiplicity(model: Path, shards: Path, tmp_path: Path) -> None:
    reference = ReferenceConfig(images="all", repeat_to=130)
    result = scored(protocol(shards, reference=reference), model, tmp_path)
    assert (result.report["reference"]["images"], result.report["reference"]["counted"]) == (60, 130)
    once = scored(
        protocol(shards, reference=ReferenceConfig(images="all")), model, tmp_path / "honest"
    ).report["figures"]["frechet_distance_random"]
    # The last ten count once less than the first: nearly, not quite, the same distance.
    assert result.report["figures"]["frechet_distance_random"] == pytest.approx(once, rel=0.2)
    assert result.report["figures"]["frechet_distance_random"] != once


def test_frechet_distance_equals_closed_form() -> None:
    deviations = [(1.0, 2.0, 3.0), (2.0, 1.0, 5.0)]
    first, second = (
        FeatureStatistics(
            100, torch.zeros(3).double() + shift, 99 * torch.tensor(values).double().square().diag()
        )
        for shift, values in zip((0.0, 2.0), deviations, strict=True)
    )
    # For diagonal covariances: the squared distance of means and of deviations.
    assert frechet_distance(first, second) == pytest.approx(3 * 4 + 1 + 1 + 4)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"prompts": Captions(count=6)},
            "6 images are too few for the covariance of 6 features; sample at least 7",
        ),
        ({"prompts": Captions(count=61)}, "holds 60 images with captions, fewer than prompts.count=61"),
        (
            {"prompts": Classes(count=9, classes=3), "reference": ReferenceConfig(images="all")},
            "these are 3 classes, but the model has no classes",
        ),
        ({"data": None}, "captions need the shards that they come from; give --data"),
        ({"kid": KernelConfig(size=100)}, "set kid.size to 23"),
        ({"neighbors": 23}, "23 images are too few for 23 neighbors"),
        ({"inception_splits": 24}, "23 images are too few for 24 parts"),
    ],
)
def test_invalid_use_raises_user_error(
    model: Path, shards: Path, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        scored(protocol(shards, **changes), model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extractor", "name"),
    [
        (Inception(layer="64"), "frechet_distance_inception_64"),
        (Inception(), "fid"),
        (TokenizerLatents(), "frechet_distance_tokenizer"),
    ],
)
def test_name_of_a_distance_says_the_features(extractor: Any, name: str) -> None:
    assert metric_name(extractor, "fid") == name


def test_captions_without_images_raise_user_error(model: Path, tmp_path: Path) -> None:
    samples = [{"__key__": f"{number:03d}", "txt": f"a star {number}"} for number in range(9)]
    captions = tmp_path / "captions"
    write_shard_set(captions, {}, [ShardRecipe("000000.tar", 9, lambda: samples)], "")
    with pytest.raises(UserError, match=r"sample '0..' has no image; a reference needs"):
        scored(protocol(captions, count=9, kid=KernelConfig(size=5)), model, tmp_path / "out")


def test_prompts_are_a_function_of_the_seed(shards: Path, tmp_path: Path) -> None:
    several = tmp_path / "several"
    samples = [
        {
            "__key__": f"{number:03d}",
            "txt": f"first {number}",
            "json": json.dumps(
                {"captions": [f"first {number}", f"second {number}", f"third {number}"]}
            ).encode(),
        }
        for number in range(20)
    ]
    write_shard_set(several, {}, [ShardRecipe("000000.tar", 20, lambda: samples)], "")
    opened = ShardSet.open(several)
    some_prompts, more_prompts, other_seed_prompts = (
        choose_prompts(Captions(count=count, seed=seed), opened) for count, seed in ((9, 0), (20, 0), (20, 1))
    )
    assert some_prompts == more_prompts[:9]
    assert prompts_digest(more_prompts) != prompts_digest(other_seed_prompts)
    assert {prompt.caption for prompt in more_prompts} == {0, 1, 2}
    assert [prompt.member for prompt in more_prompts] != sorted(prompt.member for prompt in more_prompts)
    each = choose_prompts(Captions(count=60, caption="each"), opened)
    assert len({prompt.text for prompt in each}) == 60
    stored = choose_prompts(Captions(count=20, caption="first", shuffled=False), opened)
    assert [prompt.text for prompt in stored] == [f"first {number}" for number in range(20)]
    del shards


def test_classes_are_equally_frequent() -> None:
    labels = [int(prompt.text) for prompt in choose_prompts(Classes(count=12, classes=4), None)]
    assert labels == sorted(labels)
    assert np.bincount(labels).tolist() == [3, 3, 3, 3]


def arguments_for(model: Path, shards: Path, out: Path) -> list[str]:
    return [
        str(model),
        *("--data", str(shards), "--output", str(out)),
        *("prompts.kind=captions", "prompts.count=23", "sampling.batch_size=2"),
        *("sampling.sampler.kind=strided", "sampling.sampler.steps=2"),
        *("kid.size=10", "inception_splits=2", "report_images=2"),
        *("extractor.kind=random", "extractor.features=6"),
    ]


def test_command_writes_figures_and_page(model: Path, shards: Path, tmp_path: Path) -> None:
    eval_coco_fid.main([*arguments_for(model, shards, tmp_path), "sampling.save_images=true"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["count"] == 23
    assert report["model"] == model_identity(str(model), TextToImage.load(model, device="cpu"))
    assert report["reference"]["extractor"]["kind"] == "random convolutions"
    page = (tmp_path / "report.html").read_text()
    assert report["prompts"] in page
    # Best, worst, not chosen; the distance by the number of images, and all images.
    assert page.count("data:image/png;base64,") == 5
    assert list(report["distance_by_count"]) == ["11", "23"]
    assert report["distance_by_count"]["23"] == report["figures"]["frechet_distance_random"]
    assert len(list((tmp_path / "images").glob("*.png"))) == 23


def change_model(folder: Path, part: str) -> None:
    """Change one part of a bundle, so that it still loads."""
    if part == "config":
        path = folder / "config.json"
        path.write_text(path.read_text().replace('"normalize": true', '"normalize": false'))
        return
    path = folder / ("tokenizer/model.safetensors" if part == "tokenizer" else "model.safetensors")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    name = max(state, key=lambda name: state[name].numel())
    save_file({**state, name: state[name].flip(0)}, path, metadata)


@pytest.mark.parametrize("part", ["weights", "tokenizer", "config"])
def test_replaced_model_is_refused(
    model: Path, shards: Path, tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, out = tmp_path / "bundle", tmp_path / "out"
    shutil.copytree(model, bundle)
    eval_coco_fid.main(arguments_for(bundle, shards, out))
    report = (out / "report.json").read_bytes()
    change_model(bundle, part)
    with pytest.raises(SystemExit) as end:
        eval_coco_fid.main(arguments_for(bundle, shards, out))
    assert end.value.code == 2
    assert f"model.{part}_sha256" in capsys.readouterr().err
    assert (out / "report.json").read_bytes() == report


def test_refused_sampler_leaves_no_folder(model: Path, shards: Path, tmp_path: Path) -> None:
    arguments = arguments_for(model, shards, tmp_path / "out")
    with pytest.raises(SystemExit) as end:
        eval_coco_fid.main([*arguments, "sampling.sampler.steps=11"])
    assert end.value.code == 2
    assert not (tmp_path / "out").exists()
    eval_coco_fid.main(arguments)


def test_chunks_without_description_or_damaged_are_not_used(
    model: Path, shards: Path, tmp_path: Path
) -> None:
    first = scored(protocol(shards), model, tmp_path).report
    (tmp_path / "parts" / "parts.json").unlink()
    sampling = protocol(shards).sampling.model_copy(update={"seed": 1})
    assert scored(protocol(shards, sampling=sampling), model, tmp_path).report["figures"] != first["figures"]
    path = tmp_path / "parts" / "000001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match=r"000001\.safetensors: damaged"):
        scored(protocol(shards, sampling=sampling), model, tmp_path)


def test_sampling_options_are_those_of_the_sampling_tools(model: Path, shards: Path, tmp_path: Path) -> None:
    options = ["--sampler", "purity", "--steps", "3", "--top-p", "0.5", "--negative", "a star"]
    eval_coco_fid.main([*arguments_for(model, shards, tmp_path), *options, "--batch-size", "5"])
    sampling = json.loads((tmp_path / "report.json").read_text())["protocol"]["sampling"]
    assert (sampling["sampler"]["kind"], sampling["sampler"]["steps"]) == ("purity", 3)
    assert (sampling["truncation"]["p"], sampling["negative"], sampling["batch_size"]) == (0.5, "a star", 5)


def test_command_prints_user_error(
    model: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        eval_coco_fid.main([*arguments_for(model, shards, tmp_path)[:-2], "extractor.kind=inception"])
    assert end.value.code == 2
    assert "the weights of Inception are missing" in capsys.readouterr().err.splitlines()[-1]


def test_signal_exits_with_requeue_code(
    model: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated_chunks = 0

    def interrupted(*arguments: Any) -> Tensor:
        nonlocal generated_chunks
        generated_chunks += 1
        if generated_chunks == 2:
            os.kill(os.getpid(), signal.SIGUSR2)
        return generate_batch(*arguments)

    monkeypatch.setattr(score, "generate_batch", interrupted)
    with pytest.raises(SystemExit) as end:
        eval_coco_fid.main(arguments_for(model, shards, tmp_path))
    assert end.value.code == 75
    assert not (tmp_path / "report.json").exists()
    # The chunk in progress is finished and stored.
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) == 2


@pytest.mark.long
@pytest.mark.ranks
def test_random_kills_and_restarts_give_equal_report(model: Path, shards: Path, tmp_path: Path) -> None:
    tool = Path(__file__).parents[2] / "tools" / "eval_coco_fid.py"

    def start(out: Path) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, str(tool), *arguments_for(model, shards, out)])

    assert start(tmp_path / "whole").wait() == 0
    kills = 0
    for parts in (1, 4, 9):
        process = start(tmp_path / "killed")
        while process.poll() is None and len(list((tmp_path / "killed/parts").glob("*.safetensors"))) < parts:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() != 0
    assert kills == 3
    assert start(tmp_path / "killed").wait() == 0
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "killed")]
    for report in reports:
        # The commit may change during the test.
        del report["commit"]
    assert reports[0] == reports[1]
