"""Models that come from other nodes: what travels, and what goes wrong on the way."""

import errno
import itertools
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import pytest
import trio
from trio.testing import MockClock

from pxd.models import files
from pxd.models.chunks import CHUNK_BYTES
from pxd.models.describe import describe_checkpoint
from pxd.models.errors import ModelError
from pxd.models.files import ModelFiles
from pxd.models.journal import SIDE_DIRECTORY, Journal
from pxd.models.manifest import Manifest
from pxd.models.safetensors import read_header
from pxd.p2p.network import CallFailed, Method
from pxd.serving.weights.calls import (
    DIGESTS,
    OPEN,
    READ_CHUNKS,
    READ_SMALL,
    Digests,
    DigestsOf,
    Open,
    ReadChunks,
    ReadSmall,
    Sent,
    Which,
)
from pxd.wire import Weights
from tests.memory_network import MemoryNetwork
from tests.models.files import LAYER_KIB, flip, write_random

from .lenders import MODEL, Lenders

LAYERS = 4
LAYER_BYTES = (LAYER_KIB << 10) + 16


def tensors(directory: Path) -> dict[str, bytes]:
    """The bytes of all tensors, as a loader would read them."""
    found = {}
    for path in sorted(directory.glob("model*.safetensors")):
        header, data = read_header(path), path.read_bytes()
        head = len(data) - sum(info.nbytes for info in header.values())
        for name, info in header.items():
            begin, end = info.data_offsets
            found[name] = data[head + begin : head + end]
    return found


def check(fetched: Path, source: Path, start: int, end: int) -> None:
    """Exactly what a stage needs is there, and it is what the source has."""
    checkpoint = describe_checkpoint(source)
    wanted = checkpoint.tensors_for(start, end)
    right, got = tensors(source), tensors(fetched)
    assert got.keys() == right.keys()
    assert {name: got[name] for name in wanted} == {name: right[name] for name in wanted}
    kept = describe_checkpoint(fetched)
    assert kept.fingerprint == checkpoint.fingerprint
    assert kept.absent == right.keys() - wanted


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_random(tmp_path / "source")


async def test_only_the_bytes_of_a_stage_travel(
    clock: MockClock, source: Path, tmp_path: Path
) -> None:
    cluster = Lenders(tmp_path, "anna", "ben", "carl")
    cluster.give("anna", source)
    seen: list[float] = []
    async with cluster.running():
        fetched = await cluster.nodes["ben"].fetch(1, 3, seen)
        other = await cluster.nodes["carl"].fetch(3, 4)
    check(fetched, source, 1, 3)
    check(other, source, 3, 4)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    for name, start, end in (("ben", 1, 3), ("carl", 3, 4)):
        needed = describe_checkpoint(source).tensors_for(start, end)
        size = sum(len(data) for key, data in tensors(source).items() if key in needed)
        assert size <= sum(cluster.nodes[name].received.values()) <= 1.05 * size
    for file in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        assert (fetched / file).read_bytes() == (source / file).read_bytes()


async def test_several_sources_give_at_once(clock: MockClock, source: Path, tmp_path: Path) -> None:
    cluster = Lenders(tmp_path, "anna", "ben", "carl")
    for name in ("anna", "ben"):
        cluster.give(name, source)
    async with cluster.running():
        node = cluster.nodes["carl"]
        check(await node.fetch(0, LAYERS), source, 0, LAYERS)
    assert min(node.received["anna"], node.received["ben"]) > LAYER_BYTES


async def test_what_is_here_does_not_come_again(
    clock: MockClock, source: Path, tmp_path: Path
) -> None:
    cluster = Lenders(tmp_path, "anna", "ben")
    cluster.give("anna", source)
    node = cluster.nodes["ben"]
    async with cluster.running():
        await node.fetch(0, 2)
        before = sum(node.received.values())
        await node.fetch(0, 2)
        assert sum(node.received.values()) == before
        check(await node.fetch(1, 4), source, 0, 4)
        assert sum(node.received.values()) - before < 2.05 * LAYER_BYTES
        cluster.hub.cut("ben")
        await node.fetch(2, 3)


