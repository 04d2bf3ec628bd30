"""Which executor works on this machine, and why others do not."""

import shutil

from pxd.cluster.records import Device
from pxd.doctor import findings
from pxd.doctor.findings import Finding
from pxd.executors import choose_executor
from pxd.executors.backends import KINDS
from pxd.executors.choice import installed_kinds
from pxd.executors.protocol import ExecutorDied, ExecutorError
from pxd.executors.sglang.pinned import check_version
from pxd.settings import ExecutorChoice

CHECK = "executor"
GPU_ONLY = frozenset({"sglang"})


async def measured(wanted: ExecutorChoice, timeout: float) -> tuple[Device | None, str]:
    """The device as the daemon would measure it; None and why not."""
    try:
        return await choose_executor(wanted, timeout=timeout), ""
    except (ExecutorError, ExecutorDied) as error:
        return None, str(error)


def _wrong_sglang() -> str:
    """Of its release; empty if it is the right one."""
    try:
        check_version()
    except ImportError as error:
        return str(error)
    return ""


def _why_not(kind: str) -> str:
    if kind not in installed_kinds():
        return "not installed"
    if kind == "sglang" and (wrong := _wrong_sglang()):
        return wrong
    if kind in GPU_ONLY and shutil.which("nvidia-smi") is None:
        return "no GPU that it could use"
    return "installed, but not taken; `pxd start --executor` chooses, and its log says what fails"


def executors(device: Device | None, failure: str = "") -> list[Finding]:
    if device is None or not device.executors:
        text = f"no executor works on this machine: {failure or 'it has not been measured'}"
        remedy = "install pxd with its dependencies anew; `python -c 'import mlx.core'` tells more"
        return [findings.problem(CHECK, text, remedy)]
    others = [kind for kind in KINDS if kind not in device.executors]
    details = tuple(f"{kind}: {_why_not(kind)}" for kind in others)
    where = f"{device.kind}: {device.name}" if device.name else device.kind
    speed = f"{device.tflops:.3g} TFLOP/s, {device.bandwidth:.3g} GB/s"
    text = f"{' and '.join(device.executors)} works on {where} ({speed})"
    return [findings.Finding(check=CHECK, level="ok", text=text, details=details)]
