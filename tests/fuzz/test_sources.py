"""Fuzzing of the files that list the images of a source."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz.harness import SECONDS, fuzz
from vqd_scale.data.sources.coco import CocoConfig
from vqd_scale.data.sources.cub200 import CubConfig
from vqd_scale.data.sources.imagefolder import ImageFolderConfig
from vqd_scale.data.sources.imagenet import class_names

ANNOTATIONS = {
    "images": [
        {"id": 1, "file_name": "1.jpg"},
        {"id": "2", "file_name": "x/2.jpg"},
        {"id": 3.0, "file_name": ""},
    ],
    "annotations": [{"id": 1, "image_id": 1, "caption": "one"}, {"image_id": 2, "caption": None}],
}
ROWS = [{"file_name": "1.png", "text": "one"}, {"file_name": "../2.png", "text": ["a", "b"]}, {"text": 5}]


def coco(folder: Path) -> Callable[[bytes], object]:
    (folder / "train2014").mkdir()
    (folder / "train2014" / "1.jpg").touch()

    def target(data: bytes) -> None:
        (folder / "captions_train2014.json").write_bytes(data)
        for image in CocoConfig().list_images(folder):
            assert image.path.parent == folder / "train2014" or image.fault

    return target


def metadata(folder: Path, kind: str) -> Callable[[bytes], object]:
    (folder / "1.png").touch()

    def target(data: bytes) -> None:
        (folder / f"metadata.{kind}").write_bytes(data)
        for image in ImageFolderConfig().list_images(folder):
            assert image.path.parent == folder
            assert image.captions or image.fault

    return target


def classes(folder: Path, kind: str) -> Callable[[bytes], object]:
    def target(data: bytes) -> None:
        (folder / f"classes.{kind}").write_bytes(data)
        assert set(class_names(folder / f"classes.{kind}", ["n1"])) >= {"n1"}

    return target


def birds(folder: Path) -> Callable[[bytes], object]:
    for name, text in {
        "classes.txt": "1 a.b\n2 c.d\n",
        "train_test_split.txt": "1 1\n2 0\n",
        "text/1.txt": "a",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "images").mkdir()
    (folder / "images" / "1.jpg").touch()

    def target(data: bytes) -> None:
        names, _, labels = data.partition(b"\n\n")
        (folder / "images.txt").write_bytes(names)
        (folder / "image_class_labels.txt").write_bytes(labels)
        for image in CubConfig(protocol="images").list_images(folder):
            assert image.path.is_file()

    return target


READERS: dict[str, tuple[Callable[[Path], Callable[[bytes], object]], list[bytes]]] = {
    "coco": (coco, [json.dumps(ANNOTATIONS).encode(), b"[]", b'{"images": []}', b"[" * 9000]),
    "jsonl": (
        lambda folder: metadata(folder, "jsonl"),
        ["\n".join(map(json.dumps, ROWS)).encode(), b'{"file_name": "\\ud83d", "text": "a"}', b"\n\n"],
    ),
    "csv": (
        lambda folder: metadata(folder, "csv"),
        [
            b'file_name,text\n1.png,"a ""b"" c"\n../2.png,x\n',
            b"file_name\n1.png,5,6\n",
            b'text\n"' + b"x" * 200_000,
        ],
    ),
    "class index": (lambda folder: classes(folder, "json"), [b'{"0": ["n1", "tench"], "1": ["n2", "b"]}']),
    "class list": (lambda folder: classes(folder, "txt"), [b"n1 tench, Tinca\nn2 goldfish\n"]),
    "birds": (
        birds,
        [b"1 1.jpg\n2 2.jpg\n\n\n1 1\n2 2\n", b"1 ../../1.jpg\n\n\n1 1\n", b"1 1.jpg\n\n\n1 9\n"],
    ),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("seconds", SECONDS)
def test_damaged_lists_are_refused_or_counted(name: str, seconds: float, tmp_path: Path) -> None:
    make, corpus = READERS[name]
    (tmp_path / "in").mkdir()
    assert fuzz(make(tmp_path / "in"), corpus, seconds, tmp_path / "failure") > len(corpus)


@pytest.mark.parametrize("seconds", SECONDS)
def test_damaged_parquet_files_are_refused(seconds: float, tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "1.png").touch()
    parquet.write_table(arrow.Table.from_pylist(ROWS[:1] * 3), tmp_path / "valid")
    target = metadata(tmp_path, "parquet")
    assert fuzz(target, [(tmp_path / "valid").read_bytes()], seconds, tmp_path / "failure") > 1
