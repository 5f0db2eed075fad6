"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """Input that cannot be used. The message is one line: what was got and what is allowed."""
