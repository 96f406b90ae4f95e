"""Fuzzing of answers of an S3 store, as bytes on the connection."""

import socketserver
import threading
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fuzz.harness import SECONDS, fuzz
from vqd_scale.core import s3_client
from vqd_scale.core.s3 import S3Path, object_sizes
from vqd_scale.core.s3_client import RetryPolicy


def answer(body: bytes, status: bytes = b"200 OK") -> bytes:
    """Return an HTTP answer that ends its connection."""
    headers = (
        b'Content-Type: application/xml\r\nETag: "e"\r\nLast-Modified: Mon, 30 Nov 2026 10:00:00 GMT\r\n'
    )
    length = b"Content-Length: %d\r\nContent-Range: bytes 0-8/9\r\nConnection: close\r\n\r\n" % len(body)
    return b"HTTP/1.1 " + status + b"\r\n" + headers + length + body


ENTRY = (
    b"<Contents><Key>folder/a</Key><Size>9</Size><LastModified>2026-11-30T10:00:00Z</LastModified></Contents>"
)
CORPUS = [
    answer(b"123456789"),
    answer(b"<ListBucketResult><Name>b</Name>" + ENTRY + b"</ListBucketResult>"),
    answer(b"<Error><Code>AccessDenied</Code><Message>x</Message></Error>", b"403 Forbidden"),
    answer(b"<Error><Code>PermanentRedirect</Code><Endpoint>x</Endpoint></Error>", b"301 Moved"),
    answer(b"<!doctype html><html><br></html>"),
    b"",
]


class Server(socketserver.ThreadingTCPServer):
    """Server that answers each request with the same bytes."""

    daemon_threads = True
    data = b""


class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while self.rfile.readline().strip():
            pass
        server = self.server
        assert isinstance(server, Server)
        self.wfile.write(server.data)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Generator[Server]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    policy = RetryPolicy(max_attempts=2, first_wait=0.001, max_wait=0.001, timeout=0.5)
    monkeypatch.setattr(s3_client, "RETRY_POLICY", policy)
    s3_client.cached_client.cache_clear()
    with Server(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()
    s3_client.cached_client.cache_clear()


@pytest.mark.parametrize("seconds", SECONDS)
def test_answer_of_a_store_is_read_or_refused(seconds: float, server: Server, tmp_path: Path) -> None:
    port = server.server_address[1]
    path = S3Path.parse(f"s3://b/folder?endpoint_url=http://127.0.0.1:{port}")

    def target(data: bytes) -> None:
        server.data = data
        for operation in (S3Path.exists, S3Path.read_bytes, object_sizes):
            with suppress(FileNotFoundError):
                operation(path)

    assert fuzz(target, CORPUS, seconds, tmp_path / "failure") >= len(CORPUS)
