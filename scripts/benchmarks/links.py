"""Three nodes with slow links: what micro-batches and speculation are worth. Delays are one way."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from scripts.benchmarks import models
from scripts.benchmarks.bench import Bench, Load, alternate, prompts, say
from scripts.benchmarks.delay import Switch, switch
from scripts.benchmarks.errors import CannotRun
from scripts.benchmarks.nodes import (
    ONE_STEP_AT_A_TIME,
    PXD,
    Cluster,
    cluster,
    start_options,
)

NODES = 3
STREAMS = 8
SPECULATE = "--speculate"


def run(bench: Bench) -> None:
    try:
        with switch(bench.root) as links:
            if bench.quick:
                _micro_batches(bench, links, "tiny", (20,), Load(8, 16), rounds=2)
                _speculation(bench, links, "tiny", (20,), Load(8, 32), rounds=2)
            else:
                _micro_batches(bench, links, "tiny", (5, 20, 80), Load(8, 32), rounds=3)
                _micro_batches(bench, links, "100m", (20,), Load(8, 16), rounds=3)
                _speculation(bench, links, "tiny", (5, 20, 80), Load(8, 32), rounds=3)
    except CannotRun as error:
        bench.skip("links", "all of it", str(error))


def _micro_batches(
    bench: Bench, links: Switch, model: str, delays: Sequence[int], load: Load, *, rounds: int
) -> None:
    say(f"    {model}: {STREAMS} at once over {NODES} nodes, with and without micro-batches")
    with _clusters(bench, links, model, (PXD, ()), (ONE_STEP_AT_A_TIME, ())) as (pxd, single):

        def rate(served: Cluster, delay_ms: int) -> Callable[[int], float]:
            def ask(number: int) -> float:
                links.delay_s = delay_ms / 1e3
                text = prompts(f"links {model} {delay_ms}", number, STREAMS, load.prompt)
                return served.put(text, load.answer).tokens_per_s

            return ask

        for served in (pxd, single):
            rate(served, 0)(-1)
        for delay in delays:
            slow, fast, without = alternate(
                rounds, rate(pxd, delay), rate(pxd, 0), rate(single, delay)
            )
            key, what = f"links.{model}.{delay}", f"{model}, {STREAMS} at once, {delay} ms links"
            _more(bench, key, f"{what} vs 0 ms", slow, fast)
            _more(bench, f"{key}.micro", f"{what}, micro-batches vs none", slow, without)
        links.delay_s = 0.0


def _speculation(
    bench: Bench, links: Switch, model: str, delays: Sequence[int], load: Load, *, rounds: int
) -> None:
    if SPECULATE not in start_options():
        bench.skip("links", "speculation", f"this pxd has no {SPECULATE}")
        return
    say(f"    {model}: 1 stream over {NODES} nodes, with and without speculation")
    sides = (PXD, (SPECULATE, "on")), (PXD, (SPECULATE, "off"))
    with _clusters(bench, links, model, *sides) as (guessing, plain):

        def token_ms(served: Cluster, delay_ms: int) -> Callable[[int], float]:
            def ask(number: int) -> float:
                links.delay_s = delay_ms / 1e3
                text = prompts(f"links guess {model} {delay_ms}", number, 1, load.prompt)
                return 1e3 * served.put(text, load.answer).token_s

            return ask

        for served in (guessing, plain):
            token_ms(served, 0)(-1)
        for delay in delays:
            on, off = alternate(rounds, token_ms(guessing, delay), token_ms(plain, delay))
            what = f"{model}, 1 stream, {delay} ms links, speculation on vs off: per token"
            bench.compare(f"links.{model}.{delay}.guess", what, "ms", on, off)
        links.delay_s = 0.0


@contextmanager
def _clusters(
    bench: Bench, links: Switch, model: str, *sides: tuple[Sequence[str], Sequence[str]]
) -> Iterator[list[Cluster]]:
    """One cluster for each (launcher, options), all on the same switch and not delayed."""
    links.delay_s = 0.0
    directory, layers = bench.model(model), models.SHAPES[model].layers
    with ExitStack() as stack:
        served = []
        for launcher, options in sides:
            place = bench.place("links")
            made = cluster(
                place, directory, layers, NODES, options=options, launcher=launcher, links=links
            )
            served.append(stack.enter_context(made))
        yield served


def _more(bench: Bench, key: str, what: str, ours: list[float], theirs: list[float]) -> None:
    bench.compare(key, f"{what}: all together", "tokens/s", ours, theirs, more_is_better=True)
