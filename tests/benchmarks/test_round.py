import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from benchmarks import round as averaging_round
from benchmarks.hosts import HostsUnavailableError, hosts
from benchmarks.machine import Device, Extra
from benchmarks.round import (
    CONTENDERS,
    PARTS,
    Case,
    Durations,
    Part,
    Parts,
    Subject,
    as_row,
    breakdown,
    combine,
    main,
    on_processors,
    page,
    readable,
)

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 240
CASE = Case(parameters=1000, tensors=7, bucket_size_mb=2.0)


# The arithmetic


def an_answer(*, late=0.0, slow=0.0):
    """Of two turns on one rank."""
    return {
        "all-reduce": [[10.0 + late, 12.0 + slow, 0.1, None], [30.0 + late, 33.0 + slow, 0.1, None]],
        "round": [[20.0 + late, 24.0 + slow, 0.1, None], [40.0 + late, 43.0 + slow, 0.1, None]],
    }


def test_turn_is_from_the_last_start_to_the_last_end():
    durations = combine([an_answer(), an_answer(late=0.5, slow=0.25)])
    assert durations == Durations(all_reduce=[1.75, 2.75], round=[3.75, 2.75])


def test_time_on_processors_is_the_mean_over_the_ranks():
    busier = {name: [[*turn[:2], 0.3, None] for turn in turns] for name, turns in an_answer().items()}
    seconds = on_processors([an_answer(), busier])
    assert seconds.all_reduce == seconds.round == pytest.approx([0.2, 0.2])


def a_row(**changes):
    durations = Durations(all_reduce=[1.0, 2.0, 4.0], round=[3.0, 3.0, 3.0])
    memory = [
        {"all-reduce": [2**20, None, 0], "round": [3 * 2**20, None, 4]},
        {"all-reduce": [0, None, 0], "round": [0, None, 5]},
    ]
    return as_row(
        **{
            "link": "loopback",
            "case": CASE,
            "durations": durations,
            "cpu": Durations(all_reduce=[0.5, 0.7, 0.6], round=[1.0, 2.0, 3.0]),
            "payload_bytes": 4,
            "extra": memory,
        }
        | changes
    )


def test_ratio_is_that_of_the_medians():
    row = a_row()
    assert (row["all_reduce_seconds"], row["round_seconds"], row["ratio"]) == (2.0, 3.0, 1.5)
    assert row["ratio_interval"] == (0.75, 3.0)
    assert (row["all_reduce_cpu_seconds"], row["round_cpu_seconds"]) == (0.6, 2.0)


def test_extra_memory_is_that_of_the_rank_with_most():
    row = a_row()
    assert (row["extra_bytes"], row["extra_buckets"], row["all_reduce_extra_bytes"]) == (3 * 2**20, 1.5, 2**20)
    assert row["kept_bytes"] == 5


def test_extra_memory_of_an_accelerator_is_where_the_model_is():
    assert Extra(host_bytes=5, device_bytes=7, kept_bytes=6).bytes == 7
    assert Extra(host_bytes=5, device_bytes=None, kept_bytes=4).bytes == 5


def test_extra_memory_that_cannot_be_known_is_said_to_be_unknown():
    row = a_row(extra=[{"all-reduce": [None] * 3, "round": [None] * 3}])
    assert row["extra_bytes"] is row["extra_buckets"] is None
    assert readable(row)["extra memory"] == "unknown"


@pytest.mark.parametrize(("link", "goal"), [("loopback", 1.25), ("1000 Mbit/s", 1.05), ("100 Mbit/s", None)])
def test_goal_is_for_a_model_of_25_million_parameters(link, goal):
    assert a_row(link=link, case=CASE._replace(parameters=25_000_000))["goal"] == goal
    assert a_row(link=link)["goal"] is None


def test_time_that_no_part_has_taken_is_the_rest():
    rounds = [{"total": 10.0, "parts": {"cut": [4.0, 2], "unpack": [5.0, 1]}}] * 3
    rows = breakdown(rounds)
    assert [(row["part"], row["calls"], row["seconds"], row["share"]) for row in rows] == [
        ("cut", 2, 4.0, 0.4),
        ("unpack", 1, 5.0, 0.5),
        ("the rest", None, 1.0, 0.1),
        ("all", None, 10.0, 1.0),
    ]


# The parts


@pytest.fixture
def module(monkeypatch):
    """A module with a function, and a class with a method that calls it and a property."""
    module = types.ModuleType("a_module")
    module.inner = lambda: 1

    class Outer:
        def method(self):
            return module.inner() + module.inner()

        @property
        def held(self):
            return 3

    module.Outer = Outer
    monkeypatch.setitem(sys.modules, "a_module", module)
    return module


METHOD = Part("a_module", "Outer.method")
INNER = Part("a_module", "inner")


