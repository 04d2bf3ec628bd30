"""Fuzz every parser: python -m tests.fuzz.run --inputs 1000000"""

import argparse
import logging
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from tests.fuzz.mutate import Mutator
from tests.fuzz.targets import all_targets


class Outcome(NamedTuple):
    target: str
    inputs: int
    refused: int
    seconds: float
    failures: tuple[str, ...]


def fuzz(name: str, seed: int, inputs: int) -> Outcome:
    """Give one parser that many inputs; a failure names the input that caused it."""
    logging.disable(logging.CRITICAL)
    [target] = [target for target in all_targets() if target.name == name]
    mutator = Mutator(seed, target.examples)
    failures: dict[str, str] = {}
    refused = 0
    began = time.monotonic()
    for _ in range(inputs):
        data = mutator.next()
        try:
            target.parse(data)
        except target.refusals:
            refused += 1
        except Exception as error:  # noqa: BLE001 - these are what is looked for
            kind = f"{type(error).__name__}: {str(error)[:120]}"
            failures.setdefault(type(error).__name__, f"{kind} for {data[:300]!r}")
    took = time.monotonic() - began
    return Outcome(name, inputs, refused, took, tuple(failures.values()))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz",
        description="Gives every parser of bytes from others made-up inputs; anything but the "
        "refusal it promises is a failure.",
        epilog="example: scripts/fuzz --inputs 1000000 --jobs 2",
    )
    parser.add_argument("--inputs", type=int, default=1_000_000, help="altogether")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other inputs")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--only", default="", help="targets whose name contains this")
    options = parser.parse_args()
    names = [target.name for target in all_targets() if options.only in target.name]
    if not names:
        parser.error(f"no target is called {options.only!r}")
    share = -(-options.inputs // len(names))
    failed = False
    print(f"{'parser':<32} {'inputs':>8} {'refused':>8} {'µs each':>8}")
    with ProcessPoolExecutor(options.jobs) as pool:
        for outcome in pool.map(fuzz, names, [options.seed] * len(names), [share] * len(names)):
            each = outcome.seconds / outcome.inputs * 1e6
            print(f"{outcome.target:<32} {outcome.inputs:>8} {outcome.refused:>8} {each:>8.0f}")
            for failure in outcome.failures:
                failed = True
                print(f"  FAILED {failure}")
            sys.stdout.flush()
    print(f"{share * len(names)} inputs, {'failures above' if failed else 'no failure'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
