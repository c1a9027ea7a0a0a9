"""What can go wrong for a user, and the way out of it."""

from __future__ import annotations


class VtpruneError(Exception):
    """An error that a user can act on.

    Args:
        message: what is wrong, with the offending value and the rule, on one line.
        hint: the way out, on one line; empty where there is none.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class MediaError(VtpruneError):
    """A file that can't be read, or is larger than the limits allow."""


class DamagedError(MediaError):
    """A file that opens, but of which at most a part can be decoded."""


class PresetError(VtpruneError):
    """A preset, schedule or option that is not valid, or can't be reached."""


class ModelError(VtpruneError):
    """A model that can't be loaded, or that this project can't prune."""