def test_what_a_part_calls_is_counted_by_itself(module):
    clock = iter(range(100))
    with pytest.MonkeyPatch.context() as patch, Parts({"method": METHOD, "inner": INNER}, Device()) as parts:
        patch.setattr(averaging_round.time, "perf_counter", lambda: next(clock))
        assert module.Outer().method() == 2
    assert parts.taken == {"method": (3, 1), "inner": (2, 2)}  # five seconds in all


def test_what_a_part_calls_is_its_own_if_it_is_whole(module):
    with Parts({"method": METHOD._replace(whole=True), "inner": INNER}, Device()) as parts:
        assert module.Outer().method() == 2
        assert {name: taken.calls for name, taken in parts.taken.items()} == {"method": 1}
        module.inner()
        assert {name: taken.calls for name, taken in parts.taken.items()} == {"method": 1, "inner": 1}


def test_property_is_timed_too_and_nothing_is_once_it_is_over(module):
    with Parts({"held": Part("a_module", "Outer.held")}, Device()) as parts:
        assert module.Outer().held == 3
        assert parts.taken["held"].calls == 1
        parts.clear()
        assert not parts.taken
    assert module.Outer().held == 3
    assert not parts.taken


def test_part_whose_function_is_gone_is_named(module):
    gone = {
        "method": Part("a_module", "Outer.gone"),
        "class": Part("a_module", "Gone.method"),
        "module": Part("no_such_module", "gone"),
    }
    with Parts(gone, Device()) as parts:
        assert parts.unknown == ["method", "class", "module"]


def test_page_names_the_parts_that_this_version_does_not_have():
    row = a_row() | {"breakdown": breakdown([{"total": 1.0, "parts": {}}]), "unknown_parts": ["pack"]}
    assert page([row]).endswith("Not in this version of the package: pack")


def test_every_part_is_in_this_version_of_the_package():
    with Parts(PARTS, Device()) as parts:
        assert parts.unknown == []


# On a rank


def test_model_has_the_parameters_and_the_tensors_asked_for():
    subject = Subject(CASE, Device())
    sizes = [parameter.numel() for parameter in subject._parameters]
    assert (len(sizes), sum(sizes)) == (7, 1000)
    assert max(sizes) - min(sizes) <= 1


# The command


def test_error_says_what_is_missing_for_a_link(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert main(["--rate-mbit", "1000"]) == 2
    assert "Nothing was measured on 1000 Mbit/s. Network namespaces exist on Linux only" in capsys.readouterr().err


# The measurement


def run(file, *options):
    command = [sys.executable, "-m", "benchmarks.round", "--turns", "2", "--json", str(file), *options]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout, json.loads(file.read_text())


@pytest.mark.workers
def test_round_and_all_reduce_of_the_same_bytes_are_measured(tmp_path):
    options = "--parameters 0.5 --tensors 3,50 --bucket-size-mb 0.25 --breakdown"
    printed, numbers = run(tmp_path / "measured.json", *options.split())
    assert numbers["benchmark"] == "round"
    few, many = numbers["rows"]
    for row, tensors in ((few, 3), (many, 50)):
        assert (row["link"], row["parameters"], row["tensors"]) == ("loopback", 500_000, tensors)
        assert row["payload_bytes"] == pytest.approx(4 * 500_000, rel=0.01)
        assert row["ratio"] == pytest.approx(row["round_seconds"] / row["all_reduce_seconds"])
        assert [len(turns) for turns in row["turns"].values()] == [2, 2]
        assert sum(part["seconds"] for part in row["breakdown"][:-1]) > 0
        parts = {part["part"]: part["calls"] for part in row["breakdown"]}
        assert parts["pack and divide"] == parts["square and add up"] == 8  # 2 MB in ranges of at most 256 KiB
        assert "wait for mean" in printed
        if sys.platform == "linux":
            # Two buffers, what measures, gloo's own, and, as the buckets are small here, what Python takes meanwhile.
            assert 1 < row["extra_buckets"] < 40


@pytest.mark.network
def test_bytes_cross_a_link_no_faster_than_its_rate(tmp_path):
    try:
        with hosts(2, rate_mbit=200):
            pass
    except HostsUnavailableError as error:
        pytest.skip(str(error))
    options = "--parameters 0.5 --tensors 8 --rate-mbit 200"
    _, numbers = run(tmp_path / "measured.json", *options.split())
    (row,) = numbers["rows"]
    assert row["link"] == "200 Mbit/s"
    seconds_on_the_wire = 4 * 500_000 * 8 / 200e6
    assert min(map(min, row["turns"].values())) > 0.9 * seconds_on_the_wire


def test_contenders_are_what_the_table_compares():
    assert len(CONTENDERS) == len(Durations._fields)
