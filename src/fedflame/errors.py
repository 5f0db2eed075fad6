"""The exceptions of fedflame: errors that the user can mend, and messages that must not be used."""

USER_ERROR = 2
"""Exit code of a process that a `UserError` ended."""


class UserError(Exception):
    """Input that cannot be used. The message is one line: what was got and what is allowed."""


class OutOfMemory(UserError):
    """The memory of a device is full. This ends a run, since it is not the failure of one client."""


class NotFinite(Exception):
    """The work is done and kept, but a loss of its result is not finite. The message is one line."""


class InvalidMessage(Exception):
    """A received buffer or update that must not be used. The message is the reason."""
