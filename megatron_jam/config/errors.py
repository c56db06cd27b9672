"""The one exception that a user's mistake raises."""


class UsageError(ValueError):
    """A wrong input or setting: one line that names it and says what to do.

    Command lines print the message without a traceback and exit with status 2.
    """
