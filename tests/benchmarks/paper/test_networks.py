import pytest
import torch

from benchmarks.frame.trainer import parameter_count
from benchmarks.paper.networks import CHARACTERS, SMALL, new_network
from benchmarks.paper.plan import SCALES
from benchmarks.paper.text import CONTEXT


@pytest.mark.parametrize("name", SMALL)
def test_networks_classify_small_images_into_ten_classes(name):
    network = new_network(name)
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_networks_for_a_cpu_are_small():
    networks = {task.network for study in SCALES["cpu"] for task in study.tasks}
    counts = {name: parameter_count(new_network(name)) for name in networks}
    assert 200_000 < counts.pop("gpt_tiny") < 250_000
    assert max(counts.values()) < 100_000


def test_language_model_predicts_from_what_came_before_and_nothing_else():
    network = new_network("gpt_tiny").eval()
    characters = torch.randint(CHARACTERS, (2, CONTEXT))
    changed = characters.clone()
    changed[:, 40] = (changed[:, 40] + 1) % CHARACTERS
    before, after = network(characters), network(changed)
    assert before.shape == (2, CHARACTERS, CONTEXT)
    assert torch.allclose(before[..., :40], after[..., :40], atol=1e-6)
    assert (before[..., 40:] - after[..., 40:]).abs().amax(dim=(0, 1)).min() > 1e-4
