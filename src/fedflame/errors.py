"""The two exceptions of our own: what the user can mend, and what must not be used."""

USER_ERROR = 2
"""Exit code of a process that ended by a `UserError`."""


class UserError(Exception):
    """Input that cannot be used. The message is one line: what was got and what is allowed."""


class InvalidMessage(Exception):
    """A buffer or an update that must not be used; the message is the reason."""
