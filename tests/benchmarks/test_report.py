import argparse
import json
import random

import pytest

from benchmarks import report


def test_contenders_take_turns():
    assert list(report.turns("AB", 2)) == [(0, "A"), (0, "B"), (1, "A"), (1, "B")]


def test_contenders_are_taken_from_an_iterator_in_every_turn():
    assert [contender for _, contender in report.turns(iter("AB"), 2)] == ["A", "B", "A", "B"]


def test_median_is_the_value_in_the_middle():
    assert report.median([5, 1, 2]) == 2.0
    assert report.median(iter([1.0, 2.0])) == 1.5


def test_quartiles_hold_the_middle_half():
    assert report.quartiles([1, 2, 3, 4, 5]) == (2, 4)
    assert report.quartiles([7]) == (7, 7)


@pytest.mark.parametrize("function", [report.median, report.quartiles, report.median_interval])
def test_nothing_has_no_median(function):
    with pytest.raises(ValueError, match="expected one value at least, got none"):
        function([])


# The places are those of published tables of the sign test's confidence intervals.
@pytest.mark.parametrize(("count", "place"), [(1, 0), (2, 0), (5, 0), (6, 0), (9, 1), (10, 1), (20, 5), (30, 9)])
def test_interval_leaves_out_as_many_values_as_the_binomial_distribution_allows(count, place):
    shuffled = random.Random(0).sample(range(count), count)
    assert report.median_interval(shuffled) == (place, count - 1 - place)


def test_interval_holds_the_true_median_as_often_as_it_says():
    draw = random.Random(0)
    intervals = [report.median_interval([draw.gauss(0, 1) for _ in range(15)]) for _ in range(1000)]
    assert sum(low <= 0 <= high for low, high in intervals) >= 940


def test_numbers_are_aligned_to_the_right_and_words_to_the_left():
    rows = [{"name": "a", "count": 1234, "share": 0.123456, "note": "-"}, {"name": "longer", "share": None}]
    assert report.table(rows, ["name", "count", "share", "note"]).splitlines() == [
        "name    count   share  note",
        "------  -----  ------  ----",
        "a       1,234  0.1235  -",
        "longer",
    ]


def test_number_in_a_name_does_not_make_it_a_number():
    assert (
        report.table([{"link": "9 Mbit/s", "size": "9.0 MB"}], ["link", "size"]).splitlines()[0] == "link        size"
    )


def test_table_of_nothing_has_its_columns():
    assert report.table([], ["a", "bc"]).splitlines() == ["a  bc", "-  --"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (999_999, "1.0 MB"), (12.3e6, "12.3 MB"), (2e12, "2.0 TB")],
)
def test_bytes_have_a_unit_that_suits_them(count, text):
    assert report.bytes_readable(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (2e-7, "0.200 us"), (5e-6, "5.00 us"), (1.234e-3, "1.23 ms"), (0.0999, "99.9 ms"), (61.04, "61.0 s")],
)
def test_seconds_have_a_unit_that_suits_them(seconds, text):
    assert report.seconds_readable(seconds) == text


def test_file_says_what_was_measured_with_what_and_on_what(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmarks/link.py", "--hosts", "2"])
    report.write_json(tmp_path / "file.json", "link", {"hosts": 2, "json": tmp_path}, [{"loss": 1.5}])
    content = json.loads((tmp_path / "file.json").read_text())
    assert content["benchmark"] == "link"
    assert content["command"][1:] == ["-m", "benchmarks.link", "--hosts", "2"]
    assert content["arguments"] == {"hosts": 2, "json": str(tmp_path)}
    assert content["rows"] == [{"loss": 1.5}]
    assert content["machine"]["cpu_count"] >= content["machine"]["cpus_usable"] >= 1
    assert content["machine"]["cpu"]
    assert all(content["machine"]["versions"][name] for name in ("torch", "lightning", "lightning_adpsgd"))


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        (report.number(1), "0", "expected int of at least 1, got '0'"),
        (report.number(1, 3), "4", "expected int from 1 to 3, got '4'"),
        (report.number(0, kind=float), "nan", "expected float of at least 0, got 'nan'"),
        (report.number(1), "many", "expected int of at least 1, got 'many'"),
        (report.several(report.number(1)), "2,,3", "expected int of at least 1, got ''"),
        (report.one_of(["a", "b"]), "c", "expected some of a, b, got 'c'"),
        (report.output_file, "no_such_folder/file.json", "there is no folder"),
    ],
)
def test_wrong_argument_is_told_with_what_is_expected(kind, given, expected):
    with pytest.raises(argparse.ArgumentTypeError, match=expected):
        kind(given)


def test_list_is_divided_by_commas_and_holds_nothing_twice():
    assert report.several(report.number(0.5, kind=float))("1,0.5,1") == [1.0, 0.5]
