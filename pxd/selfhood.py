"""What a node is before it runs: its keys and counters, and what its machine can do."""

import logging

import msgspec

from pxd import hardware, identity
from pxd.cluster.bans import BanTable
from pxd.cluster.records import Device
from pxd.executors import choose_executor
from pxd.executors.choice import installed_kinds, spread
from pxd.executors.protocol import ExecutorDied, ExecutorError
from pxd.p2p.addressbook import has_met_others
from pxd.serving.door import read_bans
from pxd.settings import Settings

log = logging.getLogger("pxd.node")


class StartupError(Exception):
    """The daemon cannot start; the message says what to do."""


def for_people(group: BaseExceptionGroup[BaseException]) -> Exception | None:
    """The first exception in `group` whose message is meant for people."""
    for error in group.exceptions:
        if isinstance(error, (StartupError, identity.IdentityError)):
            return error
        if isinstance(error, BaseExceptionGroup) and (found := for_people(error)):
            return found
    return None


class Identity(msgspec.Struct, frozen=True):
    """What makes this node itself across restarts."""

    node_seed: bytes
    ring: identity.Keyring
    bans: BanTable
    state: identity.State
    join: tuple[str, ...]


def memory_offer(settings: Settings, device: Device) -> int:
    """Bytes of memory for models, of the device's own memory where it has some of its own."""
    if device.kind in ("cuda", "rocm"):
        return hardware.memory_offer(device.memory, device.memory, settings.memory)
    total, available = hardware.memory_total(), hardware.memory_available()
    offer = hardware.memory_offer(total, available, settings.memory)
    limit = device.memory_limit
    if not limit or offer <= limit:
        return offer
    log.info(
        "macOS lets the GPU use %.1f GiB, so no more is offered to models; "
        "`sudo sysctl iogpu.wired_limit_mb=…` raises that until the next start of the machine",
        limit / (1 << 30),
    )
    return limit


def identify(settings: Settings) -> Identity:
    """Read the data directory; from now on this is another life. Raises `IdentityError`."""
    try:
        return _identify(settings)
    except OSError as error:
        why = error.strerror or error
        raise identity.IdentityError(
            f"cannot keep who this node is in {settings.data_dir}: {why}; give it room there, or "
            "another place with --data-dir DIR"
        ) from error


def _identify(settings: Settings) -> Identity:
    files = settings.files
    ticket = identity.Ticket.parse(settings.join) if settings.join else None
    alone = not has_met_others(files.peers)
    ring = identity.read_keyring(files.cluster_key, ticket, alone=alone)
    bans = read_bans(files.bans)
    state = identity.read_state(files.state)
    state = msgspec.structs.replace(state, incarnation=state.incarnation + 1)
    identity.write_state(files.state, state)
    addresses = ticket.addresses if ticket else ()
    return Identity(identity.node_key(files.node_key), ring, bans, state, addresses)


async def measured_device(settings: Settings) -> Device:
    """What this machine can do with the executor that it is to run, which is named there.

    Measured at the first start, after an upgrade, and when there are other executors to choose
    from. Raises `StartupError` when none works.
    """
    kinds = ", ".join(installed_kinds())
    path = settings.files.hardware
    key = f"{hardware.machine_key()}, {settings.executor} of {kinds}"
    device = hardware.load_cached(path, key, Device)
    if device is None:
        log.info("measuring this machine, once")
        try:
            device = await choose_executor(settings.executor)
        except (ExecutorError, ExecutorDied) as error:
            raise StartupError(f"no executor works on this machine: {error}") from error
        hardware.store(path, key, device)
    return spread(device, settings.tensor_parallel)
