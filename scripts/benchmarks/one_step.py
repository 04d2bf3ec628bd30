"""pxd without micro-batches: its heads keep one step under way, whatever the number of stages."""

from typing import Any

from pxd.cli.main import main
from pxd.engine.continuous import ContinuousConfig
from pxd.serving import head


def one_step_at_a_time(**settings: Any) -> ContinuousConfig:
    return ContinuousConfig(**{**settings, "max_in_flight": 1})


# There is no such setting: nobody should want it but to see what micro-batches are worth.
if getattr(head, "ContinuousConfig", None) is not ContinuousConfig:
    raise ImportError("the head no longer takes ContinuousConfig from here")
setattr(head, "ContinuousConfig", one_step_at_a_time)  # noqa: B010

if __name__ == "__main__":
    main()