@pytest.mark.parametrize("known", [True, False], ids=["its digest is known", "it is not"])
async def test_a_flipped_byte_is_noticed_and_another_source_is_used(
    clock: MockClock,
    source: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    known: bool,
) -> None:
    """Bit rot that the source itself does not know of, or a copy that went wrong."""
    cluster = Lenders(tmp_path, "anna", "ben", "carl", "dora")
    other = write_random(tmp_path / "other")
    # The leader, whose copy is not believed all the same.
    damaged, sound = ("ben", "anna") if known else ("anna", "ben")
    cluster.give(sound, source)
    cluster.give(damaged, other)
    [shard, _] = sorted(other.glob("*.safetensors"))
    async with cluster.running():
        if known:
            await cluster.nodes["dora"].fetch(0, LAYERS)
        flip(shard, shard.stat().st_size - 30, secretly=known)
        with caplog.at_level(logging.ERROR):
            check(await cluster.nodes["carl"].fetch(0, LAYERS), source, 0, LAYERS)
    assert "nothing of /models/tiny is fetched from it" in caplog.text
    assert damaged in caplog.text
    assert "model.layers.1" in caplog.text


async def test_most_sources_are_right_even_against_the_leader(
    clock: MockClock, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = Lenders(tmp_path, "anna", "ben", "carl", "dora")
    odd = write_random(tmp_path / "odd")
    [shard, _] = sorted(odd.glob("*.safetensors"))
    flip(shard, shard.stat().st_size - 1)
    cluster.give("anna", odd)
    for name in ("ben", "carl"):
        cluster.give(name, source)
    async with cluster.running():
        check(await cluster.nodes["dora"].fetch(0, LAYERS), source, 0, LAYERS)
    assert "anna has other bytes in" in caplog.text


async def test_damage_without_another_source_is_an_error_and_is_not_kept(
    clock: MockClock, source: Path, tmp_path: Path
) -> None:
    cluster = Lenders(tmp_path, "anna", "ben", "carl")
    cluster.give("anna", source)
    [shard, _] = sorted(source.glob("*.safetensors"))
    place = shard.stat().st_size - 30
    async with cluster.running():
        await cluster.nodes["carl"].fetch(0, LAYERS)
        cluster.hub.cut("carl")
        flip(shard, place, secretly=True)
        with pytest.raises(ModelError, match=r"anna sent damaged bytes of model\.layers"):
            await cluster.nodes["ben"].fetch(0, LAYERS)
        flip(shard, place, secretly=True)
        check(await cluster.nodes["ben"].fetch(0, LAYERS), source, 0, LAYERS)


async def test_a_source_that_goes_is_replaced(
    clock: MockClock, source: Path, tmp_path: Path
) -> None:
    cluster = Lenders(tmp_path, "anna", "ben", "carl")
    for name in ("anna", "ben"):
        cluster.give(name, source)
    node = cluster.nodes["carl"]
    node.meanwhile = lambda come: cluster.hub.cut("anna", "carl") if come > LAYER_BYTES else None
    async with cluster.running():
        check(await node.fetch(0, LAYERS), source, 0, LAYERS)


async def test_with_nobody_left_it_is_given_up_and_goes_on_later(
    clock: MockClock, source: Path, tmp_path: Path
) -> None:
    cluster = Lenders(tmp_path, "anna", "ben")
    cluster.give("anna", source)
    node = cluster.nodes["ben"]
    node.meanwhile = lambda come: cluster.hub.cut("anna") if come > 2 * LAYER_BYTES else None
    async with cluster.running():
        # One chunk at a time comes then, so that there is a rest for sure.
        node.busy = True
        with pytest.raises(ModelError, match="MiB are still to come"):
            await node.fetch(0, LAYERS)
        node.busy = False
        node.meanwhile = lambda _: None
        cluster.hub.heal("anna")
        check(await node.fetch(0, LAYERS), source, 0, LAYERS)
    assert sum(node.received.values()) < 1.05 * LAYERS * LAYER_BYTES + CHUNK_BYTES


async def test_a_plan_that_changes_loses_nothing_that_has_come(
    clock: MockClock, source: Path, tmp_path: Path
) -> None:
    cluster = Lenders(tmp_path, "anna", "ben")
    cluster.give("anna", source)
    node = cluster.nodes["ben"]
    async with cluster.running():
        with trio.CancelScope() as scope:
            node.meanwhile = lambda come: scope.cancel() if come > 2 * LAYER_BYTES else None
            await node.fetch(0, LAYERS)
        assert scope.cancelled_caught
        node.meanwhile = lambda _: None
        check(await node.fetch(0, LAYERS), source, 0, LAYERS)
    # What was on its way when the plan changed comes again.
    assert sum(node.received.values()) < LAYERS * LAYER_BYTES * 1.05 + 4 * (1 << 20)


KILLED = """
import os, signal, sys
from pathlib import Path
import pytest, trio
from tests.serving.conftest import inline_clock
from tests.serving.lenders import MODEL, Lenders

# Else threads may have written all the rest when the first half is told of.
inline_clock(pytest.MonkeyPatch())

def progress(done, words=""):
    if done >= 0.5:
        os.kill(os.getpid(), signal.SIGKILL)

async def main(root):
    cluster = Lenders(root, "anna", "ben")
    cluster.give("anna", root / "source")
    async with cluster.running():
        await cluster.nodes["ben"].sharing.fetch.layers(MODEL, "", 0, 4, progress)

trio.run(main, Path(sys.argv[1]))
"""


async def test_a_process_killed_at_half_resumes(
    clock: MockClock, source: Path, tmp_path: Path
) -> None:
    whole = sum(map(len, tensors(source).values()))
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    cluster = Lenders(tmp_path, "anna", "ben")
    cluster.give("anna", source)
    async with cluster.running():
        check(await cluster.nodes["ben"].fetch(0, LAYERS), source, 0, LAYERS)
    assert 0 < sum(cluster.nodes["ben"].received.values()) <= whole / 2


async def test_after_a_crash_what_is_here_is_read_again(
    clock: MockClock, source: Path, tmp_path: Path
) -> None:
    """As after a power cut: the journal came to the disk, and some of what it promises did not."""
    cluster = Lenders(tmp_path, "anna", "ben")
    cluster.give("anna", source)
    node = cluster.nodes["ben"]
    async with cluster.running():
        fetched = await node.fetch(0, LAYERS)
        (fetched / SIDE_DIRECTORY / "filling").touch()
        [shard, _] = sorted(fetched.glob("*.safetensors"))
        flip(shard, shard.stat().st_size - 30)
        node.received.clear()
        check(await node.fetch(0, LAYERS), source, 0, LAYERS)
    assert 0 < sum(node.received.values()) <= CHUNK_BYTES


@pytest.mark.parametrize("keep", [10, -10], ids=["no header", "too short"])
async def test_files_that_were_damaged_here_come_again(
    clock: MockClock, source: Path, tmp_path: Path, keep: int
) -> None:
    cluster = Lenders(tmp_path, "anna", "ben")
    cluster.give("anna", source)
    node = cluster.nodes["ben"]
    async with cluster.running():
        fetched = await node.fetch(0, LAYERS)
        [shard, _] = sorted(fetched.glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:keep])
        node.received.clear()
        check(await node.fetch(0, LAYERS), source, 0, LAYERS)
    assert sum(node.received.values()) < (source / shard.name).stat().st_size + CHUNK_BYTES


