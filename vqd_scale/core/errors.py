USER_ERROR_EXIT_CODE = 2
"""Exit code of a tool after a `UserError`; a restart would fail in the same way."""


class UserError(Exception):
    """Error that the user can fix.

    The message is one sentence with the problem and the remedy. Every tool prints the message without a
    traceback and exits with code 2. Any other exception is a bug in this package and keeps its traceback.
    """


class FirstRankError(UserError):
    """Error of rank 0, raised on the other ranks; only rank 0 prints the message."""
