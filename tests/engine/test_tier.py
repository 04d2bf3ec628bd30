"""The rules of the second tier, with 1, 2 and 3 stages that copy."""

from typing import Any

import pytest

import pxd.engine.continuous
from pxd.engine.blocks import BLOCK_TOKENS

from .pipeline import answer, request
from .tier_stages import Tiered

EITHER = ("eager", "lazy")


@pytest.fixture(params=[1, 2, 3])
def stages(request: pytest.FixtureRequest) -> int:
    return request.param  # type: ignore[no-any-return]


def prompt(family: int, blocks: int, tail: int = 0) -> list[int]:
    """`blocks` full blocks of a family, and one token more."""
    return [family * 10_000 + i for i in range(blocks * BLOCK_TOKENS)] + [tail]


def ask(system: Tiered, number: int, tokens: list[int], new: int = 1, **more: Any) -> None:
    system.scheduler.add(request(number, tokens, new, **more))


def evict_everything(system: Tiered, number: int) -> None:
    """Another request needs every block that there is."""
    tokens = [number + 500_000] * (system.pool.capacity * BLOCK_TOKENS - 1)
    ask(system, number, tokens)
    system.settle()
    assert system.answers[number] == answer(tokens, 1)


def is_at_rest(system: Tiered) -> bool:
    """Nobody holds anything, and nothing is missing."""
    assert not system.scheduler.requests
    free = system.tier.slots.free + system.tier.retired
    return system.pool.used == 0 and free == system.tier.slots.capacity


def test_eager_full_blocks_are_stored_by_the_next_step_in_one_event(stages: int) -> None:
    system = Tiered(stages, slots=8, tier_store="eager")
    ask(system, 0, prompt(1, 2), new=9)
    first = system.step()
    assert first is not None
    assert first.store is first.load is None
    second = system.step()
    assert second is not None
    assert second.store is not None
    assert list(second.store.blocks) == list(first.grants[0].blocks[:2])
    assert len(second.store.slots) == 2
    assert system.tier.slots.free == 6
    for stage in range(stages):
        assert system.tier.find(names(system, prompt(1, 2))) == []
        system.finish(only=[stage])
    assert system.tier.find(names(system, prompt(1, 2))) == list(second.store.slots)
    assert system.tier.slots.free == 8
    system.settle()
    assert is_at_rest(system)


