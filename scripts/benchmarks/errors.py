"""What ends a measurement."""


class BenchError(Exception):
    """A measurement cannot go on; the message says why. The other ones do."""


class CannotRun(Exception):
    """This machine or this release has not got what a measurement needs."""
