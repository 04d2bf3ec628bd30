"""Measures the GPU that SGLang would use."""

import msgspec

from pxd.cluster.records import Device
from pxd.executors.sglang.runtime import choose_device
from pxd.executors.torch import measure as torch_device


def measure() -> Device:
    """Takes one to two seconds. Raises `ExecutorError` where there is nothing to run on."""
    choose_device()
    return msgspec.structs.replace(torch_device.measure(), executors=("sglang",))
