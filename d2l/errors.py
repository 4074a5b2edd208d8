"""The one exception for mistakes that a user can mend.

The command line and the HTTP gateway show its text without a traceback, so every message names the input,
says what was expected, and what to do.
"""


class UserError(ValueError):
    """A bad input: a document, a file, an option, a checkpoint for another base model."""


class DamagedError(UserError):
    """What is stored is not what was written: making it anew mends that."""


class StorageError(UserError):
    """Storage is out of reach, full or forbidden: the same call may do well later."""
