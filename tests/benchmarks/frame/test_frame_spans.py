import time
from typing import get_args

from benchmarks.frame.spans import SPANS, Taken, recorded_spans
from lightning_adpsgd.averaging import spans
from lightning_adpsgd.averaging.spans import span


def test_spans_are_those_of_the_package():
    assert get_args(spans.Name) == SPANS


def test_spans_are_counted_and_timed_and_one_that_does_not_occur_counts_as_zero():
    with recorded_spans() as taken:
        assert taken == {}
        for _ in range(3):
            with span("pack"):
                time.sleep(0.01)
    assert list(taken) == list(SPANS)
    assert taken["pack"].calls == 3
    assert taken["pack"].seconds >= 0.03
    assert {taken[name] for name in SPANS if name != "pack"} == {Taken(0.0, 0)}


def test_time_of_a_span_within_another_one_is_counted_once():
    began = time.perf_counter()
    with recorded_spans() as taken, span("reduce"):
        time.sleep(0.01)
        with span("decode"):
            time.sleep(0.2)
        in_all = time.perf_counter() - began
    assert taken["decode"].seconds >= 0.2
    assert 0.01 <= taken["reduce"].seconds <= in_all - taken["decode"].seconds + 0.1  # counted twice, it is 0.2 more
    assert (taken["reduce"].calls, taken["decode"].calls) == (1, 1)
