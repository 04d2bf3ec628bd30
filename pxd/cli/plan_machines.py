"""`pxd plan --machines`: the catalogue."""

import msgspec

from pxd.cli.plain import columns
from pxd.planning.machines import MACHINES


def as_json() -> str:
    return msgspec.json.format(msgspec.json.encode(MACHINES)).decode() + "\n"


def as_text() -> str:
    rows = [
        (
            machine.name,
            f"{machine.memory_gib:g} GiB",
            f"{machine.tflops:g} TFLOP/s",
            f"{machine.bandwidth:g} GB/s",
            machine.source,
        )
        for machine in MACHINES
    ]
    header = ("MACHINE", "MEMORY", "FP16", "BANDWIDTH", "SOURCE")
    return "\n".join(columns(header, rows)) + "\n"
