"""What several tests of the paper's comparison share."""

import json

from benchmarks.paper.links import FILES
from benchmarks.paper.plan import Run, Task
from benchmarks.paper.results import Outcomes
from benchmarks.paper.runs import Store

TASK = Task("net", "Net", "resnet_tiny", workers=2, batch_size=3, images=18, epochs=2)


def some_runs(*contenders, seeds=(0,)):
    return [Run(TASK, contender, seed) for seed in seeds for contender in contenders]


def a_result(loss=1.0, right=0.5, sent=100, had=10, steps=40, curve=None, ratios=None):
    """Of a run with evenly spaced rounds, and the last one at the end of training."""
    every = steps // had
    averaging = {
        "step": [every * place for place in range(1, had + 1)],
        "trigger": ["period"] * (had - 1) + ["train_end"],
        "period": [every] * had,
        "learning_rate": [0.1] * had,
        "variance": [0.5] * had,
        "ratio": ratios or [5.0] * had,
        "target": [None] * (had // 2) + [5.0] * (had - had // 2),
    }
    curve = curve or [(1, 3.0, sent / 2, None), (2, 2.0, sent, right)]
    names = ("epoch", "loss", "sent_bytes", "accuracy")
    return {
        "steps": steps,
        "parameters": 50,
        "rounds": had,
        "sent_bytes": sent,
        "final_loss": loss,
        "accuracy": right,
        "curve": [dict(zip(names, point, strict=True)) for point in curve],
        "averaging": averaging,
    }


def outcomes_of(folder, results, task=TASK):
    """Outcomes with the given results, each a list by seed."""
    store = Store(folder)
    runs = []
    for contender, by_seed in results.items():
        for seed, result in enumerate(by_seed):
            runs.append(Run(task, contender, seed))
            if result is not None:
                store.keep(runs[-1], result, "command", {})
    return Outcomes(store, runs)


def write_link(folder, name):
    names = {"none": (1.0, 0.1), "ddp": (0.5, 0.2), "constant": (0.8, 0.125), "even": (0.9, 0.11), "qsgd": (0.7, 0.15)}
    rows = [
        {"contender": contender, "speed_vs_none": vs_none, "speed_vs_ddp": 0.2 / seconds, "step_seconds": seconds}
        for contender, (vs_none, seconds) in names.items()
    ]
    arguments = {"hosts": 2, "rate_mbit": 110.0, "model_parameters": 1000, "turns": 5, "timed_steps": 96}
    arguments["mean_period"] = 5.1
    content = {"command": ["python", "-m", "benchmarks.link"], "arguments": arguments, "rows": rows}
    (folder / FILES[name]).write_text(json.dumps(content))
