from collections import Counter

from pxd.cluster.prng import SplitMix64


def test_known_values() -> None:
    """The first outputs for seed 1234567 of the reference implementation."""
    random = SplitMix64(1234567)
    assert [random.next() for _ in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_below_and_fraction_stay_in_range() -> None:
    random = SplitMix64(1)
    assert {random.below(6) for _ in range(300)} == set(range(6))
    assert all(0 <= random.fraction() < 1 for _ in range(300))


def test_samples_are_fair_and_without_repetition() -> None:
    random = SplitMix64(5)
    seen = Counter(item for _ in range(4000) for item in random.sample("abcd", 2))
    assert all(abs(count - 2000) < 200 for count in seen.values())
    assert sorted(random.sample("abcd", 9)) == list("abcd")
    assert random.sample("", 3) == []