async def test_a_source_whose_disk_is_full_lends_all_the_same(
    clock: MockClock, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk(Journal):
        def put(self, digests: dict[int, bytes]) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "Journal", FullDisk)
    cluster = Lenders(tmp_path, "anna", "ben")
    cluster.give("anna", source)
    async with cluster.running():
        check(await cluster.nodes["ben"].fetch(0, LAYERS), source, 0, LAYERS)


async def test_nodes_that_fetch_give_on_what_they_have(
    clock: MockClock, source: Path, tmp_path: Path
) -> None:
    cluster = Lenders(tmp_path, "anna", "ben", "carl")
    cluster.give("anna", source)
    async with cluster.running():
        await cluster.nodes["ben"].fetch(1, 3)
        cluster.hub.cut("anna")
        check(await cluster.nodes["carl"].fetch(2, 3), source, 2, 3)
        with pytest.raises(ModelError, match=r"gives model\.embed_tokens\.weight"):
            await cluster.nodes["carl"].fetch(0, 1)


async def test_the_one_that_has_all_is_found_among_many_that_have_little(
    clock: MockClock, source: Path, tmp_path: Path
) -> None:
    names = [f"node{number}" for number in range(10)]
    cluster = Lenders(tmp_path, *names, "zoe")
    cluster.give("zoe", source)
    async with cluster.running():
        for name in names:
            # From then on it says that it has files of the model.
            await cluster.nodes[name].sharing.fetch.metadata(MODEL)
        check(await cluster.nodes["node0"].fetch(0, LAYERS), source, 0, LAYERS)


