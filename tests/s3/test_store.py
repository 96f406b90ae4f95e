"""Files in S3 behave as files on a disk: equal calls give equal results."""

import hashlib
import os
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkProcess, ForkServerProcess, SpawnProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

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
from vqd_scale.core.s3_client import RetryPolicy, client_of
from vqd_scale.core.s3_endpoint import S3Endpoint

pytestmark = pytest.mark.s3

PART = 5 << 20
"""The smallest part that S3 takes, but for the last."""


def content(size: int) -> bytes:
    return bytes(range(251)) * (size // 251) + bytes(size % 251)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads of at least two parts' size in parts of the minimum size."""

    def part_size(size: int, chunksize: int | None) -> int:
        del size, chunksize
        return PART

    monkeypatch.setattr("s3fs.core.calculate_chunksize", part_size)


def write_bytes(path: Location, data: bytes) -> None:
    with published(path) as partial:
        partial.write_bytes(data)


def pending_uploads(folder: S3Path) -> list[object]:
    answer = client_of(folder.endpoint).call_s3("list_multipart_uploads", Bucket=folder.bucket)
    return answer.get("Uploads", [])


def life_of_files(folder: Location) -> list[object]:
    """Return the results of all file operations, from creation to deletion."""
    observations: list[object] = [file_sizes(folder), (folder / "a.tar").exists()]
    write_bytes(folder / "a.tar", content(1000))
    write_bytes(folder / "empty", b"")
    publish_text(folder / "sub" / "text ü+ &?.txt", "größer")
    publish_json(folder / "index.json", {"a": [1, None]})
    publish_json(folder / "index.json", {"a": [2, None]})
    observations += [
        file_sizes(folder),
        file_sizes(folder / "sub"),
        read_json(folder / "index.json", "index"),
    ]
    for name in ("a.tar", "empty"):
        path = folder / name
        observations += [path.exists(), path.is_file(), path.read_bytes(), sha256_of(path)]
        observations.append(b"".join(read_in_order(path)))
    observations.append((folder / "sub" / "text ü+ &?.txt").read_text(encoding="utf-8"))
    table = (folder / "a.tar").with_suffix(".npz")
    observations += [
        table.name,
        table.exists(),
        table.parent == folder,
        (folder / "a.tar").with_name("b").name,
    ]
    (folder / "a.tar").unlink()
    observations += [file_sizes(folder), (folder / "a.tar").exists()]
    for read_call in (lambda: read_json(folder / "a.tar", "index"), lambda: (folder / "a.tar").read_bytes()):
        with pytest.raises((UserError, FileNotFoundError)) as raised:
            read_call()
        observations.append(type(raised.value))
    return observations


def test_file_operations_hold_for_objects(folder: S3Path, tmp_path: Path) -> None:
    assert life_of_files(folder) == life_of_files(tmp_path)


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 5])
def test_paged_listing(folder: S3Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(client_of(folder.endpoint).s3_additional_kwargs, "MaxKeys", 2)
    for name in range(number):
        publish_text(folder / f"{name}", "x" * name)
    publish_text(folder / "deeper" / "text", "not directly in it")
    assert file_sizes(folder) == {f"{name}": name for name in range(number)}


def test_exception_keeps_the_old_object(folder: S3Path) -> None:
    publish_text(folder / "text", "old")
    with pytest.raises(RuntimeError), published(folder / "text") as partial:
        partial.write_text("new")
        raise RuntimeError
    assert (folder / "text").read_text() == "old"
    assert file_sizes(folder) == {"text": 3}


@pytest.mark.parametrize("size", [2 * PART - 1, 2 * PART, 2 * PART + 1, 3 * PART + 7])
@pytest.mark.usefixtures("small_parts")
def test_multipart_upload(folder: S3Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_module, "PIECE_BYTES", PART - 3)
    write_bytes(folder / "large", content(size))
    assert b"".join(read_in_order(folder / "large")) == content(size)
    assert pending_uploads(folder) == []


def in_requests(method: str, turns: Sequence[int], fault: Fault) -> Callable[[str, str, int], Fault | None]:
    return lambda used, _, turn: fault if used == method and turn in turns else None


@pytest.mark.parametrize("kind", ["500", "503", "reset", "close", "stall"])
@pytest.mark.usefixtures("small_parts")
def test_write_survives_transient_faults(
    folder: S3Path,
    proxy: FaultProxy,
    short_retries: RetryPolicy,
    kind: FaultKind,
) -> None:
    fault = Fault(kind)
    # One attempt less than the maximum: a busy machine may time out by itself.
    failures = 1 if kind == "stall" else short_retries.max_attempts - 2
    for size in (1000, 2 * PART + 1000):
        for method in ("PUT", "POST"):
            proxy.follow(in_requests(method, range(failures), fault))
            write_bytes(proxy.to(folder) / f"{method}{size}", content(size))
            assert (folder / f"{method}{size}").read_bytes() == content(size)
    # An upload whose first response was lost has no known id to abort it by.
    assert pending_uploads(folder) == [] or kind not in ("500", "503")


@pytest.mark.usefixtures("small_parts")
def test_upload_with_lost_last_response_is_complete(
    folder: S3Path, proxy: FaultProxy, short_retries: RetryPolicy
) -> None:
    # The first POST begins the upload, the second one ends it: the server does so, and its answer is lost.
    proxy.follow(in_requests("POST", [1], Fault("close")))
    write_bytes(proxy.to(folder) / "large", content(2 * PART + 1))
    assert (folder / "large").read_bytes() == content(2 * PART + 1)


@pytest.mark.usefixtures("small_parts")
def test_failed_upload_leaves_nothing(folder: S3Path, proxy: FaultProxy, short_retries: RetryPolicy) -> None:
    proxy.follow(in_requests("PUT", range(1, 100), Fault("503")))
    with pytest.raises(UserError, match=r"large\?.*could not be written in 5 attempts.*SlowDown"):
        write_bytes(proxy.to(folder) / "large", content(2 * PART))
    assert file_sizes(folder) == {}
    assert pending_uploads(folder) == []


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("size", [1000, 2 * PART + 1000])
def test_corrupted_body_is_sent_again(
    folder: S3Path, proxy: FaultProxy, short_retries: RetryPolicy, size: int
) -> None:
    proxy.follow(in_requests("PUT", [1 if size > PART else 0], Fault("corrupt")))
    write_bytes(proxy.to(folder) / "object", content(size))
    assert proxy.faults["corrupt"] == 1
    assert (folder / "object").read_bytes() == content(size)


def test_signature_contains_the_digest_over_https_too(short_retries: RetryPolicy) -> None:
    client, headers = client_of(S3Endpoint("https://127.0.0.1:9")), dict[str, bytes]()

    def record(request: Any, **_: object) -> None:
        headers.update(request.headers)

    connection = client.start(client.set_session()).result()
    connection.meta.events.register("before-send.s3", record)
    with pytest.raises(UserError, match="Could not connect"):
        client.call_s3("put_object", Bucket="bucket", Key="key", Body=b"text")
    assert headers["X-Amz-Content-SHA256"] == hashlib.sha256(b"text").hexdigest().encode()


def test_invalid_use_raises_user_error(folder: S3Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="there is no such bucket"):
        publish_text(S3Path("no-bucket-of-this-name", "key"), "text")
    anonymous = S3Endpoint(anonymous=True)
    publish_text(folder / "closed", "text")
    with pytest.raises(UserError, match=r"closed.*access was denied"):
        S3Path(folder.bucket, f"{folder.key}/closed", anonymous).read_text()
    with pytest.raises(UserError, match=r"profile.*could not be found"):
        S3Path(folder.bucket, folder.key, S3Endpoint(profile="no-such-profile")).exists()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match="the secret key does not fit"):
        S3Path(folder.bucket, f"{folder.key}/closed", S3Endpoint(os.environ["AWS_ENDPOINT_URL"])).read_text()


