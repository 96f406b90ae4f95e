class UserError(Exception):
    """A mistake that only the person at the keyboard can mend.

    The message is one sentence that says what was found and what to do. Every tool prints it and leaves with
    exit code 2, without a traceback; anything else that is raised is a defect of this package and keeps its
    traceback.
    """


class FirstRankError(UserError):
    """What went wrong on the first rank, as the other ranks learn of it: that rank says it, once."""
