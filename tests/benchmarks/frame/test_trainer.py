import pytest
import torch

from benchmarks.frame.trainer import Batches, Rounds, unknown_options
from lightning_adpsgd import AveragingRound


def test_batch_comes_as_often_as_asked_for():
    batch = torch.ones(2)
    batches = Batches(batch, 3)
    assert len(batches) == 3
    assert all(each is batch for each in batches)


def a_round(step, trigger):
    return AveragingRound(step, 0, trigger, 1, 8, 0.1, 0.0, 0.0, None, 4, 4, 0.1)


def test_rounds_are_added_up_and_those_between_two_steps_are_the_periods():
    rounds = Rounds()
    rounds.kept += [a_round(8, "period"), a_round(16, "period"), a_round(24, "period"), a_round(24, "train_end")]
    assert rounds.sent() == (4, 16)
    assert [each.step for each in rounds.between(8, 24)] == [16, 24]


@pytest.mark.parametrize("options", [{}, {"overlap": 1}])
def test_options_that_the_package_has_are_known(options):
    assert unknown_options(options) is None


def test_options_that_the_package_does_not_have_are_named():
    options = {"overlap": 1, "no_such_option": 1, "other": "x"}
    assert unknown_options(options) == "this version of lightning_adpsgd does not have no_such_option=1, other='x'"
