from pathlib import Path

import pytest

from vqd_scale.core.atomic_io import parse_location
from vqd_scale.core.errors import UserError
from vqd_scale.data.shards.tar_list import list_tars

NAMES = ["000.tar", "001.tar", "002.tar", "010.tar", "extra.tar"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for name in [*NAMES, "000.npz", "000_stats.json", "001.parquet", "index.json", "quarantine.jsonl"]:
        (tmp_path / "in" / name).touch()
    return tmp_path / "in"


@pytest.mark.parametrize(
    ("notation", "expected"),
    {
        "": NAMES,
        "/": NAMES,
        "/001.tar": NAMES[1:2],
        "/{000..002}.tar": NAMES[:3],
        "/{000..001}.tar::{}/extra.tar": [*NAMES[:2], "extra.tar"],
        "/0*.tar": NAMES[:4],
        "/*.tar": NAMES,
        "/{000,010}.tar": ["000.tar", "010.tar"],
    }.items(),
)
def test_notations_for_several_tars(
    notation: str, expected: list[str], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    location = parse_location(f"{folder}{notation.replace('{}', str(folder))}")
    assert list_tars(location) == (folder, expected)
    messages = [record.getMessage() for record in caplog.records]
    unused = len(NAMES) - len(expected)
    assert messages == (
        [f"{folder}: not used: {unused} .tar ({min({*NAMES} - {*expected})})"] if unused else []
    )


def test_files_beside_the_tars_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("000.tar.gz", "003.tar.gz", "._000.tar", "readme"):
        (folder / name).touch()
    (folder / "more").mkdir()
    list_tars(folder)
    (record,) = caplog.records
    for text in (
        "2 .tar.gz (000.tar.gz)",
        "1 hidden (._000.tar)",
        "1 folders (more)",
        "1 without extension (readme)",
    ):
        assert text in record.getMessage()


def test_tars_that_cannot_be_indexed_together_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "5.tar").touch()
    (tmp_path / "compressed").mkdir()
    (tmp_path / "compressed" / "000.tar.gz").touch()
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "9.tar").symlink_to(tmp_path / "nowhere")
    cases = {
        f"{folder}/000.tar::{tmp_path}/other/5.tar": "in several folders",
        f"{folder}/{{000..005}}.tar": r"003\.tar: there is no such tar",
        f"{folder}/9*.tar": "there is no such tar",
        f"{folder}/000.tar::pipe:touch x": "commands are never run",
        f"{folder}/{{000..002": "names no tars|there is no such tar",
        f"{tmp_path}/nowhere": "there is no such folder",
        f"{tmp_path}/nowhere/0.tar": "there is no such folder",
        f"{tmp_path}/compressed": r"no \.tar file here, only \.tar\.gz; unpack",
        f"{tmp_path}/links": "9\\.tar: is a link to a file that is missing",
        f"{folder}/${{HOME}}/{{0..1}}.tar": "names no tars",
    }
    for text, sentence in cases.items():
        with pytest.raises(UserError, match=sentence):
            list_tars(Path(text))
    assert not (tmp_path / "x").exists()
