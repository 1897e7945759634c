import pytest

from benchmarks.frame.table import Column, bytes_readable, interval, table


def test_numbers_are_aligned_to_the_right_and_words_to_the_left():
    rows = [{"name": "a", "count": 1234, "share": 0.123456, "note": "-"}, {"name": "longer", "share": None}]
    columns = [Column("name", "name"), Column("count", "count", ","), Column("share", "share", ".1f", 100)]
    assert table(rows, [*columns, Column("note", "note")]).splitlines() == [
        "name    count  share  note",
        "------  -----  -----  ----",
        "a       1,234   12.3  -",
        "longer",
    ]


def test_number_in_a_name_does_not_make_it_a_number():
    columns = [Column("link", "link"), Column("size", "size", bytes_readable)]
    assert table([{"link": "9 Mbit/s", "size": 9e6}], columns).splitlines()[0] == "link        size"


def test_table_of_nothing_has_its_columns():
    assert table([], [Column("a", "a"), Column("bc", "bc")]).splitlines() == ["a  bc", "-  --"]


def test_value_of_a_nested_row_or_of_a_function_is_shown():
    row = {"wall": {"ratio": 1.25, "interval": (1, 2.5)}}
    assert Column("", "wall.ratio", ".1f").text(row) == "1.2"
    assert Column("", interval("wall.interval", ".2f")).text(row) == "1.00 to 2.50"
    assert Column("", lambda row: row["wall"]["ratio"] * 4, ".0f").text(row) == "5"
    assert Column("", "cpu.ratio", ".1f").text(row) == Column("", interval("cpu.interval", ".2f")).text(row) == ""


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (999_999, "1.0 MB"), (12.3e6, "12.3 MB"), (2e12, "2.0 TB")],
)
def test_bytes_have_a_unit_that_suits_them(count, text):
    assert bytes_readable(count) == text
