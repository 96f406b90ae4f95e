"""Answers of stores that are no success, from a real HTTP server on 127.0.0.1."""

import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from vqd_scale.core import s3_client
from vqd_scale.core.atomic_io import publish_text
from vqd_scale.core.errors import UserError
from vqd_scale.core.s3 import S3Object, S3Path, object_sizes
from vqd_scale.core.s3_client import RetryPolicy

ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>{}</Message></Error>"
PAGE = "<!doctype html><html><head><title>Sign in</title><body>Welcome<br></body></html>"


@dataclass
class Store:
    """Server that answers every request alike, and the headers of its requests by method."""

    url: str
    status: int = 200
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict[str, str])
    requests: list[tuple[str, Message]] = field(default_factory=list[tuple[str, Message]])

    def answer(self, status: int, body: str = "", **headers: str) -> None:
        """Set the answer to further requests."""
        self.status, self.body = status, body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def path(self, options: str = "") -> S3Path:
        """Return the path of an object in the store."""
        return S3Path.parse(f"s3://bucket/object?endpoint_url={self.url}{options}")


@pytest.fixture(scope="module")
def server() -> Generator[Store]:
    """Server of the module's tests, and the settings of its clients."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            state.requests.append((self.command, self.headers))
            self.send_response(state.status)
            for name, value in {"Content-Length": str(len(state.body)), **state.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(state.body.encode())

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Store(f"http://127.0.0.1:{http_server.server_port}")
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        policy = RetryPolicy(max_attempts=3, first_wait=0.001, max_wait=0.002, timeout=5.0)
        patch.setattr(s3_client, "RETRY_POLICY", policy)
        s3_client.cached_client.cache_clear()
        yield state
        s3_client.cached_client.cache_clear()
    http_server.shutdown()
    http_server.server_close()
    thread.join()


@pytest.fixture
def store(server: Store) -> Store:
    """Store whose answers a test sets."""
    server.requests.clear()
    return server


def write(path: S3Path) -> None:
    publish_text(path, "text")


OPERATIONS: dict[str, Callable[[S3Path], object]] = {
    "head": S3Path.exists,
    "get": lambda path: S3Object(path, 10).read(0, 10),
    "list": object_sizes,
    "put": write,
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("status", "code", "cause"),
    [
        (301, "PermanentRedirect", "another region.*AWS_DEFAULT_REGION"),
        (307, "TemporaryRedirect", "another region.*AWS_DEFAULT_REGION"),
        (400, "AuthorizationHeaderMalformed", "another region.*AWS_DEFAULT_REGION"),
        (400, "ExpiredToken", "the session token has expired.*AWS_SESSION_TOKEN"),
        (400, "InvalidToken", "the session token has expired or is not valid.*AWS_SESSION_TOKEN"),
        (400, "Unnamed", "the store refuses: .*Unnamed"),
        (403, "RequestTimeTooSkewed", "the clock of this machine"),
        (403, "InvalidAccessKeyId", "does not know the access key.*AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", "the secret key does not fit.*AWS_SECRET_ACCESS_KEY"),
        (403, "AccessDenied", "access was denied.*anonymous=true.*requester_pays=true"),
        (403, "InvalidObjectState", "archived; restore"),
        (404, "NoSuchBucket", "no such bucket"),
    ],
)
def test_refusal_is_one_sentence_with_the_cause(
    store: Store, operation: str, status: int, code: str, cause: str
) -> None:
    store.answer(status, ERROR.format(code, "Message."))
    if (operation, status) == ("head", 404):
        # An answer to HEAD has no code: a missing bucket is a missing object.
        assert OPERATIONS[operation](store.path()) is False
        return
    with pytest.raises(UserError, match=rf"s3://bucket/.*{cause}") as caught:
        OPERATIONS[operation](store.path())
    assert "\n" not in str(caught.value)
    # Refusals are not retried; botocore asks for the region of the bucket, and HEAD is followed by GET.
    assert len(store.requests) <= 4


@pytest.mark.parametrize("status", [301, 400])
def test_refusal_without_a_reason_names_the_usual_ones(store: Store, status: int) -> None:
    store.answer(status)
    with pytest.raises(UserError, match=r"AWS_DEFAULT_REGION"):
        store.path().exists()


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("body", [PAGE, "<html>login</html>", "", '{"a": 1}', "<Error/>"])
def test_page_in_place_of_an_answer_is_named(store: Store, operation: str, body: str) -> None:
    store.answer(200, body, Content_Type="text/html")
    with pytest.raises(UserError, match=r"not S3 \(.*endpoint_url"):
        OPERATIONS[operation](store.path())


LISTING = "<ListBucketResult><Name>bucket</Name>{}</ListBucketResult>"


@pytest.mark.parametrize(
    "entries",
    [
        "<Contents><Key>object/a</Key></Contents>",
        "<Contents><Size>3</Size></Contents>",
        "<Contents><Key>object/a</Key><Size>x</Size></Contents>",
        "<Contents><Key>object/a</Key><Size>-3</Size></Contents>",
        "<CommonPrefixes/>",
        "<IsTruncated>true</IsTruncated>",
    ],
)
def test_misshapen_listing_is_named(store: Store, entries: str) -> None:
    store.answer(200, LISTING.format(entries))
    with pytest.raises(UserError, match="not S3"):
        object_sizes(store.path())


def test_listing_that_repeats_its_page_ends(store: Store) -> None:
    truncated = "<IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>"
    store.answer(200, LISTING.format(truncated))
    with pytest.raises(UserError, match="not S3"):
        object_sizes(store.path())


def test_session_token_and_payer_are_sent(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "temporary")
    store.answer(200, LISTING.format(""), ETag='"e"')
    for operation in (S3Path.exists, object_sizes, write):
        operation(store.path("&requester_pays=true"))
    assert [method for method, _ in store.requests] == ["HEAD", "GET", "PUT"]
    for _, headers in store.requests:
        assert headers["x-amz-security-token"] == "temporary"
        assert headers["x-amz-request-payer"] == "requester"


def test_requests_name_no_payer_by_default(store: Store) -> None:
    store.answer(200, ETag='"e"')
    assert store.path().exists()
    assert "x-amz-request-payer" not in store.requests[0][1]


@pytest.mark.parametrize(
    "url", ["http://", "http://[", "http://a b", "http://a..b", "http://\u2100", "http://h:x"]
)
@pytest.mark.parametrize("operation", ["head", "list"])
def test_invalid_address_is_named(url: str, operation: str) -> None:
    with pytest.raises(UserError, match=r"s3://bucket/key.*endpoint"):
        OPERATIONS[operation](S3Path.parse(f"s3://bucket/key?endpoint_url={url}"))


def test_key_without_an_encoding_is_named(store: Store) -> None:
    with pytest.raises(UserError, match="surrogates not allowed"):
        (store.path() / "\udc80").exists()