def names(system: Tiered, tokens: list[int]) -> list[bytes]:
    return system.policy.hashes().of(tokens, len(tokens) // BLOCK_TOKENS)


@pytest.mark.parametrize("store", EITHER)
def test_what_was_stored_is_hit_and_loaded_by_the_next_step(stages: int, store: str) -> None:
    system = Tiered(stages, blocks=7, slots=32, tier_store=store)
    ask(system, 0, prompt(1, 2))
    system.settle()
    evict_everything(system, 1)
    assert system.pool.block_of(names(system, prompt(1, 2))[0]) is None
    ask(system, 2, prompt(1, 2, tail=8), new=3)
    step = system.step()
    assert step is not None
    assert step.load is not None
    assert list(step.load.slots) == system.tier.find(names(system, prompt(1, 2)))
    assert list(step.load.blocks) == list(step.grants[0].blocks[:2])
    assert not step.rows
    assert (system.scheduler.loading, system.scheduler.running) == (1, 1)
    system.settle()
    assert system.answers[2] == answer(prompt(1, 2, tail=8), 3)
    assert next(r.position for s in system.steps for r in s.rows if r.request == 2) == 128
    assert [stage.loaded for stage in system.stages.all] == [2] * stages
    assert is_at_rest(system)


def test_lazy_nothing_is_stored_before_it_is_about_to_go(stages: int) -> None:
    system = Tiered(stages, blocks=7, step_tokens=7 * BLOCK_TOKENS)
    ask(system, 0, prompt(1, 2), new=20)
    while 0 in system.scheduler.requests:
        step = system.step()
        assert step is not None
        assert step.store is None
    empty = system.step()
    assert empty is not None
    assert not empty.rows
    assert empty.store is not None
    assert len(empty.store.blocks) == len(empty.store.slots) == 2
    assert system.tier.slots.used == system.pool.used == 2
    system.settle()
    assert len(system.stores) == 1
    assert is_at_rest(system)


def test_lazy_no_more_is_looked_at_than_a_step_can_take(stages: int) -> None:
    system = Tiered(stages, blocks=7, step_tokens=6 * BLOCK_TOKENS)
    ask(system, 0, prompt(1, 2))
    system.settle()
    # Five blanks go before these two, and of those the end.
    assert system.tier.slots.cached == 1
    assert len(system.stores) == 1


@pytest.mark.parametrize("store", EITHER)
def test_what_is_in_the_tier_takes_no_further_slot(stages: int, store: str) -> None:
    system = Tiered(stages, blocks=7, slots=32, tier_store=store)
    ask(system, 0, prompt(1, 2))
    system.settle()
    evict_everything(system, 1)
    free, cached, stores = system.tier.slots.free, system.tier.slots.cached, len(system.stores)
    for number in (2, 3):
        ask(system, number, prompt(1, 2))
        while (step := system.step()) is not None or system.tier.copying:
            assert step is None or step.store is None
            if step is None:
                system.finish()
        assert (system.tier.slots.free, system.tier.slots.cached) == (free, cached)
    assert len(system.stores) == stores
    assert len(system.loads) == 1, "the second one found them on the device"


@pytest.mark.parametrize("store", EITHER)
@pytest.mark.parametrize("touched", [False, True])
def test_the_least_recently_used_slots_go_first(stages: int, store: str, touched: bool) -> None:
    system = Tiered(stages, blocks=16, slots=4, step_tokens=1024, tier_store=store)
    ask(system, 0, prompt(1, 2))
    system.settle()
    ask(system, 1, prompt(2, 2))
    system.settle()
    assert system.tier.slots.free == 4, "stored blocks are evictable"
    assert system.tier.slots.cached == 4, "yet findable"
    if touched:
        ask(system, 2, prompt(1, 2))
        system.settle()
    ask(system, 3, prompt(3, 2))
    system.settle()
    left = [len(system.tier.find(names(system, prompt(n, 2)))) for n in (1, 2, 3)]
    assert left == ([2, 0, 2] if touched else [0, 2, 2])
    assert system.tier.slots.free == 4


def test_blocks_of_who_finishes_during_a_store_stay_until_it_is_done(stages: int) -> None:
    system = Tiered(stages, tier_store="eager")
    ask(system, 0, prompt(1, 2))
    system.run()
    assert not system.scheduler.requests
    for stage in range(stages):
        assert system.pool.used == system.tier.slots.used == 2
        system.finish(only=[stage])
    assert is_at_rest(system)


@pytest.mark.parametrize("store", EITHER)
@pytest.mark.parametrize("way", ["cancelled", "expired"])
def test_blocks_of_who_leaves_during_a_load_stay_until_it_is_done(
    stages: int, store: str, way: str
) -> None:
    system = stored_and_evicted(stages, store)
    ask(system, 2, prompt(1, 4, tail=8), deadline=10.0)
    system.run()
    assert system.scheduler.loading == 1
    if way == "cancelled":
        assert system.scheduler.cancel(2)
    else:
        assert system.scheduler.expire(10.0) == [2]
    assert not system.scheduler.requests
    system.run()
    for stage in range(stages):
        assert system.pool.used == system.tier.slots.used == 4
        system.finish(only=[stage])
    assert is_at_rest(system)
    assert 2 not in system.answers


def stored_and_evicted(stages: int, store: str, **options: object) -> Tiered:
    """A tier that holds four blocks of family 1, of which the device knows nothing."""
    system = Tiered(stages, blocks=7, slots=32, tier_store=store, **options)
    ask(system, 0, prompt(1, 4))
    system.settle()
    evict_everything(system, 1)
    assert len(system.tier.find(names(system, prompt(1, 4)))) == 4
    assert is_at_rest(system)
    return system


@pytest.mark.parametrize("store", EITHER)
def test_blocks_without_a_hash_are_never_stored(stages: int, store: str) -> None:
    system = Tiered(stages, tier_store=store, step_tokens=64 * BLOCK_TOKENS)
    ask(system, 0, [5] * (BLOCK_TOKENS + 30), new=20)
    ask(system, 1, [6] * 40, new=10)
    system.settle()
    table = next(g.blocks for s in system.steps for g in s.grants if g.request == 0)
    assert [copy.blocks for copy in system.stores] == [(table[0],)]
    blind = Tiered(stages, tier_store=store, prefix_cache=False)
    ask(blind, 0, prompt(1, 4))
    blind.settle()
    assert blind.stores == []


def test_each_chunk_stores_its_own_blocks_once(stages: int) -> None:
    system = Tiered(stages, tier_store="eager", prefill_chunk=96)
    ask(system, 0, prompt(1, 6), new=100)
    system.settle()
    table = [b for s in system.steps for g in s.grants for b in g.blocks]
    # Chunks of 96 fill one block, then two; the answer fills a seventh.
    assert [copy.blocks for copy in system.stores] == [
        (table[0],),
        (table[1], table[2]),
        (table[3],),
        (table[4], table[5]),
        (table[6],),
    ]
    assert system.tier.slots.cached == 7
    assert system.tier.slots.free == 64


@pytest.mark.parametrize("store", EITHER)
@pytest.mark.parametrize(("known", "loaded"), [(4, 2), (3, 1)])
def test_a_load_fills_exactly_what_follows_the_local_hit(
    stages: int, store: str, known: int, loaded: int
) -> None:
    """Four blocks are in the tier, the device still has two; the request knows `known` of them."""
    system = Tiered(stages, blocks=6, slots=32, tier_store=store, step_tokens=6 * BLOCK_TOKENS)
    ask(system, 0, prompt(1, 4))
    system.settle()
    held = system.pool.find(names(system, prompt(1, 4)))
    if store == "lazy":  # what is stored goes first, and of that the end
        assert held
    ask(system, 1, [77] * (4 * BLOCK_TOKENS - 1))
    system.settle()
    assert system.pool.find(names(system, prompt(1, 4))) == held[:2]
    tokens = [*prompt(1, known)[:-1], *[3] * 70]
    ask(system, 2, tokens, new=2)
    step = system.step()
    assert step is not None
    [opening], [grant] = step.openings, step.grants
    assert step.load is not None
    assert (opening.cached, list(opening.hits)) == (2 * BLOCK_TOKENS, held[:2])
    assert list(step.load.blocks) == list(grant.blocks[2 : 2 + loaded])
    assert list(step.load.slots) == system.tier.find(names(system, tokens))[2:known]
    system.settle()
    first = next(r for s in system.steps for r in s.rows if r.request == 2)
    assert first.position == (2 + loaded) * BLOCK_TOKENS
    assert system.answers[2] == answer(tokens, 2)
    assert is_at_rest(system)


def test_a_long_hit_is_loaded_in_parts(stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pxd.engine.continuous, "MAX_LOADING_BLOCKS", 3)
    system = stored_and_evicted(stages, "eager")
    ask(system, 2, prompt(1, 4, tail=8))
    system.settle()
    assert [len(copy.blocks) for copy in system.loads] == [3, 1]
    assert system.answers[2] == answer(prompt(1, 4, tail=8), 1)
    assert is_at_rest(system)


def test_blocks_being_stored_are_given_to_nobody(stages: int) -> None:
    system = Tiered(stages, blocks=4, tier_store="eager")
    ask(system, 0, prompt(1, 2))
    system.run()
    assert system.pool.free == 2
    ask(system, 1, [9] * 3 * BLOCK_TOKENS)
    system.run()
    assert system.scheduler.queued == [1]
    system.finish()
    assert system.pool.free == 4
    system.settle()
    assert system.answers[1] == answer([9] * 3 * BLOCK_TOKENS, 1)


def test_slots_being_loaded_from_are_given_to_nobody(stages: int) -> None:
    system = Tiered(stages, blocks=16, slots=4, tier_store="eager")
    ask(system, 0, prompt(1, 3))
    system.settle()
    system.pool.drop(system.pool.allocate(16))
    ask(system, 1, prompt(1, 3, tail=4))
    system.run()
    assert system.tier.slots.free == 1
    ask(system, 2, prompt(2, 3))
    system.run()
    assert [len(copy.slots) for copy in system.stores] == [3, 1]
    assert set(system.stores[1].slots).isdisjoint(system.loads[0].slots)
    system.settle()
    assert system.answers[1] == answer(prompt(1, 3, tail=4), 1)
    assert is_at_rest(system)


@pytest.mark.parametrize("store", EITHER)
def test_others_run_and_are_let_in_while_a_hit_is_loaded(stages: int, store: str) -> None:
    system = stored_and_evicted(stages, store)
    ask(system, 2, prompt(1, 4, tail=8), new=2)
    ask(system, 3, [11] * 10, new=5)
    system.run()
    assert system.answers[3] == answer([11] * 10, 5)
    assert 2 not in system.answers
    assert system.scheduler.requests == [2]
    system.settle()
    assert system.answers[2] == answer(prompt(1, 4, tail=8), 2)
    assert is_at_rest(system)


@pytest.mark.parametrize("store", EITHER)
@pytest.mark.parametrize("slots", [0, 1])
def test_what_finds_no_slot_is_computed_again(stages: int, store: str, slots: int) -> None:
    system = Tiered(stages, blocks=7, slots=slots, tier_store=store)
    ask(system, 0, prompt(1, 3))
    system.settle()
    evict_everything(system, 1)
    ask(system, 2, prompt(1, 3, tail=8), new=2)
    system.settle()
    assert system.answers[2] == answer(prompt(1, 3, tail=8), 2)
    assert all(len(copy.slots) == 1 for copy in system.stores)
    assert is_at_rest(system)


@pytest.mark.parametrize("store", EITHER)
def test_a_store_that_fails_on_one_stage_is_in_the_tier_of_none(stages: int, store: str) -> None:
    system = Tiered(stages, slots=8, step_tokens=8192, tier_store=store)
    ask(system, 0, prompt(1, 3))
    system.run()
    [copy] = system.stores
    by_block = dict(zip(copy.blocks, copy.slots, strict=True))
    middle = system.pool.find(names(system, prompt(1, 3)))[1]
    system.finish(broken=[by_block[middle]])
    assert system.pool.used == 0
    assert len(system.tier.find(names(system, prompt(1, 3)))) == 1
    assert (system.tier.slots.free, system.tier.retired) == (7, 1)
    system.settle()
    assert by_block[middle] not in system.stores[-1].slots or len(system.stores) == 1
    assert is_at_rest(system)


@pytest.mark.parametrize("store", EITHER)
def test_when_every_store_fails_it_is_given_up(stages: int, store: str) -> None:
    """A full disk must not keep the pipeline busy for ever."""
    system = Tiered(stages, slots=8, step_tokens=8192, tier_store=store)
    for number in range(12):
        ask(system, number, prompt(number, 3))
        system.run()
        while system.tier.copying:
            system.finish(broken=range(8))
            system.run()
    assert system.tier.retired == 8
    assert sum(len(copy.slots) for copy in system.stores) == 8
    assert is_at_rest(system)


@pytest.mark.parametrize("store", EITHER)
def test_who_waits_for_a_load_that_fails_is_computed_again(stages: int, store: str) -> None:
    system = stored_and_evicted(stages, store)
    slots = system.tier.find(names(system, prompt(1, 4)))
    ask(system, 2, prompt(1, 4, tail=8), new=2)
    system.run()
    system.finish(broken=[slots[1]])
    assert system.tier.find(names(system, prompt(1, 4))) == slots[:1]
    assert system.tier.retired == 1
    system.settle()
    assert system.answers[2] == answer(prompt(1, 4, tail=8), 2)
    assert [len(copy.slots) for copy in system.loads] == [4, 1]
    assert is_at_rest(system)


@pytest.mark.parametrize("store", EITHER)
@pytest.mark.parametrize("reached", [0, 1, 3])
def test_copies_of_a_step_that_not_all_stages_saw_are_sent_again(
    stages: int, store: str, reached: int
) -> None:
    """`reached` stages have run the step; nothing is held for ever."""
    system = stored_and_evicted(stages, store)
    ask(system, 2, prompt(1, 4, tail=8))
    step = system.scheduler.next_step()
    assert step is not None
    assert step.load is not None
    system.stages.run(step, min(reached, stages))
    assert system.scheduler.step_failed(step.number) == [2]
    system.run()
    assert system.pool.used == system.tier.slots.used == 4
    ask(system, 3, [1] * 10)
    system.settle()
    assert system.answers[3] == answer([1] * 10, 1)
    assert system.tier.retired == 0
    assert is_at_rest(system)
    ask(system, 4, prompt(1, 4, tail=8))
    system.settle()
    assert system.answers[4] == answer(prompt(1, 4, tail=8), 1)
    assert len(system.loads) == 2, "sent again, and the one for the last request"


@pytest.mark.parametrize("store", EITHER)
def test_a_lost_copy_does_not_keep_others_waiting(stages: int, store: str) -> None:
    """Nobody else runs whose steps could carry it, and its blocks are needed."""
    system = stored_and_evicted(stages, store)
    ask(system, 2, prompt(1, 4, tail=8))
    step = system.scheduler.next_step()
    assert step is not None
    system.scheduler.step_failed(step.number)
    ask(system, 3, [1] * (7 * BLOCK_TOKENS - 1))
    system.settle()
    assert system.answers[3] == answer([1] * (7 * BLOCK_TOKENS - 1), 1)
    assert is_at_rest(system)


@pytest.mark.parametrize("store", EITHER)
@pytest.mark.parametrize("kind", ["store", "load"])
def test_a_stage_that_is_lost_in_the_middle_of_a_copy(stages: int, store: str, kind: str) -> None:
    """The session ends. The others go on with what they had begun, into slots of the next one."""
    system = stored_and_evicted(stages, store, step_tokens=8192)
    tokens = prompt(1, 4, tail=8) if kind == "load" else prompt(5, 4)
    ask(system, 2, tokens)
    system.run()
    assert system.tier.copying
    assert system.pool.used >= 4
    given_up = system.scheduler.requests
    assert given_up == ([2] if kind == "load" else [])
    survivors = system.stages.all[:-1]
    late = [stage.jobs.copy() for stage in survivors]
    after = Tiered(stages, blocks=7, slots=32, tier_store=store, step_tokens=8192)
    for stage, old, jobs in zip(after.stages.all, survivors, late, strict=False):
        stage.slots = old.slots
        for copy, work in jobs:
            # It is done first, but nobody asks for it any more: the head knows another session.
            work(())
            assert set(copy.slots) <= set(range(32))
    assert is_at_rest(after)
    for number, wanted in enumerate((tokens, prompt(1, 4, tail=9), tokens)):
        ask(after, number, wanted, new=2)
        after.settle()
        assert after.answers[number] == answer(wanted, 2)
        evict_everything(after, 100 + number)
    assert len(after.loads) > 0
    assert is_at_rest(after)


def test_reports_that_nobody_waits_for_change_nothing(stages: int) -> None:
    system = Tiered(stages, tier_store="eager", slots=8)
    ask(system, 0, prompt(1, 2))
    system.run()
    [copy] = system.stores
    system.scheduler.copied(copy.event + 1, 0)
    system.scheduler.copied(copy.event, stages)
    for _ in range(3):
        system.scheduler.copied(copy.event, 0, failed=[999])
    if stages > 1:
        assert system.pool.used == 2
    system.settle()
    assert system.tier.retired == 0
    assert is_at_rest(system)


def test_with_preemption_a_lone_request_waits_for_a_copy_instead_of_making_room(
    stages: int,
) -> None:
    system = Tiered(stages, blocks=5, admission="preempt", step_tokens=8192)
    ask(system, 0, prompt(1, 2))
    while 0 in system.scheduler.requests:
        system.step()
    ask(system, 1, [4] * 100, new=5 * BLOCK_TOKENS - 100)
    system.run()
    assert system.tier.copying
    assert system.scheduler.admitted == [1]
    system.settle()
    assert system.answers[1] == answer([4] * 100, 5 * BLOCK_TOKENS - 100)
    assert sum(len(s.openings) for s in system.steps) == 2, "nobody was preempted"
