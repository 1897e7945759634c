import sys

import pytest

from benchmarks.frame.device import Device
from benchmarks.frame.spans import SPANS
from benchmarks.round import CONTENDERS, Case, Durations, Subject, as_row, breakdown, combine, main, page
from tests.benchmarks.helpers import measured

CASE = Case(parameters=1000, tensors=7, bucket_size_mb=2.0)


# The arithmetic


def an_answer(*, late=0.0, slow=0.0):
    """Of two turns on one rank."""
    return {
        "all-reduce": [[10.0 + late, 12.0 + slow, 0.1, None], [30.0 + late, 33.0 + slow, 0.1, None]],
        "round": [[20.0 + late, 24.0 + slow, 0.1, None], [40.0 + late, 43.0 + slow, 0.1, None]],
    }


def test_turn_is_from_the_last_start_to_the_last_end():
    durations, _ = combine([an_answer(), an_answer(late=0.5, slow=0.25)])
    assert durations == Durations(all_reduce=[1.75, 2.75], round=[3.75, 2.75])


def test_time_on_processors_is_the_mean_over_the_ranks():
    busier = {name: [[*turn[:2], 0.3, None] for turn in turns] for name, turns in an_answer().items()}
    _, seconds = combine([an_answer(), busier])
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


def test_extra_memory_that_cannot_be_measured_is_unknown():
    row = a_row(extra=[{"all-reduce": [None] * 3, "round": [None] * 3}])
    assert row["extra_bytes"] is row["extra_buckets"] is None
    assert "unknown" in page([row])


@pytest.mark.parametrize(("link", "goal"), [("loopback", 1.25), ("1000 Mbit/s", 1.05), ("100 Mbit/s", None)])
def test_goal_is_for_a_model_of_25_million_parameters(link, goal):
    assert a_row(link=link, case=CASE._replace(parameters=25_000_000))["goal"] == goal
    assert a_row(link=link)["goal"] is None


def test_time_that_no_part_has_taken_is_the_rest():
    rows = breakdown([{"total": 10.0, "parts": {"pack": [4.0, 2], "unpack": [5.0, 1]}}] * 3)
    taken = [(row["part"], row["calls"], row["seconds"], row["share"]) for row in rows if row["seconds"]]
    assert taken == [
        ("pack", 2, 4.0, 0.4),
        ("unpack", 1, 5.0, 0.5),
        ("the rest", None, 1.0, 0.1),
        ("all", None, 10.0, 1.0),
    ]


def test_span_that_did_not_occur_counts_as_zero_and_is_named_on_the_page():
    rows = breakdown([{"total": 1.0, "parts": {"pack": [0.5, 2]}}])
    assert [row["part"] for row in rows] == [*SPANS, "the rest", "all"]
    assert {row["part"] for row in rows if row["calls"] == 0} == {*SPANS} - {"pack"}
    row = a_row() | {"breakdown": rows, "unknown_parts": ["unpack", "decode"]}
    assert page([row]).endswith("Spans that did not occur: decode, unpack")


# On a rank


def test_model_has_the_parameters_and_the_tensors_asked_for():
    subject = Subject(CASE, Device())
    sizes = [parameter.numel() for parameter in subject.parameters]
    assert (len(sizes), sum(sizes)) == (7, 1000)
    assert max(sizes) - min(sizes) <= 1


# The command


def test_error_says_what_is_missing_for_a_link(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert main(["--rate-mbit", "1000"]) == 2
    assert "Nothing was measured on 1000 Mbit/s. Network namespaces exist on Linux only" in capsys.readouterr().err


# The measurement


@pytest.mark.workers
def test_round_and_all_reduce_of_the_same_bytes_are_measured(tmp_path):
    options = "--parameters 0.5 --tensors 3,50 --bucket-size-mb 0.25 --breakdown"
    printed, numbers = measured(main, tmp_path / "measured.json", "--turns", "2", *options.split())
    assert numbers["benchmark"] == "round"
    few, many = numbers["rows"]
    for row, tensors in ((few, 3), (many, 50)):
        assert (row["link"], row["parameters"], row["tensors"]) == ("loopback", 500_000, tensors)
        assert row["payload_bytes"] == pytest.approx(4 * 500_000, rel=0.01)
        assert row["ratio"] == pytest.approx(row["round_seconds"] / row["all_reduce_seconds"])
        assert [len(turns) for turns in row["turns"].values()] == [2, 2]
        assert sum(part["seconds"] for part in row["breakdown"][:-1]) > 0
        parts = {part["part"]: part["calls"] for part in row["breakdown"]}
        assert parts["pack"] == parts["reduce"] == 8  # 2 MB in buckets of at most 256 KiB
        assert min(parts[name] for name in ("handshake", "measure", "unpack")) >= 1
        assert {*row["unknown_parts"]} <= {"encode", "decode"}  # there is no codec
        assert "Spans of a round" in printed
        if sys.platform == "linux":
            # Two buffers, gloo's, and Python's own memory, which matters as the buckets are small here.
            assert 1 < row["extra_buckets"] < 40


@pytest.mark.network
def test_bytes_cross_a_link_no_faster_than_its_rate(namespaces, tmp_path):
    options = "--parameters 0.5 --tensors 8 --rate-mbit 200"
    _, numbers = measured(main, tmp_path / "measured.json", "--turns", "2", *options.split())
    (row,) = numbers["rows"]
    assert row["link"] == "200 Mbit/s"
    seconds_on_the_wire = 4 * 500_000 * 8 / 200e6
    assert min(map(min, row["turns"].values())) > 0.9 * seconds_on_the_wire


def test_contenders_are_what_the_table_compares():
    assert len(CONTENDERS) == len(Durations._fields)
