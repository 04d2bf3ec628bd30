"""The smaller checks, each both ways."""

from importlib import metadata
from pathlib import Path

import msgspec
import pytest

from pxd.cluster.records import Device, HeldModel, StageReport
from pxd.doctor import clocks, daemon, door, engines, findings, links, machine, versions, words
from pxd.doctor.clocks import Compared
from pxd.doctor.facts import Peer
from pxd.doctor.machine import Machine
from pxd.p2p.clock import Offset
from pxd.p2p.refusals import Refusal
from pxd.serving.status import ModelView

from .patients import IDS, NOW, facts, levels, only, peer, record, status

BEN, CARL, DORA = (peer(n, f"10.0.0.{i}") for i, n in enumerate(("ben", "carl", "dora"), 2))
GIB = 1 << 30


def test_a_daemon_in_good_order() -> None:
    found = daemon.daemon(facts(BEN, CARL))
    assert levels(found) == {"daemon": "ok", "leader": "ok", "nodes": "ok"}
    assert "pxd 0.1.0" in found[0].text
    assert "this node leads" in found[1].text
    assert "3 nodes" in found[2].text


@pytest.mark.parametrize(("uptime", "level"), [(5.0, "note"), (300.0, "problem")])
def test_no_leader(uptime: float, level: str) -> None:
    found = daemon.daemon(facts(status=status(leader=None, uptime=uptime)))
    assert levels(found)["leader"] == level


@pytest.mark.parametrize(
    ("other", "level", "words"),
    [
        (peer("ben", state="suspect", since=12.0), "warning", "ben for 12 s without an answer"),
        (peer("ben", host=None), "warning", "no connection to them"),
        (peer("ben", host=None, state="dead"), "note", "gone without a goodbye"),
    ],
)
def test_nodes_in_trouble(other: Peer, level: str, words: str) -> None:
    found = daemon.daemon(facts(other))
    assert levels(found)["nodes"] == level
    assert words in found[-1].text


def test_the_daemons_own_problem_is_repeated() -> None:
    found = daemon.daemon(facts(own=record("me", problem="comes to another plan")))
    assert levels(found)["daemon"] == "warning"
    assert found[1].text == "comes to another plan"


@pytest.mark.parametrize(
    ("state", "level"),
    [("serving", "ok"), ("loading", "note"), ("waiting", "warning"), ("failed", "problem")],
)
def test_models(state: str, level: str) -> None:
    view = ModelView(name="m", state=state, reason="2 GiB missing", layers=8, pipelines=[])  # type: ignore[arg-type]
    found = only(daemon.model(facts(status=status(models=[view]))))
    assert found.level == level
    assert ("2 GiB missing" in found.text) is (state != "serving")


def test_no_model_yet_and_a_stage_that_failed() -> None:
    assert only(daemon.model(facts(status=status(models=[])))).level == "note"
    stage = StageReport(
        model="demo", pipeline="p", start=0, end=3, state="failed", reason="out of memory"
    )
    found = daemon.model(facts(own=record("me", stages=(stage,))))
    assert levels(found) == {"model": "problem"}
    assert "out of memory" in found[1].text


def refusal(reason: str, age: float = 5.0, **more: str) -> Refusal:
    fields = {"address": "10.0.0.9", "peer": IDS["evil"]} | more
    return Refusal(reason=reason, at=NOW - age, **fields)


def test_the_same_key() -> None:
    assert "same cluster key as ben" in only(door.door(facts(BEN))).text
    assert only(door.door(facts())).level == "ok"
    old = facts(BEN, refusals=(refusal("wrong-key", age=601),))
    assert levels(door.door(old)) == {"cluster-key": "ok"}
    inside = facts(BEN, refusals=(refusal("wrong-key", peer=BEN.id),))
    assert levels(door.door(inside)) == {"cluster-key": "ok"}
    unreachable = facts(BEN, refusals=(refusal("no answer within 5 s"),))
    assert levels(door.door(unreachable)) == {"cluster-key": "ok"}


