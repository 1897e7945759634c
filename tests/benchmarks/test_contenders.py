import inspect
from dataclasses import replace

from benchmarks import contenders
from benchmarks.contenders import CONTENDERS, Plan
from benchmarks.frame import trainer
from benchmarks.training import Recipe

RECIPE = Recipe(model="mlp", parameters=100_000, batch_size=4, learning_rate=0.05, seed=0, steps=6)
PLAN = Plan(RECIPE, hosts=2, ranks_per_host=2, period=2, adapt=False)


def test_plan_goes_to_the_ranks_and_back():
    assert Plan.from_json(PLAN.as_json()) == PLAN


def test_option_that_the_package_does_not_have_is_named(monkeypatch):
    signature = inspect.Signature([inspect.Parameter("period", inspect.Parameter.KEYWORD_ONLY)])
    monkeypatch.setattr(trainer.inspect, "signature", lambda _: signature)
    reason = CONTENDERS["adpsgd-stagger-overlap"].why_not(PLAN)
    assert reason == "this version of lightning_adpsgd does not have stagger=True, overlap=1"
    assert CONTENDERS["adpsgd"].why_not(PLAN) is None


def test_peer_that_is_not_installed_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr(contenders, "find_spec", lambda module: None)
    assert CONTENDERS["accelerate"].why_not(PLAN) == "accelerate is not installed (pip install accelerate)"
    assert "pip install torchft" in CONTENDERS["torchft"].why_not(PLAN)


def test_node_as_worker_needs_several_ranks_on_it(monkeypatch):
    parameters = [inspect.Parameter("worker", inspect.Parameter.KEYWORD_ONLY)]
    monkeypatch.setattr(trainer.inspect, "signature", lambda _: inspect.Signature(parameters))
    assert CONTENDERS["adpsgd-node"].why_not(PLAN) is None
    assert "--ranks-per-host" in CONTENDERS["adpsgd-node"].why_not(replace(PLAN, ranks_per_host=1))


def test_even_rounds_need_the_mean_period():
    assert "--mean-period" in CONTENDERS["even"].why_not(PLAN)
    assert CONTENDERS["even"].why_not(replace(PLAN, mean_period=6.5)) is CONTENDERS["qsgd"].why_not(PLAN) is None
