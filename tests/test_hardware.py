from pathlib import Path

import msgspec
import psutil
import pytest

from pxd import hardware
from pxd.cluster.records import Device

GIB = 1 << 30
DEVICE = Device(kind="cpu", name="Abacus", memory=7, tflops=0.5, bandwidth=9.5, executors=("mlx",))


def test_memory_of_this_machine() -> None:
    assert 0 <= hardware.memory_available() <= psutil.virtual_memory().total
    assert 0 < hardware.memory_total() <= psutil.virtual_memory().total


def test_this_machine_has_a_name_and_a_stable_key() -> None:
    assert hardware.device_name()
    assert hardware.machine_key() == hardware.machine_key()
    assert hardware.device_name() in hardware.machine_key()


@pytest.mark.parametrize(
    ("total", "available", "cap", "offer"),
    [
        (16 * GIB, 15 * GIB, None, 12 * GIB),
        (16 * GIB, 9 * GIB, None, 9 * GIB),
        (16 * GIB, 1 * GIB, None, 4 * GIB),
        (16 * GIB, 15 * GIB, 2.5, 5 * GIB // 2),
        (16 * GIB, 1 * GIB, 14.0, 14 * GIB),
        (16 * GIB, 15 * GIB, 64.0, 16 * GIB),
        (16 * GIB, 15 * GIB, 0.0, 0),
        (16 * GIB, 15 * GIB, -1.0, 0),
    ],
)
def test_what_a_node_offers(total: int, available: int, cap: float | None, offer: int) -> None:
    assert hardware.memory_offer(total, available, cap) == offer


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def groups(root: Path) -> list[tuple[int, int]]:
    return hardware.cgroup_memory(root / "cgroup", root / "membership")


def test_cgroup_2_counts_every_level_that_has_a_limit(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "membership": "0::/system/pxd.service\n",
            "cgroup/system/pxd.service/memory.max": "3000\n",
            "cgroup/system/pxd.service/memory.current": "1500\n",
            "cgroup/system/pxd.service/memory.stat": "anon 1000\ninactive_file 400\n",
            "cgroup/system/memory.max": "max\n",
            "cgroup/system/memory.current": "9000\n",
            "cgroup/memory.max": "5000\n",
            "cgroup/memory.current": "100\n",
        },
    )
    assert groups(tmp_path) == [(3000, 1100), (5000, 100)]


def test_cgroup_1_in_a_container_that_sees_only_its_own_top(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "membership": "5:cpu,cpuacct:/docker/abc\n4:hugetlb,memory:/docker/abc\n0::/x\n",
            "cgroup/memory/memory.limit_in_bytes": "2000\n",
            "cgroup/memory/memory.usage_in_bytes": "700\n",
            "cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 200\n",
        },
    )
    assert groups(tmp_path) == [(2000, 500)]


def test_a_path_that_leads_out_of_the_mount_is_not_followed(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "membership": "0::/../../secret\n",
            "cgroup/memory.max": "2000\n",
            "cgroup/memory.current": "700\n",
        },
    )
    assert groups(tmp_path) == [(2000, 700)]


def test_without_cgroups_there_are_no_limits(tmp_path: Path) -> None:
    assert groups(tmp_path) == []


def test_memory_where_no_cgroup_can_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a network namespace, which gets a /sys of its own."""
    monkeypatch.setattr(hardware, "cgroup_memory", list)
    assert 0 < hardware.memory_available() <= hardware.memory_total()


def test_measured_figures_are_remembered_for_the_same_machine_only(tmp_path: Path) -> None:
    path = tmp_path / "hardware.json"
    assert hardware.load_cached(path, "here", Device) is None
    hardware.store(path, "here", DEVICE)
    assert hardware.load_cached(path, "here", Device) == DEVICE
    assert hardware.load_cached(path, "elsewhere", Device) is None
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\xff", b'{"key":"here","figures":{"tflops":-1}}']
)
def test_a_damaged_cache_means_measuring_again(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "hardware.json"
    path.write_bytes(content)
    assert hardware.load_cached(path, "here", Device) is None
    assert "measuring this machine again" in caplog.text


def test_an_old_cache_of_another_shape_is_measured_again(tmp_path: Path) -> None:
    class Older(msgspec.Struct):
        tflops: str

    path = tmp_path / "hardware.json"
    hardware.store(path, "here", Older(tflops="fast"))
    assert hardware.load_cached(path, "here", Device) is None


def test_a_machine_without_cgroups_has_all_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cgroup_memory", list)
    assert hardware.memory_total() == psutil.virtual_memory().total
    assert 0 < hardware.memory_available() <= hardware.memory_total()
