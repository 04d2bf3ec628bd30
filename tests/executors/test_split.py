"""The dry run and the stages made by it, on toy models that each do one unusual thing."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache

from pxd.executors.mlx.layers import CannotSplit
from pxd.executors.mlx.split import SplitPlan, plan_split
from pxd.executors.mlx.stage import PartialModel
from pxd.executors.mlx.trial import supports_batches

HIDDEN, VOCABULARY, LAYERS = 8, 32, 4


class ToyLayer(nn.Module):
    """Adds a linear map of everything up to a position; the cache holds what came before."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def __call__(self, x: mx.array, cache: Any, extra: Any = None) -> Any:
        made = self.map(x)[:, None]
        keys, _ = cache.update_and_fetch(made, made)
        out = x + keys.sum(axis=2)
        return out if extra is None else out + extra


Loop = Callable[["Toy", mx.array, mx.array, list[Any]], mx.array]


class Toy(nn.Module):
    """A model whose way through its layers is `loop(model, tokens, hidden, caches)`."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = [ToyLayer() for _ in range(LAYERS)]
        self.norm = nn.RMSNorm(HIDDEN)
        object.__setattr__(self, "loop", loop)
        object.__setattr__(self, "kinds", [KVCache] * LAYERS)

    def make_cache(self) -> list[Any]:
        return [kind() for kind in self.kinds]

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        hidden = self.loop(self, tokens, self.embed(tokens), cache)
        return self.norm(hidden) @ self.embed.weight.T


def plain(model: Toy, tokens: mx.array, hidden: mx.array, caches: list[Any]) -> mx.array:
    for layer, cache in zip(model.layers, caches, strict=True):
        hidden = layer(hidden, cache)
    return hidden


def by_keyword(model: Toy, tokens: mx.array, hidden: mx.array, caches: list[Any]) -> mx.array:
    for layer, cache in zip(model.layers, caches, strict=True):
        hidden = layer(x=hidden, cache=cache)
    return hidden


def scaled_between(model: Toy, tokens: mx.array, hidden: mx.array, caches: list[Any]) -> mx.array:
    for layer, cache in zip(model.layers, caches, strict=True):
        hidden = layer(hidden * 0.5, cache)
    return hidden


def counting(model: Toy, tokens: mx.array, hidden: mx.array, caches: list[Any]) -> mx.array:
    """All layers are told the position by the cache of the first."""
    position = mx.array(caches[0].offset).reshape(-1, 1, 1)
    for layer, cache in zip(model.layers, caches, strict=True):
        hidden = layer(hidden, cache, extra=position * 0.1)
    return hidden


def looks_back(model: Toy, tokens: mx.array, hidden: mx.array, caches: list[Any]) -> mx.array:
    """The third layer also gets what the second made of the first one's output."""
    first = model.layers[0](hidden, caches[0])
    second = model.layers[1](first, caches[1])
    third = model.layers[2](second, caches[2], extra=first)
    return model.layers[3](third, caches[3])


def from_embedding(model: Toy, tokens: mx.array, hidden: mx.array, caches: list[Any]) -> mx.array:
    start = hidden
    for layer, cache in zip(model.layers, caches, strict=True):
        hidden = layer(hidden, cache, extra=start)
    return hidden


def mixed_in(model: Toy, tokens: mx.array, hidden: mx.array, caches: list[Any]) -> mx.array:
    """What no layer is given as it is cannot be given to one in another stage either."""
    start = hidden
    for layer, cache in zip(model.layers, caches, strict=True):
        hidden = layer(hidden + 0.1 * start, cache)
    return hidden


def grown(model: Toy, tokens: mx.array, hidden: mx.array, caches: list[Any]) -> mx.array:
    """Layers are given a sum of what came before, which the model itself keeps."""
    seen = hidden
    for layer, cache in zip(model.layers, caches, strict=True):
        made = layer(hidden, cache, extra=seen)
        seen, hidden = seen + hidden, made
    return hidden


def shared_cache(model: Toy, tokens: mx.array, hidden: mx.array, caches: list[Any]) -> mx.array:
    for layer, cache in zip(model.layers, [*caches[:2], caches[1], caches[3]], strict=True):
        hidden = layer(hidden, cache)
    return hidden


def twice(model: Toy, tokens: mx.array, hidden: mx.array, caches: list[Any]) -> mx.array:
    return plain(model, tokens, plain(model, tokens, hidden, caches), caches)


def make(loop: Loop, kinds: list[Callable[[], Any]] | None = None) -> Toy:
    mx.random.seed(3)
    model = Toy(loop)
    if kinds:
        object.__setattr__(model, "kinds", kinds)
    return model


def part(loop: Loop, start: int, end: int, kinds: list[Any] | None = None) -> PartialModel:
    model = make(loop, kinds)
    stage = PartialModel(model, plan_split(model), start, end)
    stage.tap()
    return stage


def plan_of(loop: Loop) -> SplitPlan:
    return plan_split(make(loop))


