"""What a request was promised, and what it promises."""

import trio

from pxd.serving.requests import DeadlineExceeded, Generation


class Terms:
    """How urgent a request is, whose it is, and until when. `deadline` is on trio's clock.

    It is `patient` where the client has said itself how long it can wait: then it waits as long for
    a pipeline, too. `obstacle` is what it waits for.
    """

    def __init__(
        self, generation: Generation, client: str, limit: float, session: str = ""
    ) -> None:
        self.priority = generation.priority
        self.client = client
        self.session = session
        self.patient = generation.timeout is not None
        self.obstacle = "no pipeline had taken it"
        self._seconds = limit if generation.timeout is None else min(generation.timeout, limit)
        self.deadline = trio.current_time() + self._seconds

    @property
    def left(self) -> float:
        """Seconds; not above 0 once the time is over."""
        return self.deadline - trio.current_time()

    def over(self, reason: str) -> DeadlineExceeded:
        return DeadlineExceeded(f"the request was not done within {self._seconds:g} s: {reason}")
