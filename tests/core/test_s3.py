import weakref
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqd_scale.core.atomic_io import Location, parse_location
from vqd_scale.core.config import Config, load_config
from vqd_scale.core.errors import UserError
from vqd_scale.core.s3 import PartialDownload, S3Path
from vqd_scale.core.s3_endpoint import S3Endpoint


class Reads(Config):
    data: Location


names = st.text(st.characters(codec="utf-8", exclude_characters="/?"), min_size=1, max_size=8)
endpoints = st.builds(
    S3Endpoint,
    st.none() | st.sampled_from(["http://127.0.0.1:7480", "https://s3.example.org/a?b&c=d"]),
    st.none() | names,
    st.booleans(),
    st.booleans(),
)


@given(names, st.lists(names, max_size=3), endpoints)
def test_path_round_trip(bucket: str, keys: list[str], endpoint: S3Endpoint) -> None:
    path = S3Path(bucket, "/".join(keys), endpoint)
    assert S3Path.parse(str(path)) == path
    assert parse_location(str(path)) == path
    assert parse_location(path) is path


@given(st.lists(names, min_size=2, max_size=4))
def test_path_components(keys: list[str]) -> None:
    folder = S3Path("bucket", "/".join(keys[:-1]), S3Endpoint(anonymous=True))
    path = folder / keys[-1]
    assert path.parent == folder
    assert path.name == keys[-1]
    assert path.with_name("other") == folder / "other"


def test_with_suffix() -> None:
    path = S3Path("bucket", "a.b/000001.tar")
    assert path.with_suffix(".npz") == S3Path("bucket", "a.b/000001.npz")
    assert S3Path("bucket", "a.b/shard").with_suffix(".npz") == S3Path("bucket", "a.b/shard.npz")


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("s3://", "s3://bucket/key"),
        ("s3:///key", "s3://bucket/key"),
        ("s3://bucket/key?region=x", "anonymous=true"),
        ("s3://bucket/key?anonymous=yes", "anonymous=true"),
        ("s3://bucket/key?endpoint_url=host", "endpoint_url=http"),
        ("pipe:curl -s https://example.org/a.tar", "commands are never run"),
        ("gs://bucket/key", "a path, or s3://bucket/key"),
        ("https://example.org/set", "a path, or s3://bucket/key"),
        ("", "a path, or s3://bucket/key"),
        ("[1, 2]", "a path, or s3://bucket/key"),
    ],
)
def test_unsupported_locations_are_refused(text: str, allowed: str) -> None:
    with pytest.raises(UserError, match=rf"data: given .*{allowed.replace('?', '.')}"):
        load_config(Reads, overrides=[f"data={text}" if text else "data=''"])


@given(st.lists(st.binary(min_size=1, max_size=9), max_size=6), st.data())
def test_blocks_join_to_all_bytes(parts: list[bytes], data: st.DataObject) -> None:
    joined = b"".join(parts)
    blocks = PartialDownload(len(joined))
    ended: Future[None] = Future()
    ended.set_result(None)
    blocks.follow(ended)
    for part in parts:
        blocks.append(part)
    assert len(blocks) == len(joined)
    assert b"".join(blocks) == joined
    begin = data.draw(st.integers(0, len(joined)))
    end = data.draw(st.integers(begin, len(joined)))
    assert blocks.read(begin, end) == joined[begin:end]


def test_partial_download_serves_arrived_bytes() -> None:
    arriving, end = PartialDownload(9, step=2), Future[None]()
    arriving.follow(end)
    arriving.append(b"abc")
    assert arriving.read(1, 3) == b"bc"
    with ThreadPoolExecutor() as pool:
        later, exact_read, beyond = (
            pool.submit(arriving.read, 2, 5),
            pool.submit(lambda: list(arriving)),
            pool.submit(arriving.read, 4, 9),
        )
        arriving.append(b"def")
        assert later.result() == b"cde"
        arriving.append(b"g")
        end.set_exception(UserError("gone"))
        for waiting in (exact_read, beyond):
            with pytest.raises(UserError, match="gone"):
                waiting.result()
    # The bytes that arrived are still available.
    assert arriving.read(0, 7) == b"abcdefg"


def test_download_is_freed_with_last_reference() -> None:
    arriving, end = PartialDownload(9), Future[None]()
    arriving.follow(end)
    arriving_reference = weakref.ref(arriving)
    del arriving
    assert arriving_reference() is None
