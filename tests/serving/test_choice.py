"""The models that are served: the last choice counts, and there is always a later one."""

from collections.abc import Callable

import msgspec
import pytest
import trio
import trio.testing

from pxd import identity
from pxd.cluster.messages import LAST_COUNT
from pxd.cluster.records import MAX_CHOSEN, ModelChoice, NodeRecord
from pxd.cluster.stamps import ceiling
from pxd.models.errors import ModelError
from pxd.serving.choice import (
    SAVE_AGAIN_S,
    ChoiceError,
    Choices,
    called,
    from_state,
    latest_choice,
    stop,
    to_state,
    use,
)
from pxd.serving.signal import Signal

NOW = 1.8e9
NOTHING = latest_choice([None], ceiling(NOW))


def test_the_latest_choice_counts() -> None:
    first = use(NOTHING, "a", "one", only=True)
    second = use(first, "b", "two", only=True)
    assert latest_choice([second, None, first], ceiling(NOW)) == second
    assert use(second, "c", "two", only=True) == second


def test_a_member_cannot_make_the_last_choice_of_all() -> None:
    """One more than the greatest number would be no record that others take."""
    most = ceiling(NOW)
    absurd = ModelChoice(LAST_COUNT, "mallory", ("bad",))
    driven = ModelChoice(most, "mallory", ("bad",))
    assert latest_choice([absurd, driven], most) == driven
    mine = use(driven, "a", "good", only=True)
    assert latest_choice([absurd, driven, mine], ceiling(NOW + 0.001)) == mine


def test_models_beside_each_other_and_in_place_of_each_other() -> None:
    both = use(NOTHING, "a", "org/two")
    assert (both.names, both.outgoing) == (("demo", "org/two"), ())
    assert use(both, "b", "demo") == both
    only = use(both, "a", "three", only=True)
    assert (only.names, only.outgoing) == (("three",), ("demo", "org/two"))
    back = use(only, "a", "demo")
    assert (back.names, back.outgoing) == (("three", "demo"), ("org/two",))
    left = stop(back, "a", "two")
    assert (left.names, left.outgoing) == (("three", "demo"), ())
    none = stop(stop(left, "a", "three"), "a", "demo")
    assert (none.stamp, none.names) == (both.stamp + 5, ())
    with pytest.raises(ChoiceError, match="serves none"):
        stop(none, "a", "demo")


def test_whoever_stops_the_new_model_gets_no_old_one_instead() -> None:
    only = use(NOTHING, "a", "one", only=True)
    assert stop(only, "a", "one").outgoing == ()


def test_there_is_an_end_to_how_many_are_chosen() -> None:
    choice = NOTHING
    for number in range(MAX_CHOSEN - 1):
        choice = use(choice, "a", f"m{number}")
    with pytest.raises(ChoiceError, match="at most"):
        use(choice, "a", "one-more")
    assert use(choice, "a", "one-more", only=True).names == ("one-more",)
    record = NodeRecord(id="a", name="a", choice=use(choice, "a", "x", only=True))
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=NodeRecord)
    assert again == record


def test_the_last_part_of_a_name_will_do() -> None:
    assert called("two", ["org/two", "/x/two/"]) == "org/two"
    assert called("/x/two/", ["org/two", "/x/two/"]) == "/x/two/"
    assert called("three", ["org/two"]) is None


def test_what_is_remembered_and_what_older_releases_wrote() -> None:
    choice = ModelChoice(4, "a", ("one", "two"), ("zero",))
    state = identity.State(models=to_state(choice))
    raw = msgspec.json.encode(state)
    assert from_state(msgspec.json.decode(raw, type=identity.State)) == choice
    old = b'{"incarnation": 3, "term": 2, "choice": [7, "b", "demo"]}'
    read = msgspec.json.decode(old, type=identity.State)
    assert from_state(read) == ModelChoice(7, "b", ("demo",))
    assert read.drained is False
    assert from_state(identity.State()) is None


class Member(msgspec.Struct):
    record: NodeRecord


class FakeRecords:
    def __init__(self, seniority: int = 1, choice: ModelChoice | None = None) -> None:
        self.record = NodeRecord(id="a", name="a", seniority=seniority, choice=choice)
        self.members = {"a": Member(self.record)}

    def update(self, **changes: object) -> None:
        self.record = msgspec.structs.replace(self.record, **changes)
        self.members["a"] = Member(self.record)


def choices(records: FakeRecords, asked: str | None = None) -> Choices:
    async def save(**_: object) -> None:
        await trio.lowlevel.checkpoint()

    async def describe(name: str) -> None:
        await trio.lowlevel.checkpoint()
        if name == "nonsense":
            raise ModelError("no such model")

    clock: Callable[[], float] = lambda: NOW  # noqa: E731
    return Choices(records, save, describe, asked, clock)  # type: ignore[arg-type]


def test_the_option_of_the_daemon_replaces_what_was_served_once_it_has_settled() -> None:
    records = FakeRecords(0, ModelChoice(3, "b", ("one", "two")))
    node = choices(records, asked="three")
    node.follow()
    assert records.record.choice == ModelChoice(3, "b", ("one", "two"))
    records.update(seniority=1)
    node.follow()
    assert records.record.choice == ModelChoice(4, "a", ("three",), ("one", "two"))


def test_the_option_stops_no_model_that_was_put_beside_it() -> None:
    records = FakeRecords(1, ModelChoice(3, "b", ("one", "two")))
    choices(records, asked="one").follow()
    assert records.record.choice == ModelChoice(3, "b", ("one", "two"))


async def test_a_model_that_does_not_exist_is_not_chosen() -> None:
    records = FakeRecords()
    with pytest.raises(ChoiceError, match="no such model"):
        await choices(records).use("nonsense", only=True)
    assert records.record.choice is None
    chosen = await choices(records).use("real")
    assert (chosen.names, chosen.changed) == (["demo", "real"], True)
    assert (await choices(records).use("real")).changed is False
    assert (await choices(records).stop("demo")).names == ["real"]


async def test_a_full_disk_is_tried_again_in_a_while_and_not_with_every_change(
    autojump_clock: trio.testing.MockClock,
) -> None:
    tried: list[float] = []
    full = True

    async def save(**_: object) -> None:
        await trio.lowlevel.checkpoint()
        tried.append(trio.current_time())
        if full:
            raise OSError(28, "No space left on device")

    records, changed = FakeRecords(1, ModelChoice(3, "b", ("one",))), Signal()
    node = Choices(records, save, None, None, lambda: NOW)  # type: ignore[arg-type]
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.run, changed)
        for _ in range(35):
            await trio.sleep(1)
            changed.notify()
        assert [time - began for time in tried] == [n * SAVE_AGAIN_S for n in range(4)]
        full = False
        await trio.sleep(60)
        assert len(tried) == 5
        changed.notify()
        await trio.testing.wait_all_tasks_blocked()
        assert len(tried) == 6
        nursery.cancel_scope.cancel()


async def test_a_node_that_has_not_found_its_cluster_chooses_nothing() -> None:
    with pytest.raises(ChoiceError, match="try again"):
        await choices(FakeRecords(0)).use("real")
