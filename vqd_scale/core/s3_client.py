"""A store that speaks S3's protocol, and how long it is tried when it fails.

Every process has its own client, made when it is first needed. What may pass (a reset, a stall, a truncated
answer, 500, 503 SlowDown) is tried again, with growing and jittered waits and a bound; what will not pass is
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
"""What the store says to a request, as botocore gives it."""

logger = logging.getLogger(__name__)

_CONNECTIONS = 32
_SLOWEST = 1 << 18
"""Bytes a second below which sending counts as broken."""
_PASSING_CODES = {"SlowDown", "RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"}
_entropy = random.SystemRandom()


@dataclass(frozen=True)
class RetryPolicy:
    """How long a store that fails is tried; the defaults outlive about a minute of outage.

    Attributes:
        attempts: Failures in a row after which a request is given up.
        progress: An attempt that brought so many bytes ends the row.
        first_wait: Seconds before the second attempt; twice as many before each further one, or down to half
            of that by chance.
        longest_wait: Seconds at most.
        silence: Seconds without a byte after which a connection counts as broken.
    """

    attempts: int = 12
    progress: int = 1 << 20
    first_wait: float = 0.1
    longest_wait: float = 30.0
    silence: float = 30.0

    def wait(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row; random, so that clients do not return together."""
        longest = min(self.longest_wait, self.first_wait * 2 ** (failures - 1))
        return longest * _entropy.uniform(0.5, 1.0)


PATIENCE = RetryPolicy()


@dataclass(frozen=True)
class S3Endpoint:
    """Which store, and as whom; what is not given is found as AWS's tools do (``AWS_ENDPOINT_URL``, …).

    Attributes:
        endpoint_url: The server, where it is not AWS's own.
        profile: A profile of ``~/.aws/config``.
        anonymous: Sign nothing; for public buckets.
    """

    endpoint_url: str | None = None
    profile: str | None = None
    anonymous: bool = False

    async def call(self, operation: str, **arguments: object) -> Answer:
        """One attempt of one of S3's operations, by botocore's name for it."""
        client: Any = await self._filesystem().set_session()
        body = arguments.get("Body", b"")
        sent = len(body) if isinstance(body, bytes) else 0
        # The client bounds connecting and receiving, but would send into a dead connection for ever.
        longest = 2 * PATIENCE.silence + sent / _SLOWEST
        return await asyncio.wait_for(getattr(client, operation)(**arguments), longest)

    def started(self, coroutine: Coroutine[Any, Any, Result]) -> "Future[Result]":
        """Run a coroutine that calls the store; the future has its result."""
        loop = cast("asyncio.AbstractEventLoop", self._filesystem().loop)
        return asyncio.run_coroutine_threadsafe(coroutine, loop)

    def waited(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine that calls the store to its end."""
        return self.started(coroutine).result()

    def _filesystem(self) -> "S3FileSystem":
        # Neither the connections nor the thread of a client survive a fork: a child is to have its own.
        return filesystem_of(self, os.getpid())


@functools.cache
def filesystem_of(endpoint: S3Endpoint, process: int) -> "S3FileSystem":
    """A process's client for an endpoint, as patient as `PATIENCE` was when it was made."""
    # Here, since it takes half a second that nobody without S3 need spend.
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
            # Attempts are counted in one place, `with_retries`.
            "retries": {"total_max_attempts": 1},
            # Stores other than AWS's know no newer digest than Content-MD5, which is sent.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
    )


class BrokenOffError(Exception):
    """An answer ended early, although it says that it is whole."""


async def with_retries(
    place: object,
    deed: str,
    attempt: Callable[[], Awaitable[Result]],
    received: Callable[[], int] = lambda: 0,
) -> Result:
    """Try until it succeeds, or has failed too often in a row.

    Args:
        place: What the errors name.
        deed: What is done with it, as in "could not be read".
        attempt: Does it; called again after what may pass.
        received: How many bytes the attempts have brought so far.

    Raises:
        FileNotFoundError: There is no such object.
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
    """What an attempt can end with that is no defect of this package."""
    from aiohttp import ClientError as HTTPError
    from botocore.exceptions import BotoCoreError, ClientError

    return (BotoCoreError, ClientError, HTTPError, OSError, asyncio.TimeoutError, BrokenOffError)


def _lasting(place: object, deed: str, error: Exception) -> Exception | None:
    """What to raise if another attempt would end the same way; None if it may pass."""
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
    """The same for what the store itself answers."""
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