def test_anonymous_access(folder: S3Path) -> None:
    publish_text(folder / "open", "text")
    place = {"Bucket": folder.bucket, "Key": f"{folder.key}/open"}
    client_of(folder.endpoint).call_s3("put_object_acl", **place, ACL="public-read")
    text = f"s3://{folder.bucket}/{folder.key}/open?anonymous=true"
    assert S3Path.parse(text).read_text() == "text"


def reads_itself(path: S3Path, expected: str) -> None:
    raise SystemExit(0 if path.read_text() == expected else 1)


@pytest.mark.parametrize("process", [ForkProcess, SpawnProcess, ForkServerProcess])
def test_child_process_opens_its_own_client(folder: S3Path, process: type[BaseProcess]) -> None:
    publish_text(folder / "text", "for all")
    child = process(target=reads_itself, args=(folder / "text", "for all"))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0
    assert (folder / "text").read_text() == "for all"


class Places(Config):
    local_folder: Location = Path("runs")
    remote_folder: Location


def test_configuration_accepts_both_location_kinds(server: str) -> None:
    del server
    places = load_config(Places, overrides=["remote_folder=s3://bucket/a/b/?anonymous=true"])
    assert places.remote_folder == S3Path("bucket", "a/b", S3Endpoint(anonymous=True))
    assert "remote_folder: s3://bucket/a/b?anonymous=true" in to_yaml(places)


def test_replaced_object_is_refused(folder: S3Path) -> None:
    write_bytes(folder / "object", content(1000))
    met = S3Object(folder / "object")
    assert met.read(0, 10) == content(1000)[:10]
    write_bytes(folder / "object", content(1000)[::-1])
    with pytest.raises(UserError, match="was replaced while it was read"):
        met.read(10, 20)
    with pytest.raises(UserError, match="not as large as expected"):
        S3Object(folder / "object", 999).read(0, 10)
    with pytest.raises(UserError, match="the store refuses"):
        S3Object(folder / "object", 2000).read(1500, 1600)
