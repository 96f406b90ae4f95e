import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from pytorch_fid import fid_score, inception

from tests.evaluation.inception import write_random_inception
from tests.evaluation.test_feature_metrics import scipy_of_pytorch_fid
from vqd_scale.cli import eval_folders
from vqd_scale.core.atomic_io import sha256_of

__all__ = ["scipy_of_pytorch_fid"]

RANDOM = ["extractor.kind=random", "extractor.features=4"]


def write_images(folder: Path, seed: int, sizes: list[tuple[int, int]]) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(seed)
    for number, (width, height) in enumerate(sizes):
        pixels = generator.integers(0, 200 + 50 * seed, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


def report_of(tmp_path: Path, *words: str) -> dict[str, object]:
    eval_folders.main(
        [str(tmp_path / "a"), str(tmp_path / "b"), *words, "--output", str(tmp_path / "r.json")]
    )
    return json.loads((tmp_path / "r.json").read_text())


@pytest.mark.usefixtures("scipy_of_pytorch_fid")
def test_distance_equals_torch_fidelity_and_pytorch_fid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [write_images(tmp_path / name, seed, [(32, 32)] * 66) for seed, name in enumerate("ab")]
    weights = tmp_path / "weights.pth"
    write_random_inception(weights)
    expected = torch_fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        cuda=False,
        fid=True,
        feature_layer_fid="64",
        feature_extractor_weights_path=str(weights),
        verbose=False,
    )["frechet_inception_distance"]
    state = torch.load(weights, weights_only=True)

    def load(*_: object, **__: object) -> object:
        return state

    monkeypatch.setattr(inception, "load_state_dict_from_url", load)
    pytorch_fid_distance = fid_score.calculate_fid_given_paths(
        list(map(str, folders)), 16, "cpu", 64, num_workers=0
    )
    # A grid of samples is no sample.
    (tmp_path / "a" / "samples.json").write_text("{}")
    Image.new("RGB", (600, 600)).save(tmp_path / "a" / "grid.png")
    words = [f"extractor.weights={weights}", f"extractor.sha256={sha256_of(weights)}"]
    words.append("extractor.layer='64'")
    report = report_of(tmp_path, *words, "extractor.input=pytorch-fid")
    assert report["frechet_distance_inception_64"] == pytest.approx(pytorch_fid_distance, rel=1e-5)
    report = report_of(tmp_path, *words)
    assert (
        report["frechet_distance_inception_64"] == pytest.approx(expected, rel=1e-5) != pytorch_fid_distance
    )
    assert (report["images"], report["size"], report["resize"]) == ([66, 66], [32, 32], "none")


def test_mixed_sizes_are_refused_or_resized_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "a", 0, [(16, 16), (20, 16), (16, 40), (300, 20), (16, 16)])
    write_images(tmp_path / "b", 1, [(16, 16)] * 6)
    with pytest.raises(SystemExit) as end:
        report_of(tmp_path, *RANDOM)
    assert end.value.code == 2
    assert f"{tmp_path / 'a' / '001.png'}: has 20x16 pixels" in capsys.readouterr().err
    report = report_of(tmp_path, *RANDOM, "image_size=16")
    assert report["frechet_distance_random"] != 0
    assert "center square" in str(report["resize"])


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_unreadable_image_is_named(
    tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, name in enumerate("ab"):
        write_images(tmp_path / name, seed, [(16, 16)] * 6)
    path = tmp_path / "b" / "x.png"
    path.write_bytes(content) if content is not None else path.symlink_to("nowhere.png")
    with pytest.raises(SystemExit) as end:
        report_of(tmp_path, *RANDOM)
    assert end.value.code == 2
    assert str(path) in capsys.readouterr().err


def test_few_images_or_no_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "a", 0, [(16, 16)] * 4)
    for sentence in ("b: there is no such folder", "a: 4 images are too few"):
        with pytest.raises(SystemExit):
            report_of(tmp_path, *RANDOM)
        assert sentence in capsys.readouterr().err
        if not (tmp_path / "b").exists():
            write_images(tmp_path / "b", 1, [(16, 16)] * 9)
