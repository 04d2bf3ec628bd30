"""Keys and bans among members: told to all, caught up by who was away, stored before used."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from pxd import identity
from pxd.cluster.bans import MAX_BANS, Ban, BanTable
from pxd.cluster.records import NodeRecord
from pxd.cluster.stamps import ceiling
from pxd.identity import IdentityError, Keyring
from pxd.p2p.network import CallFailed
from pxd.serving.door import PULL, PUSH, Door, DoorError, DoorState, read_bans, write_bans
from pxd.serving.doorview import NodeRef
from pxd.settings import DataFiles
from tests.memory_network import MemoryHub

FIRST = Keyring.first(b"k" * 32)
NAMES = {"a": "anna", "b": "ben", "c": "carl"}


@dataclass
class Seen:
    record: NodeRecord
    state: str = "alive"


class House:
    """A door per node, with gossip that arrives at once: all see each other's digests."""

    def __init__(self, nursery: trio.Nursery, directory: Path) -> None:
        self.nursery = nursery
        self.directory = directory
        self.hub = MemoryHub()
        self.doors: dict[str, Door] = {}
        self.states: dict[str, str] = {}
        self.in_force: dict[str, list[tuple[Keyring, frozenset[str]]]] = {}
        self.extra: dict[str, str] = {}
        self.now = 1000.0

    async def add(self, node: str, ring: Keyring = FIRST) -> Door:
        files = self.files(node)
        files.root.mkdir()
        identity.write_keyring(files.cluster_key, ring)
        network = self.hub.network(node)
        self.in_force[node] = []

        async def changed(ring: Keyring, banned: frozenset[str]) -> None:
            # What is in force is on disk.
            assert identity.read_keyring(files.cluster_key, None) == ring
            assert read_bans(files.bans).banned == banned
            self.in_force[node].append((ring, banned))
            for peer in banned - {node}:
                self.hub.cut(node, peer)
            self.gossip()

        members = lambda: self.members(node)  # noqa: E731
        door = Door(network, members, files, ring, BanTable(), changed, lambda: self.now)
        self.doors[node] = door
        await self.nursery.start(network.run)
        self.nursery.start_soon(door.run)
        return door

    def files(self, node: str) -> DataFiles:
        return DataFiles(self.directory / node)

    def members(self, viewer: str) -> dict[str, Seen]:
        banned = self.doors[viewer].bans.banned - {viewer}
        return {
            node: Seen(
                NodeRecord(id=node, name=NAMES.get(node, node), door=door.digest),
                self.states.get(node, "alive"),
            )
            for node, door in self.doors.items()
            if node not in banned
        } | {
            node: Seen(NodeRecord(id=node, name="", door=shown))
            for node, shown in self.extra.items()
        }

    def gossip(self) -> None:
        for door in self.doors.values():
            door.follow()

    def agreed(self, *nodes: str) -> bool:
        return len({self.doors[node].digest for node in nodes or self.doors}) == 1


@pytest.fixture
async def house(nursery: trio.Nursery, tmp_path: Path) -> House:
    house = House(nursery, tmp_path)
    for node in "abc":
        await house.add(node)
    return house


def refs(*nodes: str) -> list[NodeRef]:
    return [NodeRef(id=node, name=NAMES[node]) for node in nodes]


async def test_a_new_key_reaches_everybody_and_the_old_one_counts_for_a_while(
    house: House,
    clock: MockClock,
) -> None:
    rotation = await house.doors["a"].rotate(100.0)
    assert (rotation.generation, rotation.grace) == (1, 100.0)
    assert (rotation.told.confirmed, rotation.told.unconfirmed) == (refs("b", "c"), [])
    assert house.agreed()
    for door in house.doors.values():
        new, old = door.ring.keys(house.now)
        assert new != old == FIRST.key
        assert door.ring.keys(house.now + 100) == (new,)
        assert door.ring.cluster == FIRST.cluster
    assert all(len(changes) == 1 for changes in house.in_force.values())


