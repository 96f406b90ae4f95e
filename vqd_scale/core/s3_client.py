"""S3 client: s3fs with the timeouts, retries and error messages of this package.

Transient errors (connection reset, stall, truncated response, 500, 503 SlowDown) are retried with bounded,
jittered exponential backoff. A permanent error becomes one sentence that names the object. The import takes
half a second, so only code that uses S3 imports this module.
"""

import asyncio
import functools
import logging
import os
import random
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from aiohttp import ClientError as HTTPError
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
)
from botocore.parsers import ResponseParserError
from pydantic import NonNegativeInt, TypeAdapter, ValidationError
from s3fs import S3FileSystem
from typing_extensions import NotRequired, TypedDict

from vqd_scale.core.errors import UserError
from vqd_scale.core.s3_endpoint import S3Endpoint
from vqd_scale.core.watchdog import beat

Result = TypeVar("Result")
Response = dict[str, Any]
"""Response of the store to a request, as parsed by botocore."""

logger = logging.getLogger(__name__)

_CONNECTIONS = 32
_MIN_UPLOAD_SPEED = 1 << 18
"""Minimum upload speed in bytes per second; a slower request times out."""
_REQUEST_ERRORS = (BotoCoreError, ClientError, HTTPError, OSError, asyncio.TimeoutError)
"""Exception types of failed requests; any other exception is a bug in this package."""
_TRANSIENT_ERRORS = (ConnectionError, HTTPClientError, IncompleteReadError, ResponseParserError)
"""Those of botocore's own exceptions that another attempt can avoid."""
_TRANSIENT_CODES = {"SlowDown", "RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"}
_PARTICIPLES = {"head_object": "found", "list_objects_v2": "listed", "delete_object": "deleted"}
"""Verbs of error messages, as in "could not be listed"; "written" for any other operation."""
_entropy = random.SystemRandom()


class _Object(TypedDict):
    ETag: str
    ContentLength: NonNegativeInt


class _Version(TypedDict):
    ETag: str


class _Upload(TypedDict):
    UploadId: str


class _Entry(TypedDict):
    Key: str
    Size: NonNegativeInt


class _Folder(TypedDict):
    Prefix: str


class _Page(TypedDict):
    Name: str
    Contents: NotRequired[list[_Entry]]
    CommonPrefixes: NotRequired[list[_Folder]]


_SHAPES: dict[str, TypeAdapter[Any]] = {
    "head_object": TypeAdapter(_Object),
    "get_object": TypeAdapter(_Object),
    "put_object": TypeAdapter(_Version),
    "upload_part": TypeAdapter(_Version),
    "complete_multipart_upload": TypeAdapter(_Version),
    "create_multipart_upload": TypeAdapter(_Upload),
    "list_objects_v2": TypeAdapter(_Page),
}
"""Shape of each operation's response; a web page parses as a response without any content."""
_CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
_REGION = (
    "the bucket is in another region or at another endpoint; set its region (AWS_DEFAULT_REGION, or that of "
    "a profile) or its endpoint_url"
)
_EXPIRED = (
    "the session token has expired or is not valid; get new credentials (AWS_SESSION_TOKEN, or a profile)"
)
_CLOCK = "the clock of this machine differs from the store's; set the clock"
_CAUSES = {
    "NoSuchBucket": "there is no such bucket; create it or name another",
    **dict.fromkeys(("301", "302", "307", "PermanentRedirect", "TemporaryRedirect"), _REGION),
    **dict.fromkeys(("AuthorizationHeaderMalformed", "IllegalLocationConstraintException"), _REGION),
    **dict.fromkeys(("ExpiredToken", "InvalidToken", "TokenRefreshRequired"), _EXPIRED),
    **dict.fromkeys(("RequestTimeTooSkewed", "RequestExpired"), _CLOCK),
    "400": f"the store gives no reason; mostly {_EXPIRED}; or {_REGION}",
    "InvalidAccessKeyId": f"the store does not know the access key; see that it is right ({_CREDENTIALS})",
    "SignatureDoesNotMatch": f"the secret key does not fit the access key; see both ({_CREDENTIALS})",
    "InvalidObjectState": "the object is archived; restore it first",
}
"""Cause and remedy of a refusal by the store's code; without a body, the code is the status."""


@dataclass(frozen=True)
class RetryPolicy:
    """Retry policy of requests to a store; the defaults survive an outage of about a minute.

    Attributes:
        max_attempts: Number of consecutive failures after which a request fails.
        progress_bytes: Number of received bytes in one attempt that resets the failure count.
        first_wait: Seconds of backoff before the second attempt, doubled before each further one; random
            jitter shortens each wait by up to half.
        max_wait: Maximum backoff in seconds.
        timeout: Seconds without a received byte after which a connection times out.
    """

    max_attempts: int = 12
    progress_bytes: int = 1 << 20
    first_wait: float = 0.1
    max_wait: float = 30.0
    timeout: float = 30.0

    def wait(self, failures: int) -> float:
        """Return the backoff in seconds after consecutive failures; jitter spreads the clients' retries."""
        longest = min(self.max_wait, self.first_wait * 2 ** (failures - 1))
        return longest * _entropy.uniform(0.5, 1.0)


