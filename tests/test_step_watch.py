"""Every optimizer step is noticed once, by the watch that has asked for it last."""

import pytest
import torch
from torch import nn

from lightning_adpsgd.step_watch import StepWatch


class Wrapper(torch.optim.Optimizer):
    """Around another optimizer, without Optimizer.__init__, as some packages have it."""

    def __init__(self, wrapped: torch.optim.Optimizer) -> None:
        self.wrapped, self.param_groups = wrapped, wrapped.param_groups

    def step(self) -> None:
        self.wrapped.step()


@pytest.fixture
def optimizer():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    return torch.optim.SGD([parameter], lr=1.0)


@pytest.fixture
def seen():
    return []


@pytest.fixture
def watch(optimizer, seen):
    watch = StepWatch(seen.append)
    watch.watch(optimizer)
    return watch


def test_a_step_that_bypasses_the_framework_is_noticed(watch, optimizer, seen):
    optimizer.step()
    assert seen == [optimizer]


def test_a_step_of_the_framework_is_noticed_once_however_often_it_steps_inside(watch, optimizer, seen):
    with watch.stepping(optimizer):
        optimizer.step()
        optimizer.step()
        assert not seen
    assert seen == [optimizer]


def test_a_step_that_fails_is_not_counted_and_later_ones_are(watch, optimizer, seen):
    with pytest.raises(ZeroDivisionError), watch.stepping(optimizer):
        raise ZeroDivisionError
    assert not seen
    optimizer.step()
    assert seen == [optimizer]


def test_an_optimizer_is_watched_by_whoever_has_asked_last(watch, optimizer, seen):
    later = []
    StepWatch(later.append).watch(optimizer)
    optimizer.step()
    watch.stop()  # of what it has watched last
    optimizer.step()
    assert (seen, later) == ([], [optimizer] * 2)


def test_a_watch_that_has_stopped_notices_nothing(watch, optimizer, seen):
    watch.stop()
    optimizer.step()
    assert not seen


def test_a_wrapper_without_hooks_is_counted_where_the_framework_steps_it(watch, optimizer, seen):
    wrapper = Wrapper(optimizer)
    watch.watch(wrapper)
    with watch.stepping(wrapper):
        wrapper.step()
    assert seen == [wrapper]
