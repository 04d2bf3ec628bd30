"""Whose fault it is that an attempt failed, from the words of the head."""

from typing import Literal

Fault = Literal["pool", "client", "busy", "executor", "time", "reader", "silence"]
"""pool: the request goes on elsewhere. client: it could never be served. busy: the pipeline is well
and has no room. executor: a process died over it, which may be its doing. time: it is too late.
reader: the client does not take its answer. silence: perhaps nothing has failed, and it would be
better off elsewhere all the same."""

TOO_SLOW = "too-slow"

_FAULTS: dict[str, Fault] = {
    "never-fits": "client",
    TOO_SLOW: "reader",
    "overloaded": "busy",
    "one-at-a-time": "busy",
    "executor-died": "executor",
    "deadline": "time",
    "silence": "silence",
}


def fault_of(failure: str) -> Fault:
    """`failure` begins with its code, as the head's refusals and `Output.failure` do."""
    return _FAULTS.get(failure.partition(":")[0], "pool")
