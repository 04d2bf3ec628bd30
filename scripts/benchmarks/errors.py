"""What ends a measurement."""


class BenchError(Exception):
    """A measurement cannot go on; the message says why. The other ones do."""


class CannotRun(Exception):
    """This machine or this release has not got what a measurement needs."""


def messages(group: BaseExceptionGroup[BenchError]) -> list[str]:
    found = []
    for error in group.exceptions:
        found += messages(error) if isinstance(error, BaseExceptionGroup) else [str(error)]
    return found
