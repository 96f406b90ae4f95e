"""Files in S3 behave as files on a disk do: the same calls on both, the same outcomes."""

import os
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkProcess, ForkServerProcess, SpawnProcess
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.s3.proxy import Fault, FaultKind, FaultProxy
from vqd_scale.core import s3 as s3_module
from vqd_scale.core.atomic_io import (
    Location,
    file_sizes,
    publish_json,
    publish_text,
    published,
    read_in_order,
    read_json,
    sha256_of,
)
from vqd_scale.core.config import Config, load_config, to_yaml
from vqd_scale.core.errors import UserError
from vqd_scale.core.s3 import S3Object, S3Path
from vqd_scale.core.s3_client import RetryPolicy, S3Endpoint

pytestmark = pytest.mark.s3

PART = 5 << 20
"""The smallest part that S3 takes, but for the last."""


def content(size: int) -> bytes:
    return bytes(range(251)) * (size // 251) + bytes(size % 251)


def written(path: Location, data: bytes) -> None:
    with published(path) as partial:
        partial.write_bytes(data)


def pending_uploads(folder: S3Path) -> list[object]:
    answer = folder.endpoint.waited(folder.endpoint.call("list_multipart_uploads", Bucket=folder.bucket))
    return answer.get("Uploads", [])


def life_of_files(folder: Location) -> list[object]:
    """What happens to files from their first to their last day."""
    seen: list[object] = [file_sizes(folder), (folder / "a.tar").exists()]
    written(folder / "a.tar", content(1000))
    written(folder / "empty", b"")
    publish_text(folder / "sub" / "text ü+ &?.txt", "größer")
    publish_json(folder / "index.json", {"a": [1, None]})
    publish_json(folder / "index.json", {"a": [2, None]})
    seen += [file_sizes(folder), file_sizes(folder / "sub"), read_json(folder / "index.json", "index")]
    for name in ("a.tar", "empty"):
        path = folder / name
        seen += [path.exists(), path.is_file(), path.read_bytes(), sha256_of(path)]
        seen.append(b"".join(read_in_order(path)))
    seen.append((folder / "sub" / "text ü+ &?.txt").read_text(encoding="utf-8"))
    table = (folder / "a.tar").with_suffix(".npz")
    seen += [table.name, table.exists(), table.parent == folder, (folder / "a.tar").with_name("b").name]
    (folder / "a.tar").unlink()
    seen += [file_sizes(folder), (folder / "a.tar").exists()]
    for read in (lambda: read_json(folder / "a.tar", "index"), lambda: (folder / "a.tar").read_bytes()):
        with pytest.raises((UserError, FileNotFoundError)) as raised:
            read()
        seen.append(type(raised.value))
    return seen


def test_what_is_true_of_files_is_true_of_objects(folder: S3Path, tmp_path: Path) -> None:
    assert life_of_files(folder) == life_of_files(tmp_path)


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 5])
def test_a_listing_in_pages(folder: S3Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_module, "_LISTED_AT_ONCE", 2)
    for name in range(number):
        publish_text(folder / f"{name}", "x" * name)
    publish_text(folder / "deeper" / "text", "not directly in it")
    assert file_sizes(folder) == {f"{name}": name for name in range(number)}


def test_an_exception_leaves_the_old_object(folder: S3Path) -> None:
    publish_text(folder / "text", "old")
    with pytest.raises(RuntimeError), published(folder / "text") as partial:
        partial.write_text("new")
        raise RuntimeError
    assert (folder / "text").read_text() == "old"
    assert file_sizes(folder) == {"text": 3}


@pytest.mark.parametrize("size", [PART - 1, PART, PART + 1, 2 * PART + 7])
def test_what_is_too_large_for_one_request_goes_in_parts(
    folder: S3Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "_PART_BYTES", PART)
    monkeypatch.setattr(s3_module, "PIECE_BYTES", PART - 3)
    written(folder / "large", content(size))
    assert b"".join(read_in_order(folder / "large")) == content(size)
    assert pending_uploads(folder) == []


def in_requests(method: str, turns: Sequence[int], fault: Fault) -> Callable[[str, str, int], Fault | None]:
    return lambda used, _, turn: fault if used == method and turn in turns else None


