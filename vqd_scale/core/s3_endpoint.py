"""Endpoint and credentials of an S3 store."""

from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode


@dataclass(frozen=True)
class S3Endpoint:
    """Endpoint and credentials of a store; defaults as for AWS's own tools (``AWS_ENDPOINT_URL``, …).

    Attributes:
        endpoint_url: URL of the server, if it is not AWS.
        profile: Name of a profile in ``~/.aws/config``.
        anonymous: Send unsigned requests, for public buckets.
        requester_pays: Accept the costs of requests, for requester-pays buckets.
    """

    endpoint_url: str | None = None
    profile: str | None = None
    anonymous: bool = False
    requester_pays: bool = False

    @classmethod
    def parse(cls, query: str) -> "S3Endpoint":
        """Parse the format that `str` writes, without the question mark.

        Raises:
            ValueError: The query is invalid; the message names the allowed options.
        """
        options = dict(parse_qsl(query, keep_blank_values=True))
        url, profile = options.pop("endpoint_url", None), options.pop("profile", None)
        switches = [options.pop(name, "false") for name in ("anonymous", "requester_pays")]
        is_url = url is None or url.startswith(("http://", "https://"))
        if options or not is_url or not {"true", "false"}.issuperset(switches):
            raise ValueError(
                f"given {query!r:.200}, allowed after the question mark: endpoint_url=http(s)://…, "
                "profile=NAME, anonymous=true and requester_pays=true, joined by '&'"
            )
        return cls(url, profile, *(switch == "true" for switch in switches))

    def __str__(self) -> str:
        options = {
            "endpoint_url": self.endpoint_url,
            "profile": self.profile,
            "anonymous": "true" if self.anonymous else None,
            "requester_pays": "true" if self.requester_pays else None,
        }
        query = urlencode({name: value for name, value in options.items() if value}, safe=":/")
        return f"?{query}" if query else ""
