"""S3 client with retries.

Every process creates its own client on first use. Transient errors (connection reset, stall, truncated
answer, 500, 503 SlowDown) are retried with bounded, jittered exponential backoff. A permanent error becomes
one sentence that names the object.
"""

import asyncio
import functools
import logging
import os
import random
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from vqd_scale.core.errors import UserError

if TYPE_CHECKING:
    from s3fs import S3FileSystem

Result = TypeVar("Result")
Answer = dict[str, Any]
"""Response of the store to a request, as parsed by botocore."""

logger = logging.getLogger(__name__)

_CONNECTIONS = 32
_SLOWEST = 1 << 18
"""Minimum upload speed in bytes per second; a slower request times out."""
_PASSING_CODES = {"SlowDown", "RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"}
_entropy = random.SystemRandom()


@dataclass(frozen=True)
class RetryPolicy:
    """Retry policy of requests to a store; the defaults survive an outage of about a minute.

    Attributes:
        attempts: Number of consecutive failures after which a request fails.
        progress: Number of received bytes in one attempt that resets the failure count.
        first_wait: Seconds of backoff before the second attempt, doubled before each further one; random
            jitter shortens each wait by up to half.
        longest_wait: Maximum backoff in seconds.
        silence: Seconds without a received byte after which a connection times out.
    """

    attempts: int = 12
    progress: int = 1 << 20
    first_wait: float = 0.1
    longest_wait: float = 30.0
    silence: float = 30.0

    def wait(self, failures: int) -> float:
        """Return the backoff in seconds after consecutive failures; jitter spreads the clients' retries."""
        longest = min(self.longest_wait, self.first_wait * 2 ** (failures - 1))
        return longest * _entropy.uniform(0.5, 1.0)


PATIENCE = RetryPolicy()


@dataclass(frozen=True)
class S3Endpoint:
    """Endpoint and credentials of a store; defaults as for AWS's own tools (``AWS_ENDPOINT_URL``, …).

    Attributes:
        endpoint_url: URL of the server, if it is not AWS.
        profile: Name of a profile in ``~/.aws/config``.
        anonymous: Send unsigned requests, for public buckets.
    """

    endpoint_url: str | None = None
    profile: str | None = None
    anonymous: bool = False

    async def call(self, operation: str, **arguments: object) -> Answer:
        """Call one S3 operation, by its botocore name, without retries."""
        client: Any = await self._filesystem().set_session()
        body = arguments.get("Body", b"")
        sent = len(body) if isinstance(body, bytes) else 0
        # The client has timeouts for connecting and receiving, but none for sending.
        longest = 2 * PATIENCE.silence + sent / _SLOWEST
        return await asyncio.wait_for(getattr(client, operation)(**arguments), longest)

    def started(self, coroutine: Coroutine[Any, Any, Result]) -> "Future[Result]":
        """Start a coroutine on the client's event loop and return its future."""
        loop = cast("asyncio.AbstractEventLoop", self._filesystem().loop)
        return asyncio.run_coroutine_threadsafe(coroutine, loop)

    def waited(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine on the client's event loop and return its result."""
        return self.started(coroutine).result()

    def _filesystem(self) -> "S3FileSystem":
        # A client's connections and thread do not survive a fork: each child process needs its own client.
        return filesystem_of(self, os.getpid())


@functools.cache
def filesystem_of(endpoint: S3Endpoint, process: int) -> "S3FileSystem":
    """Return the cached client of a process for an endpoint; timeouts are `PATIENCE`'s at creation."""
    # Imported here because the import takes half a second, which users without S3 should not pay.
    from s3fs import S3FileSystem

    del process
    return S3FileSystem(
        anon=endpoint.anonymous,
        endpoint_url=endpoint.endpoint_url,
        profile=endpoint.profile,
        skip_instance_cache=True,
        config_kwargs={
            "connect_timeout": PATIENCE.silence,
            "read_timeout": PATIENCE.silence,
            "max_pool_connections": _CONNECTIONS,
            # Only `with_retries` retries.
            "retries": {"total_max_attempts": 1},
            # Other stores than AWS support no digest newer than Content-MD5, which is sent.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
    )


class BrokenOffError(Exception):
    """Truncated answer: the body ended early without a connection error."""


async def with_retries(
    place: object,
    deed: str,
    attempt: Callable[[], Awaitable[Result]],
    received: Callable[[], int] = lambda: 0,
) -> Result:
    """Retry an attempt with backoff until it succeeds or `PATIENCE.attempts` consecutive failures occur.

    Args:
        place: Path of the object, named in error messages.
        deed: Past participle for error messages, as in "could not be read".
        attempt: Coroutine function of one attempt; called again after a transient error.
        received: Function that returns the number of bytes received by all attempts so far.

    Raises:
        FileNotFoundError: The object does not exist.
        UserError: The store refuses, or failed `PATIENCE.attempts` times in a row.
    """
    failures, before = 0, received()
    while True:
        try:
            return await attempt()
        except _failures() as error:
            lasting = _lasting(place, deed, error)
            if lasting is not None:
                raise lasting from None
            failures = 1 if received() - before >= PATIENCE.progress else failures + 1
            before = received()
            reason = f"{type(error).__name__}: {_in_a_line(error)}"
            if failures >= PATIENCE.attempts:
                raise UserError(
                    f"{place}: could not be {deed} in {failures} attempts, the last one ended with {reason}; "
                    "run the same command again when the store answers."
                ) from None
        wait = PATIENCE.wait(failures)
        logger.warning("%s: %s; attempt %d in %.1f s", place, reason, failures + 1, wait)
        await asyncio.sleep(wait)


@functools.cache
def _failures() -> tuple[type[Exception], ...]:
    """Return the exception types of failed requests; any other exception is a bug in this package."""
    from aiohttp import ClientError as HTTPError
    from botocore.exceptions import BotoCoreError, ClientError

    return (BotoCoreError, ClientError, HTTPError, OSError, asyncio.TimeoutError, BrokenOffError)


def _lasting(place: object, deed: str, error: Exception) -> Exception | None:
    """Return the exception to raise for a permanent error; None for a transient one."""
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConnectionError,
        HTTPClientError,
        IncompleteReadError,
    )
    from botocore.parsers import ResponseParserError

    if isinstance(error, ClientError):
        return _refusal(place, deed, error, dict(error.response))
    passing = (ConnectionError, HTTPClientError, IncompleteReadError, ResponseParserError)
    if isinstance(error, BotoCoreError) and not isinstance(error, passing):
        return UserError(f"{place}: cannot be {deed}: {_in_a_line(error).rstrip('.')}.")
    return None


def _refusal(place: object, deed: str, error: Exception, answer: Answer) -> Exception | None:
    """Return the exception to raise for a permanent error response of the store; None for a transient one."""
    status, code = int(answer["ResponseMetadata"]["HTTPStatusCode"]), str(answer["Error"].get("Code", ""))
    if status >= 500 or status == 429 or code in _PASSING_CODES:
        return None
    if code == "NoSuchBucket":
        return UserError(f"{place}: there is no such bucket; create it or name another.")
    if status == 404:
        return FileNotFoundError(f"{place}: there is no such object")
    if status == 412:
        return UserError(f"{place}: was replaced while it was read; start again.")
    if status in (401, 403):
        return UserError(
            f"{place}: cannot be {deed}: access was denied ({code}); see that the bucket is right "
            "and that the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile) allow it; "
            "for a public bucket add ?anonymous=true."
        )
    return UserError(f"{place}: cannot be {deed}: the store refuses: {_in_a_line(error).rstrip('.')}.")


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())