@pytest.mark.parametrize("kind", ["500", "503", "reset", "close", "stall"])
def test_writing_outlives_what_passes(
    folder: S3Path,
    proxy: FaultProxy,
    impatient: RetryPolicy,
    kind: FaultKind,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3_module, "_PART_BYTES", PART)
    fault = Fault(kind)
    # One attempt less than there could be: a busy machine may be silent by itself.
    failures = 1 if kind == "stall" else impatient.attempts - 2
    for size in (1000, PART + 1000):
        for method in ("PUT", "POST"):
            proxy.follow(in_requests(method, range(failures), fault))
            written(proxy.to(folder) / f"{method}{size}", content(size))
            assert (folder / f"{method}{size}").read_bytes() == content(size)
    # An upload that began unheard has no name by which it could be taken back.
    assert pending_uploads(folder) == [] or kind not in ("500", "503")


def test_an_upload_whose_last_answer_was_lost_is_whole(
    folder: S3Path, proxy: FaultProxy, impatient: RetryPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "_PART_BYTES", PART)
    # The first POST begins the upload, the second one ends it: the server does so, and nobody hears of it.
    proxy.follow(in_requests("POST", [1], Fault("close")))
    written(proxy.to(folder) / "large", content(PART + 1))
    assert (folder / "large").read_bytes() == content(PART + 1)


def test_an_upload_that_fails_leaves_nothing(
    folder: S3Path, proxy: FaultProxy, impatient: RetryPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "_PART_BYTES", PART)
    proxy.follow(in_requests("PUT", range(1, 100), Fault("503")))
    with pytest.raises(UserError, match=r"large\?.*could not be written in 5 attempts.*SlowDown"):
        written(proxy.to(folder) / "large", content(2 * PART))
    assert file_sizes(folder) == {}
    assert pending_uploads(folder) == []


def test_mistakes_are_one_sentence(folder: S3Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="there is no such bucket"):
        publish_text(S3Path("no-bucket-of-this-name", "key"), "text")
    anonymous = S3Endpoint(anonymous=True)
    publish_text(folder / "closed", "text")
    with pytest.raises(UserError, match=r"closed.*access was denied"):
        S3Path(folder.bucket, f"{folder.key}/closed", anonymous).read_text()
    with pytest.raises(UserError, match=r"profile.*could not be found"):
        S3Path(folder.bucket, folder.key, S3Endpoint(profile="no-such-profile")).exists()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match="access was denied"):
        S3Path(folder.bucket, f"{folder.key}/closed", S3Endpoint(os.environ["AWS_ENDPOINT_URL"])).read_text()


def test_without_signing_where_all_may_read(folder: S3Path) -> None:
    publish_text(folder / "open", "text")
    place = {"Bucket": folder.bucket, "Key": f"{folder.key}/open"}
    folder.endpoint.waited(folder.endpoint.call("put_object_acl", **place, ACL="public-read"))
    text = f"s3://{folder.bucket}/{folder.key}/open?anonymous=true"
    assert S3Path.parse(text).read_text() == "text"


def reads_itself(path: S3Path, expected: str) -> None:
    raise SystemExit(0 if path.read_text() == expected else 1)


@pytest.mark.parametrize("process", [ForkProcess, SpawnProcess, ForkServerProcess])
def test_a_child_has_a_client_of_its_own(folder: S3Path, process: type[BaseProcess]) -> None:
    publish_text(folder / "text", "for all")
    child = process(target=reads_itself, args=(folder / "text", "for all"))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0
    assert (folder / "text").read_text() == "for all"


class Places(Config):
    here: Location = Path("runs")
    there: Location


def test_a_configuration_takes_either(server: str) -> None:
    del server
    places = load_config(Places, overrides=["there=s3://bucket/a/b/?anonymous=true"])
    assert places.there == S3Path("bucket", "a/b", S3Endpoint(anonymous=True))
    assert "there: s3://bucket/a/b?anonymous=true" in to_yaml(places)


def test_another_version_is_never_mixed_in(folder: S3Path) -> None:
    written(folder / "object", content(1000))
    met = S3Object(folder / "object")
    assert met.read(0, 10) == content(1000)[:10]
    written(folder / "object", content(1000)[::-1])
    with pytest.raises(UserError, match="was replaced while it was read"):
        met.read(10, 20)
    with pytest.raises(UserError, match="not as large as expected"):
        S3Object(folder / "object", 999).read(0, 10)
    with pytest.raises(UserError, match="the store refuses"):
        S3Object(folder / "object", 2000).read(1500, 1600)