def test_another_key() -> None:
    twice = (refusal("wrong-key", 60, address="10.0.0.9:8471"), refusal("wrong-key", 3))
    found = only(door.door(facts(BEN, refusals=twice)))
    assert found.level == "problem"
    assert "10.0.0.9 (~EEEEE) holds another key" in found.text
    assert "last 3.0 s ago" in found.text
    assert "pxd ticket" in found.remedy
    assert "pxd start --join TICKET" in found.remedy.splitlines()


def test_another_key_and_alone() -> None:
    here = facts(refusals=(refusal("wrong-key"), refusal("wrong-key", address="x", peer="y")))
    found = only(door.door(here))
    assert "hold other keys" in found.text
    assert "rm /nowhere/pxd/cluster.key" in found.remedy.splitlines()
    assert "pxd start --data-dir /nowhere/pxd --join TICKET" in found.remedy.splitlines()


def test_another_protocol() -> None:
    said = "refused x: it speaks version 2 of pxd's protocol, this node 1; do this and that"
    found = door.door(facts(BEN, refusals=(refusal("version", message=said),)))
    assert levels(found) == {"cluster-key": "ok", "protocol": "problem"}
    assert "~EEEEE) speaks version 2 of pxd's protocol, this node 1 (pxd 0.1.0)" in found[1].text
    unsaid = door.door(facts(refusals=(refusal("version"),)))
    assert "speaks another version" in unsaid[1].text


def test_who_was_kicked_out_or_tries_too_often() -> None:
    found = door.door(facts(BEN, refusals=(refusal("banned", message="it was kicked out"),)))
    assert levels(found) == {"cluster-key": "ok", "door": "warning"}
    assert found[1].details == ("it was kicked out",)
    found = door.door(facts(BEN, refusals=(refusal("too-many-failures", peer=""),)))
    assert levels(found) == {"cluster-key": "ok", "door": "warning"}
    assert "from 10.0.0.9" in found[1].text


def test_a_key_that_was_replaced() -> None:
    found = only(door.door(facts(BEN, refusals=(refusal("old-key"),))))
    assert found.level == "problem"
    assert "pxd start --join TICKET" in found.remedy.splitlines()


def test_versions() -> None:
    assert only(versions.versions(facts(BEN))).text == "pxd 0.1.0 on 2 nodes"
    old = msgspec.structs.replace(BEN, record=record("ben", pxd="0.0.9"))
    found = only(versions.versions(facts(old, CARL)))
    assert found.level == "warning"
    assert found.text == "this node runs pxd 0.1.0, ben with pxd 0.0.9"
    assert found.remedy == "update ben to pxd 0.1.0"
    new = msgspec.structs.replace(BEN, record=record("ben", pxd="0.10.0"))
    assert only(versions.versions(facts(new))).remedy == "update this node to pxd 0.10.0"
    gone = msgspec.structs.replace(old, state="dead")
    assert only(versions.versions(facts(gone))).level == "ok"


def holding(who: Peer, mark: str) -> Peer:
    return msgspec.structs.replace(
        who, record=record(who.name, models=(HeldModel("demo", mark), HeldModel("other")))
    )


def test_revisions_of_a_model() -> None:
    own = record("me", models=(HeldModel("demo", "aaa"),))
    same = facts(holding(BEN, "aaa"), own=own)
    assert only(versions.models(same)).text == "same revision of demo on this node and ben"
    differ = only(versions.models(facts(holding(BEN, "bbb"), holding(CARL, "aaa"), own=own)))
    assert differ.level == "warning"
    assert "anew on ben" in differ.remedy
    assert differ.details == ("aaa: this node and carl", "bbb: ben")
    two = only(versions.models(facts(holding(BEN, "bbb"), own=own)))
    assert "on one of them" in two.remedy
    assert versions.models(facts(BEN)) == []


