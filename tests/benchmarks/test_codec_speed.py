import pytest

from benchmarks.codec import COPY, PARTS, as_row, main, parse, travel_seconds
from tests.benchmarks.helpers import measured

# The arithmetic


def test_travel_is_that_of_a_ring_of_encoded_bytes():
    # 25 million elements of 66 bytes per 128, at 1 Gbit/s
    assert travel_seconds(25_000_000, 2, 66 / 128, 1.0) == pytest.approx(0.103125)
    assert travel_seconds(25_000_000, 4, 66 / 128, 0.5) == pytest.approx(0.103125 * 1.5 * 2)


def taken(send: float) -> dict[str, float]:
    return {"encode": 0.5, "decode": 0.25, "send": send, "combine": 0.2, "receive": 0.3}


def test_work_is_the_median_of_whole_rounds():
    options = parse(["--numel", "1000000000", "--gbit", "8"])
    row = as_row("int8", 1.0, [taken(0.5), taken(0.6), taken(5.0)], options)
    assert row["seconds"]["send"] == 0.6
    assert row["work_seconds"] == pytest.approx(1.1)
    assert row["travel_seconds"] == pytest.approx(1.0)
    assert row["work_to_travel"] == pytest.approx(1.1)
    assert row["gb_per_second"] == pytest.approx({"encode": 8.0, "decode": 16.0, "round": 4 / 1.1})


# The command


def test_a_short_run_has_all_numbers(tmp_path):
    short = ["--numel", "100001", "--turns", "2", "--codecs", "bf16,int8,int4", "--workers", "3"]
    printed, written = measured(main, tmp_path / "codec.json", *short)
    rows = written["rows"]
    assert [row["codec"] for row in rows] == [COPY, "bf16", "int8", "int4"]
    for row in rows[1:]:
        assert set(row["seconds"]) == set(PARTS)
        assert all(len(row["turns"]) == 2 and seconds >= 0 for seconds in row["seconds"].values())
    assert [row["bytes_per_element"] for row in rows] == [4.0, 2.0, 130 / 128, 70 / 128]
    assert "work / travel" in printed
