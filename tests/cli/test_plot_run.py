import json
from pathlib import Path

import pytest
from PIL import Image

from vqd_scale.cli.plot_run import main


def run_folder(path: Path) -> Path:
    path.mkdir()
    rows = [
        {"images": 8 * n, "loss": 1 / n} | ({"validation_bound": 2.0} if n == 2 else {}) for n in (1, 2, 3)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_plot_one_and_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = run_folder(tmp_path / "a"), run_folder(tmp_path / "b")
    main([str(first)])
    assert capsys.readouterr().out.strip() == str(first / "curves.png")
    assert Image.open(first / "curves.png").format == "PNG"
    main(
        [
            str(first),
            str(second),
            "--metric",
            "loss",
            "--metric",
            "validation_bound",
            "--output",
            str(tmp_path / "c.png"),
        ]
    )
    assert (tmp_path / "c.png").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["nowhere"], "there is no metrics.jsonl"), (["a", "--metric", "FID"], "has no metric 'FID'")],
)
def test_user_errors_exit_2(
    tmp_path: Path,
    arguments: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_folder(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err