def test_files_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions.files(["demo"], {}) == []
    gone = str(tmp_path / "gone")
    missing = only(versions.files([gone], {}))
    assert missing.level == "problem"
    lent = versions.lenders(facts(holding(BEN, "aaa"), CARL))
    assert lent == {"demo": ["ben"], "other": ["ben"]}
    coming = only(versions.files([gone], {gone: ["ben", "carl"]}))
    assert (coming.level, "comes from ben and carl" in coming.text) == ("note", True)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert only(versions.files(["some/model"], {})).level == "note"


def compared(*offsets: tuple[Peer, float | None]) -> list[Compared]:
    return [Compared(p, None if o is None else Offset(o, 0.002)) for p, o in offsets]


def test_clocks_that_agree() -> None:
    found = only(clocks.clocks(facts(BEN, CARL), compared((BEN, 0.1), (CARL, -1.5))))
    assert found.level == "ok"
    assert "3 nodes agree to within 1.5 s" in found.text


def test_two_clocks_that_differ() -> None:
    found = only(clocks.clocks(facts(BEN), compared((BEN, 7.0))))
    assert found.level == "warning"
    assert "the clock of ben is 7.0 s ahead of that of this machine" in found.text
    assert clocks.set_clock() in found.remedy


def test_the_majority_is_right() -> None:
    all_three = facts(BEN, CARL, DORA)
    found = only(clocks.clocks(all_three, compared((BEN, -40.0), (CARL, 0.0), (DORA, 0.1))))
    assert "ben is 40 s behind this machine" in found.text
    found = only(clocks.clocks(all_three, compared((BEN, 40.0), (CARL, 41.0), (DORA, 40.5))))
    assert "this machine's clock is 40 s behind those of most others" in found.text
    assert found.remedy.endswith(clocks.set_clock())


def test_a_doubtful_offset_is_no_difference() -> None:
    doubtful = [Compared(BEN, Offset(2.5, 1.0))]
    assert only(clocks.clocks(facts(BEN), doubtful)).level == "ok"


def test_clocks_that_nobody_told() -> None:
    assert only(clocks.clocks(facts(BEN), compared((BEN, None)))).level == "note"
    assert only(clocks.clocks(facts(BEN), None)).level == "note"
    assert clocks.clocks(facts(), None) == []


def test_short_ways() -> None:
    near = msgspec.structs.replace(CARL, rtt=0.0001, bandwidth=1.25)
    found = only(links.links(facts(BEN, near)))
    assert found.level == "ok"
    assert found.details == (
        "ben: 0.40 ms, bandwidth not measured yet",
        "carl: 0.10 ms, 1.25 GB/s",
    )
    assert links.links(facts()) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rtt": 0.02}, "ben over 5 ms away"),
        ({"bandwidth": 0.01}, "less than 0.05 GB/s to ben"),
        ({"relayed": True}, "ben can be reached through a relay only"),
    ],
)
def test_long_ways(changes: dict[str, object], words: str) -> None:
    far = msgspec.structs.replace(BEN, **changes)
    found = only(links.links(facts(CARL, far)))
    assert found.level == "note"
    assert words in found.text
    assert found.details[0].startswith(("ben", "carl"))


def test_the_worst_ways_come_first_and_not_all_are_listed() -> None:
    crowd = [
        msgspec.structs.replace(BEN, id=f"{n}", name=f"n{n}", rtt=n / 10_000) for n in range(20)
    ]
    details = only(links.links(facts(*crowd))).details
    assert details[0].startswith("n19")
    assert len(details) == links.LISTED + 1
    assert "4 more" in details[-1]


def the_machine(**more: object) -> Machine:
    fields = {
        "data_dir": Path("/d"),
        "data_free": 50 * GIB,
        "cache_dir": Path("/c"),
        "cache_free": 50 * GIB,
        "total": 32 * GIB,
        "available": 20 * GIB,
        "swapped": 0,
        "own": 4 * GIB,
        "offered": 24 * GIB,
    }
    return Machine(**(fields | more))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("more", "level"),
    [
        ({}, "ok"),
        ({"data_free": 1 << 20}, "problem"),
        ({"cache_free": GIB}, "note"),
        ({"cache_free": None}, "note"),
    ],
)
def test_disk(more: dict[str, object], level: str) -> None:
    assert only(machine.disk(the_machine(**more))).level == level


