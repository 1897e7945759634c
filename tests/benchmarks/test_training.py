from dataclasses import replace

import pytest
import torch

from benchmarks.frame.hosts import Counters
from benchmarks.frame.trainer import Sent
from benchmarks.training import Pause, Recipe, Record, Shuffled, model_size, new_loader, new_network

RECIPE = Recipe(model="mlp", parameters=100_000, batch_size=4, learning_rate=0.05, seed=0, steps=6)


@pytest.mark.parametrize("parameters", [10_000, 100_000, 3_000_000])
def test_model_has_about_the_parameters_asked_for(parameters):
    count = model_size(replace(RECIPE, parameters=parameters))
    assert count == pytest.approx(parameters, rel=0.02)


def test_ranks_start_from_the_same_weights_and_see_different_batches():
    first, second = new_network(RECIPE), new_network(RECIPE)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    batches = [next(iter(new_loader(RECIPE, rank, 2)))[0] for rank in (0, 1)]
    assert batches[0].shape == (4, 3, 32, 32)
    assert not torch.equal(*batches)


def test_batches_are_the_same_for_every_contender():
    labels = [torch.cat([labels for _, labels in new_loader(RECIPE, 0, 2)]) for _ in range(2)]
    assert len(labels[0]) == RECIPE.steps * RECIPE.batch_size
    assert torch.equal(*labels)


def test_every_example_is_drawn_once_before_any_is_drawn_again():
    draws = list(Shuffled(5, 12, seed=0))
    assert len(draws) == 12
    assert sorted(draws[:5]) == sorted(draws[5:10]) == [0, 1, 2, 3, 4]
    assert draws[:5] != draws[5:10]


def test_pause_changes_nothing_but_the_time():
    plain, paused = new_network(RECIPE), new_network(replace(RECIPE, pause_ms=0.1))
    assert sum(isinstance(module, Pause) for module in paused) == 4
    images = torch.randn(2, 3, 32, 32)
    for network in (plain, paused):
        network(images).square().sum().backward()
    for a, b in zip(plain.parameters(), paused.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_record_has_a_note_before_the_first_step_and_after_each():
    met = []
    record = Record(lambda: met.append(True), lambda: Counters(7, 0, 1, 0))
    record.begin()
    record.sent = lambda: Sent(record.steps, 10 * record.steps)
    record.step(torch.tensor(0.5))
    noted = record.as_json()
    assert met == [True]
    assert noted["losses"] == [0.5]
    assert (noted["tx_bytes"], noted["tx_packets"]) == ([7, 7], [1, 1])
    assert (noted["rounds"], noted["sent_bytes"]) == ([0, 1], [0, 10])
    assert noted["times"][0] <= noted["times"][1]