async def test_a_full_disk_is_said_and_harms_nothing(
    clock: MockClock, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Lenders(tmp_path, "anna", "ben")
    cluster.give("anna", source)
    node, written = cluster.nodes["ben"], 0
    real = os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 2 * LAYER_BYTES:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    async with cluster.running():
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", pwrite)
            with pytest.raises(ModelError, match="no space left for /models/tiny: free some"):
                await node.fetch(0, LAYERS)
        check(await node.fetch(0, LAYERS), source, 0, LAYERS)


async def test_what_would_not_fit_is_not_begun(
    clock: MockClock, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Lenders(tmp_path, "anna", "ben")
    cluster.give("anna", source)
    usage = type("Usage", (), {"free": LAYER_BYTES})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    async with cluster.running():
        with pytest.raises(ModelError, match=r"no space left: .* GiB are to come"):
            await cluster.nodes["ben"].fetch(0, LAYERS)
        assert sum(cluster.nodes["ben"].received.values()) < CHUNK_BYTES


@pytest.mark.parametrize("busy", ["ben", "anna"])
async def test_while_requests_run_little_is_on_its_way(
    clock: MockClock, source: Path, tmp_path: Path, busy: str
) -> None:
    cluster = Lenders(tmp_path, "anna", "ben")
    cluster.give("anna", source)
    cluster.nodes[busy].busy = True
    node = cluster.nodes["ben"]
    sizes: list[int] = []
    node.meanwhile = sizes.append
    async with cluster.running():
        check(await node.fetch(1, LAYERS), source, 1, LAYERS)
    steps = [after - before for before, after in itertools.pairwise(sizes)]
    assert max(steps) <= CHUNK_BYTES
    assert sum(steps) > 2 * LAYER_BYTES


def which(**changes: str) -> Which:
    return Which(**{"model": MODEL, "fingerprint": "f", "mark": "m", "file": "a", **changes})


async def test_nothing_is_lent_but_what_is_announced(
    clock: MockClock, source: Path, tmp_path: Path
) -> None:
    cluster = Lenders(tmp_path, "anna", "ben")
    cluster.give("anna", source)
    (source / "secret.key").write_text("secret")
    network = cluster.nodes["ben"].network

    async def code(method: Method[Any, Any], request: object) -> str:
        with pytest.raises(CallFailed) as caught:
            await network.call("anna", method, request, timeout=5)
        return caught.value.code

    async with cluster.running():
        assert await code(OPEN, Open("/etc")) == "not-here"
        manifest = await network.call("anna", OPEN, Open(MODEL), timeout=5)
        assert "secret.key" not in [file.name for file in manifest.files]
        of = {"fingerprint": manifest.fingerprint, "mark": manifest.mark}
        for file in ("../secret.key", "/etc/passwd", ".pxd", ""):
            request = ReadSmall(1, which(**of, file=file), 0, 4)
            assert await code(READ_SMALL, request) == "bad-request"
        for file, offset in (("secret.key", 0), ("config.json", 1 << 20), ("nothing.json", 0)):
            request = ReadSmall(1, which(**of, file=file), offset, 4)
            assert await code(READ_SMALL, request) == "not-here"
        shard = manifest.weights[0].name
        for numbers in ((1 << 40,), (0, 99)):
            request = ReadChunks(1, which(**of, file=shard), numbers)
            assert await code(READ_CHUNKS, request) == "not-here"
        whole = ReadChunks(1, which(**of, file=shard), (4,) * 9)
        assert await code(READ_CHUNKS, whole) == "too-much"
        old = ReadSmall(1, which(file="config.json"), 0, 4)
        assert await code(READ_SMALL, old) == "not-here"
    assert sum(cluster.nodes["ben"].received.values()) == 0


async def test_frames_that_nobody_asked_for_are_not_read(tmp_path: Path) -> None:
    sharing = Lenders(tmp_path, "anna").nodes["anna"].sharing
    frame = Weights(number=7, size=4)
    assert not sharing.expects("ben", frame)
    sharing.arrived("ben", frame, b"abcd")
    assert sharing.fetch.arrivals.bytes == 0


Lie = Literal["its name twice", "another revision", "short digests", "other bytes", "nothing"]


async def lie(lies: Lie, network: MemoryNetwork, honest: Path, scratch: Path) -> None:
    """Serve `honest` as a source does, but for one thing."""
    opened = ModelFiles(honest, scratch)
    manifest = opened.manifest
    if lies == "its name twice":
        manifest = msgspec.structs.replace(manifest, files=manifest.files * 2)
    elif lies == "another revision":
        manifest = msgspec.structs.replace(manifest, fingerprint="f")

    async def on_open(peer: str, request: Open) -> Manifest:
        return manifest

    async def on_digests(peer: str, request: DigestsOf) -> Digests:
        chunks = [opened.chunk(request.which.file, number) for number in request.chunks]
        digests = b"".join(opened.digests(request.which.file, chunks))
        return Digests(digests[:31] if lies == "short digests" else digests)

    async def on_chunks(peer: str, request: ReadChunks) -> Sent:
        chunks = [opened.chunk(request.which.file, number) for number in request.chunks]
        data = opened.read(request.which.file, chunks)
        if lies == "other bytes":
            data = bytes(len(data))
        if lies != "nothing":
            await network.send(peer, Weights(number=request.number, size=len(data)), data)
        return Sent(busy=False)

    async def on_small(peer: str, request: ReadSmall) -> Sent:
        data = opened.read_small(request.which.file, request.offset, request.size)
        if lies == "other bytes":
            data = bytes(len(data))
        await network.send(peer, Weights(number=request.number, size=len(data)), data)
        return Sent(busy=False)

    network.serve(OPEN, on_open)
    network.serve(DIGESTS, on_digests)
    network.serve(READ_CHUNKS, on_chunks)
    network.serve(READ_SMALL, on_small)


@pytest.mark.parametrize("lies", get_args(Lie))
async def test_a_source_that_lies_does_no_harm(
    clock: MockClock, source: Path, tmp_path: Path, lies: Lie
) -> None:
    cluster = Lenders(tmp_path, "anna", "carl")
    cluster.give("anna", source)
    cluster.leader = "liar"
    network = cluster.add("liar")
    await lie(lies, network, source, tmp_path / "scratch")
    async with cluster.running() as nursery:
        await nursery.start(network.run)
        check(await cluster.nodes["carl"].fetch(0, LAYERS), source, 0, LAYERS)


async def test_a_manifest_of_another_model_than_its_files_is_found_out(
    clock: MockClock, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = Lenders(tmp_path, "carl")
    network = cluster.add("liar")
    await lie("another revision", network, source, tmp_path / "scratch")
    async with cluster.running() as nursery:
        await nursery.start(network.run)
        with pytest.raises(ModelError, match="no node that can be reached has"):
            await cluster.nodes["carl"].fetch(0, LAYERS)
    assert cluster.nodes["carl"].sharing.library.find(MODEL) is None
    assert "what came from liar is not what was said to come" in caplog.text
