"""The error that a user can mend."""


class DataError(Exception):
    """The data or a setting cannot be used; the message is one line that says what to change."""
