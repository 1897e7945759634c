import os

import pytest

from benchmarks.frame.connection import divide


@pytest.mark.parametrize(("rank", "group", "place_in_it"), [(0, 0, 0), (3, 1, 1), (4, 2, 0)])
def test_processes_are_divided_among_the_contenders(monkeypatch, rank, group, place_in_it):
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 6, "LOCAL_WORLD_SIZE": 6}.items():
        monkeypatch.setenv(name, str(value))
    divide.cache_clear()
    assert [divide(2), divide(2)] == [group, group]
    assert [os.environ["RANK"], os.environ["LOCAL_RANK"]] == [str(place_in_it)] * 2
    assert [os.environ["WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"]] == ["2", "2"]
    divide.cache_clear()