RETRY_POLICY = RetryPolicy()


class NotS3Error(BotoCoreError):
    """Address that is no URL, or answer that is not in the format of S3."""

    fmt = (
        "not S3 ({problem}); see that endpoint_url (or AWS_ENDPOINT_URL) is the address of the S3 API, not "
        "of a console or a login page"
    )


class S3Client(S3FileSystem):
    """File system of s3fs whose requests are retried by `RETRY_POLICY`; see `client_of`.

    Args:
        endpoint: Endpoint and credentials; appended to the paths in error messages.
    """

    # `client_of` caches the clients, by process.
    cachable = False

    def __init__(self, endpoint: S3Endpoint) -> None:
        super().__init__(
            anon=endpoint.anonymous,
            requester_pays=endpoint.requester_pays,
            endpoint_url=endpoint.endpoint_url,
            profile=endpoint.profile,
            use_listings_cache=False,
            config_kwargs={
                "connect_timeout": RETRY_POLICY.timeout,
                "read_timeout": RETRY_POLICY.timeout,
                "max_pool_connections": _CONNECTIONS,
                # Only `with_retries` retries.
                "retries": {"total_max_attempts": 1},
                # The signature contains the body's SHA-256, which every store verifies. Stores other than AWS
                # do not support newer checksums.
                "s3": {"payload_signing_enabled": True},
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
            },
        )
        self.endpoint = endpoint

    async def set_session(self, refresh: bool = False, kwargs: dict[str, Any] | None = None) -> Any:  # noqa: ANN401 - of botocore
        """Return the botocore client."""
        client = await super().set_session(refresh, kwargs or {})
        client.meta.events.register("before-call.s3.HeadBucket", _end_redirects, unique_id="redirects")
        # With wildcards it comes before the handler of botocore that takes a page for an internal error of
        # the store, which would be retried.
        client.meta.events.register_first("before-parse.*.*", _refuse_page, unique_id="pages")
        return client

    async def request(self, operation: str, *defaults: dict[str, Any], **arguments: Any) -> Response:  # noqa: ANN401 - as the operation demands
        """Call one S3 operation, by its botocore name, without retries.

        Raises:
            NotS3Error: The address is invalid, or the answer is not in the format of S3.
        """
        try:
            method = getattr(await self.set_session(), operation)
            # The client has timeouts for connecting and receiving, but none for sending.
            timeout = 2 * RETRY_POLICY.timeout + len(arguments.get("Body", b"")) / _MIN_UPLOAD_SPEED
            accepted_arguments = self._get_s3_method_kwargs(method, *defaults, **arguments)
            response = await asyncio.wait_for(method(**accepted_arguments), timeout)
            if operation in _SHAPES:
                _SHAPES[operation].validate_python(response)
            token = response.get("NextContinuationToken")
            if response.get("IsTruncated") and token in (None, arguments.get("ContinuationToken")):
                raise ValueError("a list without end")
        except ClientError as error:
            if operation == "head_object" and _status(error) in (301, 307, 400, 403):
                # An answer to HEAD has no body with the cause.
                first_byte = await self.request("get_object", *defaults, **arguments, Range="bytes=0-0")
                first_byte["Body"].close()
            raise
        except ValueError as error:
            problem = "an incomplete answer" if isinstance(error, ValidationError) else error
            raise NotS3Error(problem=problem) from None
        beat()
        return response

    async def _call_s3(self, method: str, *akwarglist: dict[str, Any], **kwargs: Any) -> Response:  # noqa: ANN401 - as above
        """Call one S3 operation with retries; all of s3fs's methods send their requests through this one."""
        key = kwargs.get("Key", kwargs.get("Prefix", ""))
        return await self.with_retries(
            f"s3://{kwargs.get('Bucket', '')}/{key}{self.endpoint}",
            _PARTICIPLES.get(method, "written"),
            lambda: self.request(method, *akwarglist, **kwargs),
        )

    def call_s3(self, method: str, *akwarglist: dict[str, Any], **kwargs: Any) -> Response:  # noqa: ANN401 - as above
        """Call one S3 operation, by its botocore name, with retries."""
        return self.start(self._call_s3(method, *akwarglist, **kwargs)).result()

    def object_sizes(self, bucket: str, prefix: str) -> dict[str, int]:
        """Return the size in bytes of each object ``prefix + name`` by name, except those in subfolders."""

        async def listing() -> dict[str, int]:
            entries = [entry async for entry in self._iterdir(bucket, prefix=prefix)]
            return {str(entry["name"]): int(entry["size"]) for entry in entries if entry["type"] == "file"}

        start = f"{bucket}/{prefix}"
        # Some tools create an empty object, named as the prefix, as a folder marker.
        sizes = self.start(listing()).result()
        return {name.removeprefix(start): size for name, size in sizes.items() if name != start}

    def start(self, coroutine: Coroutine[Any, Any, Result]) -> "Future[Result]":
        """Start a coroutine on the client's event loop and return its future."""
        return asyncio.run_coroutine_threadsafe(coroutine, cast("asyncio.AbstractEventLoop", self.loop))

    async def with_retries(
        self,
        location: object,
        participle: str,
        attempt: Callable[[], Awaitable[Result]],
        received_bytes: Callable[[], int] = lambda: 0,
    ) -> Result:
        """Retry an attempt with backoff until it succeeds or fails `RetryPolicy.max_attempts` times in a row.

        Args:
            location: Path of the object, named in error messages.
            participle: Verb of the error messages, as in "could not be read".
            attempt: Coroutine function of one attempt; called again after a transient error.
            received_bytes: Function that returns the number of bytes received by all attempts so far.

        Raises:
            FileNotFoundError: The object does not exist.
            UserError: The store refuses, or failed `RetryPolicy.max_attempts` times in a row.
        """
        failures, before = 0, received_bytes()
        while True:
            try:
                return await attempt()
            except _REQUEST_ERRORS as error:
                permanent_error = _permanent_error(location, participle, error)
                if permanent_error is not None:
                    raise permanent_error from None
                failures = 1 if received_bytes() - before >= RETRY_POLICY.progress_bytes else failures + 1
                before = received_bytes()
                reason = f"{type(error).__name__}: {_in_one_line(error)}"
                if failures >= RETRY_POLICY.max_attempts:
                    raise UserError(
                        f"{location}: could not be {participle} in {failures} attempts, the last one ended "
                        f"with {reason}; run the same command again when the store answers."
                    ) from None
            wait = RETRY_POLICY.wait(failures)
            logger.warning("%s: %s; attempt %d in %.1f s", location, reason, failures + 1, wait)
            await asyncio.sleep(wait)


