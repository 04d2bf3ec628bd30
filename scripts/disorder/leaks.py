"""What is left over once all is quiet: processes, file descriptors, threads, requests, blocks."""

import os
import sys
from collections import Counter

import msgspec
import psutil
import trio

from scripts.disorder.cluster import MARK, Cluster, Node, Status

SPARE_DESCRIPTORS = 8
"""By so much a daemon may have more open than at the start: who leads has other connections."""

SPARE_THREADS = 8
QUIET_S = 45.0
POLL_S = 1.0


class Holding(msgspec.Struct, frozen=True, kw_only=True):
    """What one daemon had. `kinds` of file descriptors are known on Linux alone."""

    descriptors: int
    threads: int
    kinds: dict[str, int] = {}


def holding(node: Node) -> Holding:
    daemon = node.program.family()[0]
    return Holding(
        descriptors=daemon.num_fds(), threads=daemon.num_threads(), kinds=_kinds(daemon.pid)
    )


def _kinds(pid: int) -> dict[str, int]:
    if not sys.platform.startswith("linux"):
        return {}
    found: Counter[str] = Counter()
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{descriptor}")
        except FileNotFoundError:
            continue
        kind, separator, _ = target.partition(":")
        found[kind if separator and kind != "anon_inode" else target] += 1
    return dict(found)


def processes(root: str) -> set[int]:
    """All that daemons of this run have started, whoever its parent is by now."""
    return {
        process.pid
        for process in psutil.process_iter(["environ", "status"])
        if (process.info["environ"] or {}).get(MARK) == root
        and process.info["status"] != psutil.STATUS_ZOMBIE
    }


def more(name: str, before: Holding, now: Holding) -> list[str]:
    """What a daemon has too much of, in words."""
    found = []
    extra = now.descriptors - before.descriptors
    if extra > SPARE_DESCRIPTORS:
        kinds = Counter(now.kinds)
        kinds.subtract(before.kinds)
        shown = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common() if count > 0)
        found.append(f"{name}: {extra} file descriptors more than at the start: {shown}")
    if (extra := now.threads - before.threads) > SPARE_THREADS:
        found.append(f"{name}: {extra} threads more than at the start")
    return found


def requests(name: str, status: Status) -> list[str]:
    return [
        f"{name} says that {node['name']} holds {node['running']} running and "
        f"{node['waiting']} waiting requests"
        for node in status["nodes"]
        if node["running"] or node["waiting"]
    ]


def blocks(name: str, status: Status) -> list[str]:
    """KV blocks that are not back, neither at the heads of pipelines nor at their stages."""
    held = [
        f"{name} says that {node['name']} holds {stage['kv_held']} KV blocks of "
        f"[{stage['start']},{stage['end']})"
        for node in status["nodes"]
        for stage in node["stages"]
        if stage["kv_held"]
    ]
    return held + [
        f"{name} says that pipeline {number} of {model['name']} has {kv['free']} free KV blocks "
        f"of {kv['total']}"
        for model in status["models"]
        for number, kv in enumerate(model["kv"], 1)
        if kv["free"] != kv["total"] or not kv["total"]
    ]


def orphans(cluster: Cluster) -> list[str]:
    families = [process.pid for node in cluster.nodes for process in node.program.family()]
    left = processes(str(cluster.root)) - set(families)
    return [f"process {pid} belongs to no daemon" for pid in sorted(left)]


async def leaks(cluster: Cluster, before: dict[str, Holding]) -> list[str]:
    """All of them, as of now."""
    found = orphans(cluster)
    for node in cluster.nodes:
        status = await node.status()
        found += [*requests(node.name, status), *blocks(node.name, status)] if status else []
        found += [] if status else [f"{node.name} does not answer"]
        found += more(node.name, before[node.name], holding(node))
    return found


async def quiet(cluster: Cluster, before: dict[str, Holding]) -> list[str]:
    """What is left over after a time in which nobody asked for anything."""
    left: list[str] = []
    with trio.move_on_after(QUIET_S):
        while left := await leaks(cluster, before):
            await trio.sleep(POLL_S)
    return left
