"""Periods in images."""


def is_due(period: int, images: int, batch: int) -> bool:
    """Return True if the last ``batch`` of ``images`` images reached a multiple of the period."""
    return images // period > (images - batch) // period
