"""The device that PyTorch computes on here."""

import psutil
import torch

from pxd import hardware


def choose_device() -> torch.device:
    """A GPU of NVIDIA or AMD where there is one, which PyTorch both calls cuda; else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def kind_of(device: torch.device) -> str:
    if device.type == "cuda" and torch.version.hip is not None:
        return "rocm"
    return device.type


def memory_of(device: torch.device) -> int:
    """Bytes that the device has in all; a CPU's is the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still allocate on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return hardware.memory_available()


def wait_for(device: torch.device) -> None:
    """Until all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
