"""The examination without a daemon: what this machine alone can tell."""

import time
from functools import partial

import pxd
from pxd.doctor import engines, findings, firewall, loops, machine, multicast, opening
from pxd.doctor.doctor import Part, finish, in_thread, judged, report
from pxd.doctor.findings import Finding, Report
from pxd.doctor.interfaces import interfaces
from pxd.p2p.listening import listen
from pxd.settings import DEFAULT_LISTEN, Settings, parse_endpoint

DEADLINE_S = 30.0
"""Starting an executor takes most of it."""

PORTS_CHECK = "ports"


async def examine(settings: Settings, first: Finding, *, silent: bool = False) -> Report:
    """`first` says why there is no daemon to ask; `silent`: one runs and holds its ports."""
    began = time.monotonic()
    host, listen_port = parse_endpoint(settings.listen or DEFAULT_LISTEN)
    ports = firewall.ports_of(listen_port, listen_port + 1)
    here = interfaces()
    walls = Part("firewalls", partial(firewall.detect, ports))
    loop = Part("multicast", partial(loops.test_all, here))
    free = Part("ports", partial(_free, host, listen_port))
    device = Part("executors", partial(engines.measured, settings.executor, DEADLINE_S - 2))
    look = partial(machine.look, settings.data_dir, None)
    room = Part("the machine", partial(in_thread, look))
    await finish(walls, loop, free, device, room, within=DEADLINE_S)
    found = judged(
        ("daemon", lambda: [first]),
        ("ports", lambda: [] if silent else free.value or ()),
        ("firewall", lambda: opening.firewall(walls.value, None, ports[0])),
        ("multicast", lambda: multicast.loopback(loop.value, walls.value)),
        ("neighbours", lambda: _heard(loop.value)),
        ("disk", lambda: machine.disk(room.value)),
        ("memory", lambda: machine.memory(room.value)),
        ("executor", lambda: engines.executors(*(device.value or (None, "it took too long")))),
    )
    return report(settings.name, pxd.__version__, found, daemon=False, began=began)


async def _free(host: str, port: int) -> list[Finding]:
    """Whether a daemon could have its default ports."""
    taken = []
    for number in (port, port + 1):
        try:
            for listener in await listen(host, number):
                await listener.aclose()
        except OSError:
            taken.append(number)
    if not taken:
        return [findings.ok(PORTS_CHECK, f"ports {port} and {port + 1} are free for a daemon")]
    names = " and ".join(map(str, taken))
    text = f"another program has port {names}, so a daemon would take any free one instead"
    remedy = "if a firewall matters, choose a port of your own: `pxd start --listen HOST:PORT`"
    return [findings.note(PORTS_CHECK, text, remedy)]


def _heard(loop: tuple[loops.Loop, ...] | None) -> list[Finding]:
    hosts = sorted({host for each in loop or () for host in each.answers})
    if hosts:
        text = f"pxd runs on this network at {', '.join(hosts[:8])}"
        return [findings.ok(multicast.HEARD_CHECK, text)]
    return []
