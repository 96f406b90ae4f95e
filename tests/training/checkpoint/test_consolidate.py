"""Bundles from checkpoints of running jobs and from DeepSpeed's own folders, by the command line."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.rank_threads import on_ranks, partition_of
from vqd_scale.cli.convert_checkpoint import main
from vqd_scale.core.config import load_config, to_yaml
from vqd_scale.core.world import World
from vqd_scale.training.checkpoint.manager import Checkpoints
from vqd_scale.training.config import CheckpointConfig, EMAConfig
from vqd_scale.training.ema import EMA
from vqd_scale.training.tasks.config import TrainConfig
from vqd_scale.training.tasks.denoising import DenoisingTask


@pytest.fixture
def run(token_world: Path, tmp_path: Path) -> Path:
    """Run folder with two checkpoints, whose weights are 8 or 16 and whose EMA is 100 higher."""
    folder = tmp_path / "run"
    config = load_config(TrainConfig, token_world / "train.yaml", [f"run={folder}"])
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))

    def save(world: World) -> None:
        partition = partition_of(DenoisingTask(config, World(0, 1, torch.device("cpu"))).module, world)
        ema = EMA(EMAConfig(), partition)
        checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig(), partition, ema, world)
        for images in (8, 16):
            for master, average in zip(partition.masters, ema.flats, strict=True):
                master.detach().fill_(images)
                average.fill_(100 + images)
            checkpoints.save(images, {})
        checkpoints.wait()
        checkpoints.close()

    on_ranks(2, save)
    return folder


@pytest.mark.parametrize(
    ("arguments", "value"),
    [([], 116.0), (["--weights", "raw"], 16.0), (["--images", "8", "--weights", "raw"], 8.0)],
)
def test_checkpoint_becomes_a_bundle(
    run: Path, tmp_path: Path, arguments: list[str], value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["consolidate", str(run), str(tmp_path / "out"), *arguments])
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights
    assert all((tensor == value).all() for tensor in weights.values())
    assert f"{tmp_path / 'out'}: the" in capsys.readouterr().out


def test_damaged_checkpoint_is_skipped_or_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "checkpoints" / "000000000016" / "slices-00001-of-00002.safetensors").unlink()
    main(["consolidate", str(run), str(tmp_path / "out")])
    assert "ema weights at 8 images" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["consolidate", str(run), str(tmp_path / "out"), "--images", "16"])
    assert stopped.value.code == 2
    assert (
        "contains no valid checkpoint at 16 images; the existing ones are: 16, 8." in capsys.readouterr().err
    )


def test_pickles_require_trust_option(
    token_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(token_world / "train.yaml")
    for options, sentence in (
        ([], "give --trust-pickle"),
        (["--trust-pickle"], "holds no checkpoint of DeepSpeed"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["deepspeed", str(tmp_path), config, str(tmp_path / "out"), *options])
        assert stopped.value.code == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