async def test_who_was_off_is_reported_and_catches_up(house: House, clock: MockClock) -> None:
    house.states["c"] = "dead"
    house.hub.cut("c")
    rotation = await house.doors["a"].rotate(100.0)
    assert (rotation.told.confirmed, rotation.told.unconfirmed) == (refs("b"), refs("c"))
    assert house.agreed("a", "b")
    assert not house.agreed()
    house.now += 60
    house.states.clear()
    house.hub.heal("c")
    house.gossip()
    await trio.sleep(10)
    assert house.agreed()
    assert house.doors["c"].ring.grace(house.now) == 40


async def test_a_member_that_does_not_answer_is_reported(house: House, clock: MockClock) -> None:
    house.hub.cut("b", "a")
    rotation = await house.doors["a"].rotate(100.0)
    assert rotation.told.unconfirmed == refs("b")
    # It hears of it from c in the meantime.
    await trio.sleep(10)
    assert house.agreed()


async def test_two_rotations_at_once_end_with_one_key(house: House, clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(house.doors["a"].rotate, 100.0)
        nursery.start_soon(house.doors["b"].rotate, 100.0)
    await trio.sleep(10)
    assert house.agreed()
    assert FIRST.key in house.doors["c"].ring.keys(house.now)


async def test_rotations_on_both_sides_of_a_partition_end_with_one_key(
    house: House, clock: MockClock
) -> None:
    house.hub.cut("a", "b", "c")
    await house.doors["a"].rotate(100.0)
    await house.doors["b"].rotate(100.0)
    assert not house.agreed()
    winner = max((house.doors[node].ring for node in "ab"), key=lambda ring: ring.order)
    house.hub.heal("a")
    house.gossip()
    await trio.sleep(10)
    assert house.agreed()
    assert house.doors["c"].ring.key == winner.key


async def test_a_key_that_cannot_be_stored_is_not_used(
    house: House, clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, ring: Keyring) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(identity, "write_keyring", full)
        with pytest.raises(DoorError, match="No space left on device; the old one stays"):
            await house.doors["a"].rotate(100.0)
    assert house.agreed()
    assert house.doors["a"].ring == FIRST
    write = identity.write_keyring

    def full_at_b(path: Path, ring: Keyring) -> None:
        if path == house.files("b").cluster_key:
            raise OSError(28, "No space left on device")
        write(path, ring)

    with monkeypatch.context() as patch:
        patch.setattr(identity, "write_keyring", full_at_b)
        rotation = await house.doors["a"].rotate(100.0)
        assert rotation.told.unconfirmed == refs("b")
        assert house.doors["b"].ring == FIRST
        # It keeps trying, and stays able to serve.
        await trio.sleep(10)
    await trio.sleep(10)
    assert house.agreed()


async def test_a_rotation_that_is_cancelled_is_finished_or_never_was(
    house: House, clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that is stored and that nobody else is told of would lock the node out."""
    write, a = identity.write_keyring, house.doors["a"]

    with trio.CancelScope() as scope:

        def write_late(path: Path, ring: Keyring) -> None:
            if path == house.files("a").cluster_key:
                scope.cancel()
            write(path, ring)

        monkeypatch.setattr(identity, "write_keyring", write_late)
        await a.rotate(0.0)
    assert a.ring != FIRST
    assert identity.read_keyring(house.files("a").cluster_key, None) == a.ring
    assert house.agreed()


async def test_a_kick_that_is_cancelled_is_in_force_all_the_same(
    house: House, clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, merge = house.doors["a"], BanTable.merge
    with trio.CancelScope() as scope, monkeypatch.context() as patch:

        def merge_late(table: BanTable, *arguments: Any) -> BanTable:
            scope.cancel()
            return merge(table, *arguments)

        patch.setattr(BanTable, "merge", merge_late)
        await a.kick("carl")
    assert house.in_force["a"][-1][1] == a.bans.banned == {"c"}
    await trio.sleep(5)
    assert house.agreed("a", "b")


async def test_a_kick_reaches_everybody_but_the_kicked(house: House, clock: MockClock) -> None:
    kick = await house.doors["a"].kick("carl")
    assert kick.node == NodeRef(id="c", name="carl")
    assert (kick.told.confirmed, kick.rotation) == (refs("b"), None)
    assert [ban.peer for ban in house.doors["b"].banned()] == ["c"]
    assert house.in_force["b"] == [(FIRST, frozenset({"c"}))]
    assert not house.in_force["c"]
    again = read_bans(house.files("b").bans)
    assert again == house.doors["b"].bans
    pardon = await house.doors["b"].pardon("carl")
    assert (pardon.told.confirmed, pardon.told.unconfirmed) == (refs("a"), refs("c"))
    house.hub.heal("c")
    house.gossip()
    await trio.sleep(10)
    assert house.agreed()
    assert not house.doors["a"].banned()


async def test_the_kicked_never_gets_the_new_key(house: House, clock: MockClock) -> None:
    """Nor does it from a member that hears of ban and key only when it asks for them."""
    late = await house.add("d")
    house.states["d"] = "dead"
    house.hub.cut("d", "a", "b")
    kick = await house.doors["a"].kick("c", rotate=True)
    assert kick.rotation is not None
    assert kick.rotation.grace == 0
    assert house.doors["b"].ring.keys(house.now) == (house.doors["a"].ring.key,)
    assert late.ring == FIRST
    house.states.clear()
    house.hub.heal("d", "a")
    house.gossip()
    await trio.sleep(10)
    assert house.agreed("a", "b", "d")
    assert house.doors["c"].ring == FIRST
    # With the ban in force first, c was cut off before any of them had the key.
    assert [len(banned) for _, banned in house.in_force["d"]] == [1, 1]
    assert [ring.generation for ring, _ in house.in_force["d"]] == [0, 1]


async def test_calls_of_the_banned_that_are_on_their_way_are_refused(
    house: House, clock: MockClock
) -> None:
    await house.doors["a"].kick("c", rotate=True)
    house.hub.heal("c", "a")
    network = house.doors["c"]._network
    with pytest.raises(CallFailed, match="banned"):
        await network.call("a", PULL, None, timeout=5)
    jam = state(house.doors["c"], generation=9, key=b"z" * 32)
    with pytest.raises(CallFailed, match="banned"):
        await network.call("a", PUSH, jam, timeout=5)
    assert house.doors["a"].ring.generation == 1


def state(door: Door, **changes: object) -> DoorState:
    fields = {
        "key": door.ring.key,
        "generation": door.ring.generation,
        "cluster": door.ring.cluster,
        "previous": None,
        "grace": 0.0,
        "bans": (),
    }
    return DoorState(**(fields | changes))  # type: ignore[arg-type]


async def test_numbers_cannot_be_used_up(house: House, clock: MockClock) -> None:
    network, a = house.doors["c"]._network, house.doors["a"]
    ban = Ban("b", (1 << 48) - 1, True, "c")
    jam = state(house.doors["c"], generation=(1 << 48) - 1, key=b"z" * 32, bans=(ban,))
    await network.call("a", PUSH, jam, timeout=5)
    assert a.ring == FIRST
    assert not a.banned()


async def test_numbers_driven_up_by_a_member_keep_nobody_out(
    house: House, clock: MockClock
) -> None:
    """Neither those who are there nor one who comes later."""
    network, a = house.doors["c"]._network, house.doors["a"]
    most = ceiling(house.now)
    jam = state(house.doors["c"], generation=most, key=b"z" * 32, bans=(Ban("d", most, True, "c"),))
    await network.call("a", PUSH, jam, timeout=5)
    assert a.ring.generation == most
    kicked = await a.kick("carl", rotate=True)
    assert kicked.told.confirmed == refs("b")
    await house.add("late", FIRST)
    house.gossip()
    await trio.sleep(1)
    house.now += 2
    await trio.sleep(5)
    assert house.agreed("a", "b", "late")
    assert "c" in house.doors["late"].bans.banned
    assert house.doors["b"].ring.generation == most + 1


async def test_members_that_cannot_be_asked_keep_nobody_from_asking_others(
    house: House, clock: MockClock
) -> None:
    for fake in ("0", "1", "2"):
        house.extra[fake] = "made up"
    house.hub.cut("c")
    await house.doors["a"].kick("ben")
    house.hub.heal("c")
    house.gossip()
    await trio.sleep(20)
    assert house.agreed("a", "c")


async def test_one_member_makes_a_node_store_only_so_much(house: House, clock: MockClock) -> None:
    network, a = house.doors["c"]._network, house.doors["a"]
    refused = 0
    for number in range(100):
        ban = Ban(f"x{number}", number + 1, True, "c")
        try:
            await network.call("a", PUSH, state(house.doors["c"], bans=(ban,)), timeout=5)
        except CallFailed as error:
            refused += error.code == "too-often"
    assert refused > 70
    assert len(a.bans.entries) == 100 - refused
    await house.doors["b"].kick("carl")
    assert "c" in a.bans.banned


async def test_the_log_of_one_change_is_short(
    house: House, clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    bans = tuple(Ban(f"x{number}", 1, True, "c") for number in range(1000))
    await house.doors["c"]._network.call("a", PUSH, state(house.doors["c"], bans=bans), timeout=5)
    assert sum("x" in record.message for record in caplog.records) < 5
    assert "and 992 more" in caplog.text


@pytest.mark.parametrize(
    ("wanted", "code", "message"),
    [
        ("anna", "own_node", "pxd stop"),
        ("a", "own_node", "pxd stop"),
        ("nobody", "unknown_node", "known here: anna, ben, carl"),
        ("", "unknown_node", "no such node"),
    ],
)
async def test_who_cannot_be_kicked(
    house: House, clock: MockClock, wanted: str, code: str, message: str
) -> None:
    with pytest.raises(DoorError, match=message) as failure:
        await house.doors["a"].kick(wanted)
    assert failure.value.code == code
    assert house.agreed()


async def test_a_full_list_is_not_made_to_forget(house: House, clock: MockClock) -> None:
    bans = (Ban(f"x{number}", 1, True, "b") for number in range(MAX_BANS))
    house.doors["a"]._bans = BanTable(bans)
    with pytest.raises(DoorError, match="full"):
        await house.doors["a"].kick("ben")
    # One that is banned already takes no room.
    assert (await house.doors["a"].kick("x7")).node.id == "x7"


@pytest.mark.parametrize("grace", [-1.0, 31 * 86400.0, float("nan"), float("inf")])
async def test_grace_periods_that_make_no_sense(
    house: House, clock: MockClock, grace: float
) -> None:
    with pytest.raises(DoorError, match="30 days"):
        await house.doors["a"].rotate(grace)
    assert house.doors["a"].ring == FIRST


async def test_a_ban_that_cannot_be_stored_counts_all_the_same(
    house: House,
    clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(path: Path, bans: BanTable) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pxd.serving.door.write_bans", full)
    monkeypatch.setattr("tests.serving.test_door.read_bans", lambda path: house.doors["a"].bans)
    kicked = await house.doors["a"].kick("ben")
    assert not kicked.stored
    assert house.in_force["a"][-1][1] == {"b"}
    assert "cannot store the list of banned nodes" in caplog.text


def test_a_damaged_list_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "bans.json"
    assert read_bans(path) == BanTable()
    table = BanTable([Ban("a", 1, True, "b", "anna")])
    write_bans(path, table)
    assert read_bans(path) == table
    assert path.stat().st_mode & 0o777 == 0o600
    for damaged in (path.read_bytes()[:-4], b'[["\xff"]]', b"[" * 100_000):
        path.write_bytes(damaged)
        with pytest.raises(IdentityError, match=r"damaged.*delete it"):
            read_bans(path)


def test_digests_tell_apart_what_differs() -> None:
    rings = [FIRST, FIRST.rotated(b"x" * 32, 0.0), FIRST.rotated(b"y" * 32, 0.0)]
    tables = [BanTable(), BanTable([Ban("a", 1, True, "b")])]
    hub = MemoryHub()
    digests = set()
    for number, (ring, table) in enumerate(itertools.product(rings, tables)):
        network = hub.network(str(number))
        door = Door(network, dict, DataFiles(Path("/nonexistent")), ring, table, ignore)
        digests.add(door.digest)
        assert len(door.digest) == 32
        assert ring.key.hex()[:8] not in door.digest
    assert len(digests) == 6


async def ignore(ring: Keyring, banned: frozenset[str]) -> None:
    raise AssertionError("nothing changes here")
