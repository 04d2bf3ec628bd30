"""The catalogue of machines."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pxd.planning.machines import MACHINES, Machine, find_machine


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("rtx-4090", "rtx-4090"),
        ("RTX 4090", "rtx-4090"),
        ("rtx4090", "rtx-4090"),
        ("4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090 24GB", "rtx-4090"),
        ("rtx5090", "rtx-5090"),
        ("rtx-3060", "rtx-3060-12"),
        ("a6000", "rtx-a6000"),
        ("a100-80g", "a100-80"),
        ("a100-40g", "a100-40"),
        ("A100 80 GB", "a100-80"),
        ("h100-80", "h100"),
        ("Apple M3 Max 128 GB", "m3-max-128"),
        ("M4-16GiB", "m4-16"),
        ("dgx spark", "dgx-spark"),
        ("AMD Ryzen AI Max+ 395 128GB", "ryzen-ai-max-395-128"),
        ("strix halo 128", "ryzen-ai-max-395-128"),
    ],
)
def test_a_machine_is_found_however_it_is_spelt(spelling: str, name: str) -> None:
    assert find_machine(spelling).name == name


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_every_machine_has_figures_a_source_and_a_name_of_its_own(machine: Machine) -> None:
    assert find_machine(machine.name) is machine
    assert find_machine(f"{machine.name} {machine.memory_gib:g} GB") is machine
    assert machine.source.split()[0] in ("NVIDIA", "AMD", "Apple")
    assert machine.device in ("cuda", "rocm", "mlx")
    assert 0 < machine.tflops < 3000
    assert 4 <= machine.memory_gib <= 512
    assert 50 < machine.bandwidth <= 8000


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("rtx-4900", ["rtx-4090"]),
        ("m3-max", ["m3-max-36", "m3-max-64"]),
        ("a100", ["a100-40", "a100-80"]),
        ("rtx-4060-ti", ["rtx-4060-ti-8", "rtx-4060-ti-16"]),
    ],
)
def test_near_names_are_suggested_for_one_that_is_unknown(name: str, near: list[str]) -> None:
    with pytest.raises(ValueError, match=f"no machine '{name}'.*did you mean") as caught:
        find_machine(name)
    assert all(each in str(caught.value) for each in near)


def test_nothing_is_suggested_where_nothing_is_near() -> None:
    with pytest.raises(ValueError, match=r"^there is no machine 'abacus' in the catalogue$"):
        find_machine("abacus")


@given(st.text(max_size=40))
def test_any_text_is_a_machine_or_refused(name: str) -> None:
    problem = ""
    try:
        assert find_machine(name) in MACHINES
    except ValueError as error:
        problem = str(error)
    assert problem.isprintable()


def test_gpus_of_one_node_count_together() -> None:
    machine = find_machine("rtx-3060-12")
    offer = machine.offer("a", 4)
    assert offer.memory == 48 << 30
    assert math.isclose(offer.tflops, 4 * machine.tflops)
    assert offer.bandwidth == 4 * machine.bandwidth


def test_figures_of_the_makers() -> None:
    """Spot checks, each against the maker's data sheet."""
    figures = {
        name: (found.tflops, found.memory_gib, found.bandwidth)
        for name in ("a100-80", "h100", "rtx-4090", "rtx-3090", "m1-max-64", "m3-ultra-512")
        for found in [find_machine(name)]
    }
    assert figures == {
        "a100-80": (312.0, 80, 2039),
        "h100": (989.4, 80, 3350),
        "rtx-4090": (165.2, 24, 1008),
        "rtx-3090": (71.0, 24, 936),
        "m1-max-64": (10.4, 64, 400),
        "m3-ultra-512": (28.5, 512, 819),
    }
