"""Measures the device as PyTorch sees it."""

from collections.abc import Callable

import torch

from pxd.cluster.records import Device
from pxd.executors.rates import COLUMNS, measured
from pxd.executors.torch.device import choose_device, kind_of, memory_of, wait_for
from pxd.hardware import device_name


def measure() -> Device:
    """Takes one to two seconds."""
    device = choose_device()
    gpu = device.type == "cuda"
    return measured(
        kind=kind_of(device),
        name=torch.cuda.get_device_name(device) if gpu else device_name(),
        memory=memory_of(device),
        executor="torch",
        matmul=lambda side: _matmul(side, device),
        read=lambda size: _read(size, device),
    )


def _matmul(side: int, device: torch.device) -> Callable[[], None]:
    a = torch.ones(side, side, dtype=torch.bfloat16, device=device)
    b = torch.ones(side, side, dtype=torch.bfloat16, device=device)

    def run() -> None:
        torch.matmul(a, b)
        wait_for(device)

    wait_for(device)
    return run


def _read(size: int, device: torch.device) -> Callable[[], None]:
    weights = torch.ones(size // (4 * COLUMNS), COLUMNS, device=device)
    position = torch.ones(1, COLUMNS, device=device)

    def run() -> None:
        torch.nn.functional.linear(position, weights)
        wait_for(device)

    wait_for(device)
    return run
