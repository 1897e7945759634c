import pytest
import torch

from benchmarks.frame.trainer import parameter_count
from benchmarks.paper.networks import SMALL, new_network
from benchmarks.paper.plan import SCALES


@pytest.mark.parametrize("name", SMALL)
def test_networks_tell_ten_classes_of_small_images_apart(name):
    network = new_network(name)
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_networks_for_a_cpu_are_small():
    counts = [parameter_count(new_network(task.network)) for study in SCALES["cpu"] for task in study.tasks]
    assert max(counts) < 100_000