@pytest.mark.parametrize(
    ("more", "level"),
    [
        ({}, "ok"),
        ({"available": 19 * GIB}, "warning"),
        ({"offered": None}, "ok"),
        ({"swapped": 4 * GIB}, "note"),
    ],
)
def test_memory(more: dict[str, object], level: str) -> None:
    assert levels(machine.memory(the_machine(**more))) == {"memory": level}


def test_memory_that_others_hold_says_what_to_offer() -> None:
    [found] = machine.memory(the_machine(available=19 * GIB))
    assert "--memory 23" in found.remedy


def test_no_figures_in_time() -> None:
    assert only(machine.disk(None)).level == "note"
    assert machine.memory(None) == []


def test_this_machine(tmp_path: Path) -> None:
    here = machine.look(tmp_path / "not" / "made" / "yet", 1)
    assert here.data_free
    assert 0 < here.own < here.total
    assert machine.look(tmp_path, None).own == 0


def test_executors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "installed_kinds", lambda: ("mlx",))
    works = Device(kind="cpu", name="EPYC", tflops=0.5, bandwidth=20, executors=("mlx",))
    found = only(engines.executors(works))
    assert (found.level, found.text) == (
        "ok", "mlx works on cpu: EPYC (0.5 TFLOP/s, 20 GB/s)")  # fmt: skip
    assert found.details == ("torch: not installed", "sglang: not installed")
    assert only(engines.executors(None, "no module named mlx")).level == "problem"
    assert only(engines.executors(Device())).level == "problem"


@pytest.mark.parametrize(
    ("installed", "gpu", "words"),
    [
        ("", True, "not installed"),
        ("0.5.22", True, "SGLang 0.5.22 is installed; install the release"),
        ("0.5.23", False, "no GPU that it could use"),
        ("0.5.23", True, "installed, but not taken"),
    ],
)
def test_why_an_executor_does_not_work(
    monkeypatch: pytest.MonkeyPatch, installed: str, gpu: bool, words: str
) -> None:
    monkeypatch.setattr(engines, "KINDS", ("mlx", "sglang"))
    monkeypatch.setattr(engines, "installed_kinds", lambda: ("mlx", "sglang") if installed else ())
    monkeypatch.setattr(metadata, "version", lambda package: installed)
    monkeypatch.setattr(engines.shutil, "which", lambda program: "/bin/x" if gpu else None)
    details = engines.executors(Device(executors=("mlx",))).pop().details
    assert any(line.startswith(f"sglang: {words}") for line in details)


async def test_an_executor_that_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(wanted: str, *, timeout: float) -> Device:
        raise engines.ExecutorError("no MLX here")

    monkeypatch.setattr(engines, "choose_executor", fails)
    assert await engines.measured("auto", 1.0) == (None, "no MLX here")


def test_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    assert words.path(Path("/home/anna/a/b")) == "~/a/b"
    assert words.path(Path("/srv/a")) == "/srv/a"
    assert words.listed([]) == ""
    assert words.listed("abcdef") == "a, b, c and 3 more"
    assert words.listed(["a", "b"]) == "a and b"
    assert words.plural(1, "node") == "1 node"
    assert words.ports([1]) == "port 1"
    assert words.ports([1, 2]) == "ports 1 and 2"
    assert [words.seconds(s) for s in (0.003, 0.4, 12, 200, 9e3, 2e5)] == [
        "3 ms", "0.4 s", "12 s", "3 min", "2 h", "2 days"]  # fmt: skip
    assert [words.gib(size) for size in (5 << 20, 3 << 29)] == ["5 MiB", "1.5 GiB"]


def test_a_finding_is_made_by_its_level() -> None:
    assert findings.ok("x", "y", "z").details == ("z",)
    assert findings.problem("x", "y", "do").level == "problem"