@pytest.mark.parametrize("loop", [plain, by_keyword, scaled_between, counting])
def test_models_that_may_be_cut_anywhere(loop: Loop) -> None:
    plan = plan_of(loop)
    assert plan.splits == (1, 2, 3)
    assert plan.reason == ""
    assert (plan.layers, plan.hidden_size, plan.vocabulary) == (LAYERS, HIDDEN, VOCABULARY)
    assert plan.cache_of == {0: 0, 1: 1, 2: 2, 3: 3}
    # Keys and values of one float32 head.
    assert plan.token_bytes == (2 * HIDDEN * 4,) * LAYERS


@pytest.mark.parametrize(
    ("loop", "splits"),
    [(looks_back, (1, 3)), (shared_cache, (1, 3)), (mixed_in, ()), (grown, (3,))],
)
def test_cuts_that_more_than_the_hidden_state_would_cross_are_not_allowed(
    loop: Loop, splits: tuple[int, ...]
) -> None:
    plan = plan_of(loop)
    assert plan.splits == splits
    assert bool(plan.reason) == (not splits)


@pytest.mark.parametrize(("loop", "carried"), [(from_embedding, [1, 1, 1]), (plain, [0, 0, 0])])
def test_values_that_layers_are_given_can_be_carried(loop: Loop, carried: list[int]) -> None:
    plan = plan_of(loop)
    assert plan.splits == (1, 2, 3)
    assert [len(plan.carried[cut]) for cut in plan.splits] == carried
    stage = part(loop, 1, 2)
    for dtype in (mx.float32, mx.bfloat16):
        assert stage.width(dtype, incoming=True) == HIDDEN * (1 + carried[0])
        assert stage.width(dtype, incoming=False) == HIDDEN * (1 + carried[1])


def test_layers_that_are_called_twice_cannot_be_split() -> None:
    with pytest.raises(CannotSplit, match="once each"):
        plan_of(twice)


def test_a_model_without_one_list_of_layers_cannot_be_split() -> None:
    model = make(plain)
    object.__setattr__(model, "layers", tuple(model.layers))
    with pytest.raises(CannotSplit, match="not one list"):
        plan_split(model)


def test_the_dry_run_leaves_the_model_as_it_was_and_evaluates_nothing() -> None:
    model = make(plain)
    layers = list(model.layers)
    # The keys of random numbers are its own affair.
    mx.eval(mx.random.state)
    before = mx.get_active_memory()
    plan_split(model)
    assert all(a is b for a, b in zip(model.layers, layers, strict=True))
    assert mx.get_active_memory() == before


WINDOWED: list[Any] = [lambda: RotatingKVCache(max_size=6), KVCache, KVCache, KVCache]


@pytest.mark.parametrize("kinds", [None, WINDOWED])
@pytest.mark.parametrize("loop", [plain, by_keyword, scaled_between, counting, from_embedding])
def test_stages_compute_what_the_whole_model_does(loop: Loop, kinds: list[Any] | None) -> None:
    whole = make(loop, kinds)
    stages = [part(loop, start, end, kinds) for start, end in ((0, 1), (1, 2), (2, 3), (3, 4))]
    caches, parts = whole.make_cache(), [stage.make_caches() for stage in stages]
    for tokens in ([[1, 2, 3, 4, 5, 6, 7, 8]], [[9]], [[10]], [[11, 12]]):
        wanted = whole(mx.array(tokens), caches)
        got = mx.array(tokens)
        for stage, held in zip(stages, parts, strict=True):
            got = stage.forward(got, held)
        assert mx.array_equal(got, wanted).item()


def test_a_cut_through_a_transformation_counts_it_once() -> None:
    """`scaled_between` halves the hidden state between layers; only the next stage may do so."""
    outgoing = part(scaled_between, 0, 2)
    hidden = outgoing.forward(mx.array([[1, 2]]), outgoing.make_caches())
    model = make(scaled_between)
    caches = model.make_cache()
    wanted = model.embed(mx.array([[1, 2]]))
    for i in (0, 1):
        wanted = model.layers[i](wanted * 0.5, caches[i])
    assert mx.array_equal(hidden, wanted).item()


def test_the_trial_tells_which_models_can_decode_in_batches() -> None:
    def absolute(model: Toy, tokens: mx.array, hidden: mx.array, caches: Any) -> mx.array:
        """Takes the number of columns for the position."""
        for layer, cache in zip(model.layers, caches, strict=True):
            hidden = layer(hidden, cache, extra=0.1 * cache.size())
        return hidden

    assert supports_batches(part(plain, 1, 3), mx.float32)
    assert supports_batches(part(counting, 1, 3), mx.float32)
    assert not supports_batches(part(absolute, 1, 3), mx.float32)
    assert not supports_batches(part(counting, 1, 3, [NoBatches] * LAYERS), mx.float32)


class NoBatches(KVCache):
    merge = None
