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


def test_import_export_import_round_trip_samples_equal_images(published: Path, tmp_path: Path) -> None:
    main(["microsoft", str(published), str(tmp_path / "bundle"), "--heads", "2"])
    main(["export", str(tmp_path / "bundle"), str(tmp_path / "theirs")])
    main(["diffusers", str(tmp_path / "theirs"), str(tmp_path / "back")])
    token_grids = [
        TextToImage.load(tmp_path / name, device="cpu")("a star", steps=3, progress=False).tensor
        for name in ("bundle", "theirs", "back")
    ]
    assert torch.equal(token_grids[0], token_grids[1])
    assert torch.equal(token_grids[0], token_grids[2])
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "Microsoft's VQ-Diffusion checkpoint 'ithq_learnable.pth'" in card
    assert "published" in json.loads((tmp_path / "back" / "config.json").read_text())["origin"]


def test_dry_run_prints_mapping_and_writes_nothing(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["microsoft", str(published), str(tmp_path / "bundle"), "--heads", "2", "--dry-run"])
    printed = capsys.readouterr().out
    assert "transformer.to_logits.1.bias -> model.denoiser.head.bias [9]" in printed
    assert not (tmp_path / "bundle").exists()


def test_dry_run_of_mismatched_checkpoint_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_user_errors_exit_2_with_one_line(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error


def test_unknown_kind_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["tensorflow"])
    assert end.value.code == 2
    assert "No such command 'tensorflow'" in capsys.readouterr().err