def client_of(endpoint: S3Endpoint) -> S3Client:
    """Return this process's client for an endpoint; timeouts are those of `RETRY_POLICY` at its creation."""
    # A client's connections and thread do not survive a fork: each child process needs its own client.
    return cached_client(endpoint, os.getpid())


@functools.cache
def cached_client(endpoint: S3Endpoint, process: int) -> S3Client:
    """Return the client of an endpoint, created once per process."""
    del process
    return S3Client(endpoint)


def _permanent_error(location: object, participle: str, error: Exception) -> Exception | None:
    """Return the exception to raise for a permanent error; None for a transient one."""
    if isinstance(error, BotoCoreError) and not isinstance(error, _TRANSIENT_ERRORS):
        return UserError(f"{location}: cannot be {participle}: {_in_one_line(error).rstrip('.')}.")
    if not isinstance(error, ClientError):
        return None
    status, code = _status(error), str(error.response.get("Error", {}).get("Code", ""))
    if status >= 500 or status == 429 or code in _TRANSIENT_CODES:
        return None
    if cause := _CAUSES.get(code):
        return UserError(f"{location}: cannot be {participle}: {cause}.")
    if status == 404:
        return FileNotFoundError(f"{location}: there is no such object")
    if status == 412:
        return UserError(
            f"{location}: was replaced while it was read, or since it was indexed; start again, or index it "
            "again."
        )
    if status in (401, 403):
        return UserError(
            f"{location}: cannot be {participle}: access was denied ({code}); see that the bucket is right "
            f"and that the credentials ({_CREDENTIALS}) allow it; for a public bucket add ?anonymous=true, "
            "for one whose requester pays ?requester_pays=true."
        )
    return UserError(
        f"{location}: cannot be {participle}: the store refuses: {_in_one_line(error).rstrip('.')}."
    )


def _end_redirects(context: dict[str, Any], **_: object) -> None:
    # After a redirect, botocore asks for the bucket's region, and would ask again if that is redirected too.
    context["s3_redirect"]["redirected"] = True


def _refuse_page(operation_model: Any, response_dict: Response, **_: object) -> None:  # noqa: ANN401 - of botocore
    kind = str(response_dict["headers"].get("content-type", ""))
    is_object = operation_model.name in ("GetObject", "HeadObject")
    if response_dict["status_code"] < 300 and not is_object and ("html" in kind or "json" in kind):
        raise NotS3Error(problem="a web page")


def _status(error: ClientError) -> int:
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())
