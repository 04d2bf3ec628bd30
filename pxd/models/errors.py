"""The errors of this room."""


class ModelError(Exception):
    """A model that cannot be found, read or used; the message says what a person can do."""


class NoRoom(ModelError):
    """The disk is full."""
