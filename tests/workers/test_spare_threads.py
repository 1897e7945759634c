"""Threads for the time when none can be started any more."""

import os
import threading

import pytest

from lightning_adpsgd.workers import spare_threads
from lightning_adpsgd.workers.spare_threads import keep_spare_threads, run_aside


@pytest.fixture
def at_exit(monkeypatch: pytest.MonkeyPatch):
    """The interpreter shuts down: since Python 3.12 this is how a thread does not start."""

    def shut_down() -> None:
        def start(thread: threading.Thread) -> None:
            raise RuntimeError("can't create new thread at interpreter shutdown")

        monkeypatch.setattr(threading.Thread, "start", start)

    monkeypatch.setattr(spare_threads, "_queues", {})
    return shut_down


def test_functions_run_in_spare_threads_when_none_can_be_started(at_exit):
    keep_spare_threads()
    at_exit()
    held, names = threading.Event(), []
    try:
        run_aside(held.wait)  # it does not come back
        assert run_aside(lambda: names.append(threading.current_thread().name)).wait(10)
        assert run_aside(lambda: names.append(threading.current_thread().name)).wait(10)
    finally:
        held.set()
    assert names == ["lightning_adpsgd at exit"] * 2


def test_spare_threads_are_started_once(at_exit):
    keep_spare_threads()
    at_exit()
    keep_spare_threads()  # would raise


def test_a_fork_has_none_until_it_starts_its_own(at_exit, monkeypatch):
    keep_spare_threads()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    keep_spare_threads()
    at_exit()
    assert run_aside(lambda: None).wait(10)


def test_without_spare_threads_the_error_is_the_interpreters(at_exit):
    at_exit()
    with pytest.raises(RuntimeError, match="interpreter shutdown"):
        run_aside(lambda: None)
