import json
from pathlib import Path

import pytest
import torch

from tests.models.exchange.microsoft_files import ITHQ_SLIM, Kind, checkpoint_of, write
from vqd_scale.cli.convert_checkpoint import main
from vqd_scale.models.pipeline import TextToImage


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return write(tmp_path, checkpoint_of(Kind(), ITHQ_SLIM))


def test_in_and_out_again_gives_a_folder_that_draws_the_same(published: Path, tmp_path: Path) -> None:
    main(["microsoft", str(published), str(tmp_path / "bundle"), "--heads", "2"])
    main(["export", str(tmp_path / "bundle"), str(tmp_path / "theirs")])
    main(["diffusers", str(tmp_path / "theirs"), str(tmp_path / "back")])
    drawn = [
        TextToImage.load(tmp_path / name, device="cpu")("a star", steps=3, progress=False).tensor
        for name in ("bundle", "theirs", "back")
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "Microsoft's VQ-Diffusion checkpoint 'ithq_learnable.pth'" in card
    assert "published" in json.loads((tmp_path / "back" / "config.json").read_text())["origin"]


def test_a_dry_run_prints_the_mapping_and_writes_nothing(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["microsoft", str(published), str(tmp_path / "bundle"), "--heads", "2", "--dry-run"])
    printed = capsys.readouterr().out
    assert "transformer.to_logits.1.bias -> model.denoiser.head.bias [9]" in printed
    assert not (tmp_path / "bundle").exists()


def test_a_dry_run_of_what_does_not_fit_ends_as_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = checkpoint_of(Kind(), ITHQ_SLIM)
    checkpoint["ema"]["surprise"] = torch.zeros(2)
    path = write(tmp_path, checkpoint)
    with pytest.raises(SystemExit) as end:
        main(["microsoft", str(path), str(tmp_path / "bundle"), "--heads", "2", "--dry-run"])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert "unknown surprise" in captured.out
    assert "1 weights do not fit: unknown surprise" in captured.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["microsoft", "/nowhere.pth", "out"], "there is no such file"),
        (["taming", "/nowhere.ckpt", "/nowhere.yaml", "out"], "cannot be read"),
        (["diffusers", "/nowhere", "out"], "no diffusers pipeline"),
        (["export", "/nowhere", "out"], "no model bundle"),
    ],
)
def test_mistakes_are_one_sentence_and_code_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert f"convert_checkpoint {arguments[0]}: " in error.replace(".py", "") or "Traceback" not in error


def test_an_unknown_kind_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["tensorflow"])
    assert end.value.code == 2
    assert "taming" in capsys.readouterr().err
