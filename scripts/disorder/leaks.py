"""What is left over once all is quiet: processes, file descriptors, threads, requests."""

import os
import sys
from collections import Counter

import msgspec
import psutil

from scripts.disorder.cluster import MARK, Cluster, Node, Status

SPARE_DESCRIPTORS = 8
"""By so much a daemon may have more open than at the start: who leads has other connections."""

SPARE_THREADS = 8


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


def orphans(cluster: Cluster) -> list[str]:
    families = [process.pid for node in cluster.nodes for process in node.program.family()]
    left = processes(str(cluster.root)) - set(families)
    return [f"process {pid} belongs to no daemon" for pid in sorted(left)]


async def leaks(cluster: Cluster, before: dict[str, Holding]) -> list[str]:
    """All of them, as of now."""
    found = orphans(cluster)
    for node in cluster.nodes:
        status = await node.status()
        found += requests(node.name, status) if status else [f"{node.name} does not answer"]
        found += more(node.name, before[node.name], holding(node))
    return found
