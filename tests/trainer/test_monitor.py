import io
import struct
import warnings
from dataclasses import dataclass, field
from typing import Any

import fsspec
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_adpsgd.trainer.monitor
from lightning_adpsgd import ADPSGDStrategy, AveragingRound, CommunicationMonitor
from lightning_adpsgd.trainer.monitor import draw

METRICS = {
    "adpsgd/variance",
    "adpsgd/variance_over_lr",
    "adpsgd/target",
    "adpsgd/period",
    "adpsgd/syncs",
    "adpsgd/sent_bytes",
    "adpsgd/sent_bytes_ddp",
    "adpsgd/round_seconds",
}


# Stand-ins for a Trainer of four workers


@dataclass
class FakeStrategy:
    listeners: list = field(default_factory=list)

    def subscribe(self, listener):
        self.listeners.append(listener)


@dataclass
class FakeLogger:
    logged: list = field(default_factory=list)

    def log_metrics(self, metrics, step):
        self.logged.append((step, dict(metrics)))


def sgd(*sizes, frozen=()):
    parameters = [nn.Parameter(torch.zeros(size), requires_grad=size not in frozen) for size in sizes]
    return torch.optim.SGD(parameters, lr=0.1)


@dataclass
class FakeTrainer:
    optimizers: list = field(default_factory=lambda: [sgd(100)])
    world_size: int = 4
    loggers: list = field(default_factory=lambda: [FakeLogger()])
    global_step: int = 0
    is_global_zero: bool = True
    strategy: Any = field(default_factory=FakeStrategy)
    fast_dev_run: bool = False
    log_dir: Any = None
    default_root_dir: Any = None


def started(monitor, **options):
    """A Trainer that ``monitor`` listens to."""
    trainer = FakeTrainer(**options)
    monitor.on_fit_start(trainer, None)
    return trainer


def happen(trainer, *rounds):
    """Rounds happen, each at the global step that is its own."""
    for round_ in rounds:
        trainer.global_step = round_.step
        for listener in trainer.strategy.listeners:
            listener(round_)


def a_round(**fields):
    defaults = {
        "step": 4,
        "optimizer": 0,
        "trigger": "period",
        "local_steps": 4,
        "period": 4,
        "learning_rate": 0.1,
        "variance": 0.02,
        "ratio": 0.2,
        "target": None,
        "payload_bytes": 440,
        "sent_bytes": 660,
        "seconds": 0.25,
    }
    return AveragingRound(**{**defaults, **fields})


# A run of three rounds of 100 fp32 parameters on four workers, DDP would send 2·3/4·400 = 600 bytes per step
RUN = (
    a_round(),
    a_round(step=8, variance=0.03, ratio=0.3, target=0.2),
    a_round(step=13, local_steps=5, period=5, variance=0.0, ratio=0.0, target=0.25, seconds=0.5),
    a_round(step=15, local_steps=2, period=6, trigger="train_end", target=0.25, sent_bytes=700, seconds=1.0),
)


def run(monitor, *rounds, **options):
    trainer = started(monitor, **options)
    happen(trainer, *(rounds or RUN))
    return trainer


# What is logged


def test_logged_names_are_those_of_the_contract_and_the_target_is_absent_until_sampled():
    (logger,) = run(CommunicationMonitor()).loggers
    assert set(logger.logged[0][1]) == METRICS - {"adpsgd/target"}
    assert [set(metrics) for _, metrics in logger.logged[1:]] == [METRICS] * 3


def test_logged_values_are_those_of_the_round_and_counts_add_up():
    (logger,) = run(CommunicationMonitor()).loggers
    assert logger.logged[0][1] == {
        "adpsgd/variance": 0.02,
        "adpsgd/variance_over_lr": 0.2,
        "adpsgd/period": 4,
        "adpsgd/syncs": 1,
        "adpsgd/sent_bytes": 660,
        "adpsgd/sent_bytes_ddp": 2400,
        "adpsgd/round_seconds": 0.25,
    }
    assert logger.logged[3][1] == {
        "adpsgd/variance": 0.02,
        "adpsgd/variance_over_lr": 0.2,
        "adpsgd/target": 0.25,
        "adpsgd/period": 6,
        "adpsgd/syncs": 4,
        "adpsgd/sent_bytes": 2680,
        "adpsgd/sent_bytes_ddp": 9000,
        "adpsgd/round_seconds": 1.0,
    }


def test_step_of_a_log_entry_is_the_trainers_global_step():
    monitor = CommunicationMonitor()
    trainer = started(monitor)
    for round_, global_step in ((RUN[0], 3), (RUN[1], 70)):
        trainer.global_step = global_step
        trainer.strategy.listeners[0](round_)
    assert [step for step, _ in trainer.loggers[0].logged] == [3, 70]


def test_every_logger_gets_every_round():
    loggers = [FakeLogger(), FakeLogger(), FakeLogger()]
    run(CommunicationMonitor(), loggers=loggers)
    assert [len(logger.logged) for logger in loggers] == [4, 4, 4]
    assert loggers[0].logged == loggers[1].logged == loggers[2].logged


def test_prefix_is_what_every_name_begins_with():
    (logger,) = run(CommunicationMonitor(prefix="local_sgd")).loggers
    names = {name for _, metrics in logger.logged for name in metrics}
    assert names == {name.replace("adpsgd/", "local_sgd/") for name in METRICS}


def test_optimizers_index_is_appended_if_there_are_several_and_each_has_its_own_counts():
    rounds = (
        a_round(step=4, optimizer=0),
        a_round(step=4, optimizer=1, sent_bytes=70, target=0.5),
        a_round(step=8, optimizer=1, sent_bytes=70, target=0.5),
    )
    (logger,) = run(CommunicationMonitor(), *rounds, optimizers=[sgd(100), sgd(10)]).loggers
    assert set(logger.logged[0][1]) == {f"{name}_0" for name in METRICS - {"adpsgd/target"}}
    assert set(logger.logged[1][1]) == set(logger.logged[2][1]) == {f"{name}_1" for name in METRICS}
    names = ("syncs", "sent_bytes", "sent_bytes_ddp")
    assert [logger.logged[0][1][f"adpsgd/{name}_0"] for name in names] == [1, 660, 2400]
    assert [logger.logged[2][1][f"adpsgd/{name}_1"] for name in names] == [2, 140, 480]


def test_rounds_are_recorded_on_every_rank_and_logged_on_the_first():
    monitor = CommunicationMonitor()
    trainer = run(monitor, is_global_zero=False)
    assert trainer.loggers[0].logged == []
    assert monitor.rounds == list(RUN)


def test_rounds_are_recorded_without_a_logger():
    monitor = CommunicationMonitor()
    run(monitor, loggers=[])
    assert monitor.rounds == list(RUN)


# What DDP would have sent


def sgd_of_two_groups():
    optimizer = sgd(60)
    optimizer.add_param_group({"params": sgd(40).param_groups[0]["params"], "lr": 1.0})
    return optimizer


@pytest.mark.parametrize(
    ("optimizer", "world_size", "expected"),
    [
        (sgd(100), 4, 600 * 15),
        (sgd(100), 2, 400 * 15),
        (sgd(100), 1, 0),
        (sgd(100, 50), 4, 900 * 15),
        (sgd(100, 50, frozen=(50,)), 4, 600 * 15),
        (torch.optim.SGD([nn.Parameter(torch.zeros(100, dtype=torch.bfloat16))], lr=0.1), 4, 300 * 15),
        (sgd_of_two_groups(), 4, 600 * 15),
    ],
    ids=["4 workers", "2 workers", "1 worker", "2 tensors", "frozen", "16 bit", "2 groups"],
)
def test_ddp_would_send_a_ring_all_reduce_of_the_trainable_gradients_per_step(optimizer, world_size, expected):
    monitor = CommunicationMonitor()
    run(monitor, optimizers=[optimizer], world_size=world_size)
    assert monitor.summary()["sent_bytes_ddp"] == expected


def test_parameters_frozen_in_mid_training_count_for_the_steps_before():
    optimizer = sgd(100, 50)
    monitor = CommunicationMonitor()
    trainer = started(monitor, optimizers=[optimizer])
    happen(trainer, a_round(step=4, local_steps=4))
    optimizer.param_groups[0]["params"][1].requires_grad = False
    happen(trainer, a_round(step=10, local_steps=6))
    assert monitor.summary()["sent_bytes_ddp"] == 4 * 900 + 6 * 600


# The summary


def test_summary_is_the_one_computed_by_hand():
    monitor = CommunicationMonitor()
    run(monitor)
    assert monitor.summary() == {
        "rounds": 4,
        "steps": 15,
        "rounds_per_step": pytest.approx(4 / 15),
        "first_period": 4,
        "last_period": 6,
        "sent_bytes": 2680,
        "sent_bytes_ddp": 9000,
        "factor_saved": pytest.approx(9000 / 2680),
        "seconds": pytest.approx(2.0),
        "transport": "at once",
        "dropped": 0,
        "triggers": {"period": 3, "train_end": 1},
    }


def test_summary_of_no_rounds_is_all_zeros():
    assert CommunicationMonitor().summary() == {
        "rounds": 0,
        "steps": 0,
        "rounds_per_step": 0.0,
        "first_period": None,
        "last_period": None,
        "sent_bytes": 0,
        "sent_bytes_ddp": 0,
        "factor_saved": None,
        "seconds": 0,
        "transport": "at once",
        "dropped": 0,
        "triggers": {},
    }


def test_dropped_workers_are_counted_logged_and_told_from_the_first_on(capsys):
    monitor = CommunicationMonitor()
    rounds = (a_round(), a_round(step=8, dropped=2), a_round(step=12), a_round(step=16, dropped=1))
    trainer = run(monitor, *rounds)
    (logger,) = trainer.loggers
    assert [metrics.get("adpsgd/dropped") for _, metrics in logger.logged] == [None, 2, 2, 3]
    assert monitor.summary()["dropped"] == 3
    monitor.on_fit_end(trainer, None)
    assert "dropped         3 time(s) a worker that had diverged" in capsys.readouterr().out
    resumed = CommunicationMonitor()
    resumed.load_state_dict(monitor.state_dict())
    assert resumed.rounds == monitor.rounds


def test_summary_adds_up_all_optimizers_and_tells_the_periods_of_the_first():
    rounds = (a_round(optimizer=1, period=9), a_round(period=4), a_round(period=5), a_round(optimizer=1, period=8))
    monitor = CommunicationMonitor()
    run(monitor, *rounds, optimizers=[sgd(100), sgd(10)])
    summary = monitor.summary()
    assert (summary["rounds"], summary["steps"]) == (4, 16)
    assert (summary["first_period"], summary["last_period"]) == (4, 5)
    assert summary["sent_bytes"] == 4 * 660
    assert summary["sent_bytes_ddp"] == 2 * 4 * 600 + 2 * 4 * 60


def test_printed_summary_tells_rounds_share_periods_bytes_factor_seconds_and_triggers(capsys):
    monitor = CommunicationMonitor()
    monitor.on_fit_end(run(monitor), None)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.strip().splitlines()]
    assert lines == [
        "Averaging rounds",
        "rounds 4 in 15 steps (26.7%): period 3, train_end 1",
        "period 4 at first, 6 at last",
        "sent per rank 2.7 kB",
        "DDP would have 9.0 kB",
        "factor saved 3.4x",
        "held up for 2.00 s",
    ]


def test_printed_summary_says_so_if_nothing_was_sent(capsys):
    monitor = CommunicationMonitor()
    monitor.on_fit_end(run(monitor, a_round(sent_bytes=0, payload_bytes=0), world_size=1), None)
    assert "nothing was sent" in capsys.readouterr().out


@pytest.mark.parametrize("sent", [(999, "999 B"), (1_500_000, "1.5 MB"), (2_000_000_000, "2.0 GB"), (3e12, "3.0 TB")])
def test_printed_bytes_have_a_unit_that_makes_them_readable(sent, capsys):
    monitor = CommunicationMonitor()
    monitor.on_fit_end(run(monitor, a_round(sent_bytes=sent[0])), None)
    assert sent[1] in capsys.readouterr().out


@pytest.mark.parametrize(("rounds", "is_global_zero"), [((), True), (RUN, False)])
def test_nothing_is_printed_without_rounds_or_on_other_ranks(rounds, is_global_zero, capsys):
    monitor = CommunicationMonitor()
    trainer = started(monitor, is_global_zero=is_global_zero)
    happen(trainer, *rounds)
    monitor.on_fit_end(trainer, None)
    assert capsys.readouterr().out == ""


# The state


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_restored_monitor_has_the_same_rounds_and_summary():
    monitor, restored = CommunicationMonitor(), CommunicationMonitor()
    run(
        monitor,
        *RUN,
        a_round(trigger="validation"),
        a_round(trigger="checkpoint", optimizer=1),
        optimizers=[sgd(9)] * 2,
    )
    restored.load_state_dict(through_a_file(monitor.state_dict()))
    assert restored.rounds == monitor.rounds
    assert all(isinstance(round_, AveragingRound) for round_ in restored.rounds)
    assert [list(map(type, round_)) for round_ in restored.rounds] == [list(map(type, r)) for r in monitor.rounds]
    assert restored.summary() == monitor.summary()


def test_counts_go_on_after_a_restored_state():
    monitor, restored = CommunicationMonitor(), CommunicationMonitor()
    run(monitor, *RUN[:2], loggers=[])
    restored.load_state_dict(through_a_file(monitor.state_dict()))
    (logger,) = run(restored, *RUN[2:]).loggers
    names = ("syncs", "sent_bytes", "sent_bytes_ddp")
    assert [[metrics[f"adpsgd/{name}"] for name in names] for _, metrics in logger.logged] == [
        [3, 1980, 7800],
        [4, 2680, 9000],
    ]
    assert restored.rounds == list(RUN)


def test_restoring_replaces_what_was_recorded_before():
    monitor, restored = CommunicationMonitor(), CommunicationMonitor()
    run(monitor, *RUN[:2])
    trainer = run(restored)
    restored.load_state_dict(through_a_file(monitor.state_dict()))
    assert restored.rounds == list(RUN[:2])
    assert restored.summary() == monitor.summary()
    happen(trainer, RUN[2])
    assert trainer.loggers[0].logged[-1][1]["adpsgd/syncs"] == 3
    assert trainer.loggers[0].logged[-1][1]["adpsgd/sent_bytes"] == 3 * 660


def test_state_of_no_rounds_can_be_restored():
    restored = CommunicationMonitor()
    restored.load_state_dict(through_a_file(CommunicationMonitor().state_dict()))
    assert restored.rounds == []
    assert restored.summary() == CommunicationMonitor().summary()


# The plot

SIZE = (1170, 845)  # one optimizer's


def png_size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", content[16:24])


HISTORIES = {
    "adaptive": RUN,
    "without target": (a_round(), a_round(step=8), a_round(step=12)),
    "zero variance": [round_._replace(variance=0.0, ratio=0.0, target=0.0) for round_ in RUN],
    "forced rounds only": [round_._replace(trigger="validation") for round_ in RUN],
    "forced rounds only, none sampled": [round_._replace(trigger="train_end", target=None) for round_ in RUN],
    "one round": RUN[:1],
    "every rate zero": [round_._replace(learning_rate=0.0, ratio=0.0) for round_ in RUN],
}


@pytest.mark.parametrize("rounds", HISTORIES.values(), ids=HISTORIES)
def test_plot_of_any_history_is_a_picture_drawn_without_a_warning(rounds, tmp_path):
    path = tmp_path / "new folder" / "plot.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(list(rounds), path)
    assert png_size(path) == SIZE
    assert imread(path).std() > 0.05  # not a blank page


def test_two_optimizers_are_drawn_side_by_side(tmp_path):
    draw([*RUN, *(round_._replace(optimizer=1, period=9) for round_ in RUN)], tmp_path / "two.png")
    assert png_size(tmp_path / "two.png") == (2 * SIZE[0], SIZE[1])


def drawn(monkeypatch, rounds):
    """The lines of the figure, by label, for each pair of axes."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *arguments, **options: figures.append(self))
    draw(rounds, "memory://nowhere.png")
    (figure,) = figures
    return [
        {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
        for axes in figure.axes
    ]


def test_plot_shows_the_period_the_rounds_the_variance_its_target_and_the_rate(monkeypatch):
    lines = {label: line for axes in drawn(monkeypatch, RUN) for label, line in axes.items()}
    assert lines == {
        "averaging period p": ([4, 8, 13, 15], [4, 4, 5, 6]),
        "averaging rounds so far": ([4, 8, 13, 15], [1, 2, 3, 4]),
        "variance $S_k$": ([4, 8], [0.02, 0.03]),
        "$S_k$, other rounds": ([15], [0.02]),
        r"$\gamma_k C_2$": ([8, 13, 15], [pytest.approx(0.02), pytest.approx(0.025), pytest.approx(0.025)]),
        r"learning rate $\gamma_k$": ([4, 8, 13, 15], [0.1] * 4),
    }


def test_plot_of_two_optimizers_keeps_their_rounds_apart(monkeypatch):
    rounds = [RUN[0], RUN[1]._replace(optimizer=1, period=9), RUN[2], RUN[3]._replace(optimizer=1, period=10)]
    periods = [axes["averaging period p"] for axes in drawn(monkeypatch, rounds) if "averaging period p" in axes]
    assert periods == [([4, 13], [4, 5]), ([8, 15], [9, 10])]


def test_plot_is_drawn_into_the_log_directory_under_the_prefixs_name(tmp_path, capsys):
    monitor = CommunicationMonitor(prefix="rounds", plot=True)
    trainer = started(monitor, log_dir=str(tmp_path / "version_3"))
    monitor.on_train_start(trainer, None)
    happen(trainer, *RUN)
    monitor.on_fit_end(trainer, None)
    assert png_size(tmp_path / "version_3" / "rounds.png") == SIZE
    assert str(tmp_path / "version_3" / "rounds.png") in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"is_global_zero": False}, {"fast_dev_run": True}])
def test_plot_is_not_drawn_on_other_ranks_or_in_a_fast_dev_run(options, tmp_path):
    monitor = CommunicationMonitor(plot=True)
    trainer = started(monitor, log_dir=str(tmp_path), **options)
    monitor.on_train_start(trainer, None)
    happen(trainer, *RUN)
    monitor.on_fit_end(trainer, None)
    assert list(tmp_path.iterdir()) == []


# What the constructor refuses


@pytest.mark.parametrize("prefix", [None, 3, True, b"adpsgd", ["adpsgd"]])
def test_prefix_that_is_no_string_is_named_with_its_value(prefix):
    with pytest.raises(TypeError, match="expected a str") as caught:
        CommunicationMonitor(prefix=prefix)
    assert f"CommunicationMonitor(prefix={prefix!r})" in str(caught.value)
    assert type(prefix).__name__ in str(caught.value)


def test_empty_prefix_is_refused():
    with pytest.raises(ValueError, match=r"CommunicationMonitor\(prefix=''\): expected a name"):
        CommunicationMonitor(prefix="")


def test_plot_without_matplotlib_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(lightning_adpsgd.trainer.monitor, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"plot=True.*pip install matplotlib.*plot=False"):
        CommunicationMonitor(plot=True)
    assert CommunicationMonitor(plot=False).plot is False


# Under a real Trainer, one process


class Tiny(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def training_step(self, batch):
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch):
        self.log("val_loss", self.layer(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TwoOptimizers(Tiny):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(4, 2)

    def training_step(self, batch):
        for optimizer, layer in zip(self.optimizers(), (self.layer, self.other), strict=True):
            optimizer.zero_grad()
            self.manual_backward(layer(batch[0]).square().mean())
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.layer, self.other)]


class MemoryLogger(Logger):
    """A logger of somebody else's: knows no directory, keeps what it is given."""

    name, version = "memory", 0

    def __init__(self):
        super().__init__()
        self.logged = []

    def log_metrics(self, metrics, step=None):
        self.logged.append((step, dict(metrics)))

    def log_hyperparams(self, *arguments, **options):
        pass

    def rounds(self):
        return [(step, metrics) for step, metrics in self.logged if any(name.startswith("adpsgd/") for name in metrics)]


def loader(batches=10):
    return DataLoader(TensorDataset(torch.ones(2 * batches, 4)), batch_size=2)


def trainer_of(tmp_path, *callbacks, **options):
    defaults = {
        "strategy": ADPSGDStrategy(period=4),
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "default_root_dir": tmp_path,
    }
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**defaults, **options},
    )


@pytest.mark.usefixtures("alone")
def test_rounds_of_a_fit_reach_all_loggers_under_the_contracts_names(tmp_path, capsys):
    monitor, memory = CommunicationMonitor(), MemoryLogger()
    trainer = trainer_of(tmp_path, monitor, strategy="adpsgd", logger=[memory, CSVLogger(tmp_path)])
    trainer.fit(Tiny(), loader())

    assert [(r.step, r.trigger, r.period) for r in monitor.rounds] == [
        (4, "period", 4),
        (8, "period", 4),
        (10, "train_end", 4),
    ]
    first, *others = [set(metrics) for _, metrics in memory.rounds()]
    assert first == METRICS - {"adpsgd/target"}
    assert others == [METRICS] * 2
    assert [metrics["adpsgd/syncs"] for _, metrics in memory.rounds()] == [1, 2, 3]
    assert all(metrics["adpsgd/sent_bytes"] == metrics["adpsgd/sent_bytes_ddp"] == 0 for _, metrics in memory.rounds())

    header = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert set(header) >= METRICS
    printed = capsys.readouterr().out
    assert "3 in 10 steps (30.0%): period 2, train_end 1" in printed
    assert "nothing was sent" in printed


class ReadLater(pl.Callback):
    """Makes of the CPU what a GPU is: the numbers of a round are read in the next step."""

    def on_train_start(self, trainer, pl_module):
        for local_sgd in trainer.strategy.local_sgd:
            local_sgd._engine._reads_later = True


class Losses:
    """Logs the loss of every batch, and the batch's number."""

    def training_step(self, batch):
        self.log("batch", float(self.trainer.fit_loop.epoch_loop.total_batch_idx + 1))
        return super().training_step(batch)


class TinyLogged(Losses, Tiny):
    pass


class TwoOptimizersLogged(Losses, TwoOptimizers):
    pass


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("late", [False, True], ids=["read at once", "read a step later"])
@pytest.mark.parametrize("model", [TinyLogged, TwoOptimizersLogged])
def test_a_round_is_logged_at_the_step_at_which_the_loss_of_its_batch_is(tmp_path, model, late):
    monitor, memory = CommunicationMonitor(), MemoryLogger()
    callbacks = [monitor, ReadLater()] if late else [monitor]
    options = {"max_epochs": 2, "log_every_n_steps": 1, "val_check_interval": 6, "num_sanity_val_steps": 0}
    trainer_of(tmp_path, *callbacks, logger=memory, **options).fit(model(), loader(11), loader(1))
    where = {logged["batch"]: step for step, logged in memory.logged if "batch" in logged}
    validated = {step for step, logged in memory.logged if "val_loss" in logged}

    for optimizer in {round_.optimizer for round_ in monitor.rounds}:
        own = [
            (round_.step, round_.trigger, step)
            for round_, (step, _) in zip(monitor.rounds, memory.rounds(), strict=True)
            if round_.optimizer == optimizer
        ]
        assert [(step, trigger) for step, trigger, _ in own] == [
            (4, "period"),
            (6, "validation"),
            (10, "period"),
            (14, "period"),
            (17, "validation"),
            (21, "period"),
            (22, "train_end"),
        ]
        for step, trigger, logged_at in own[:-1]:
            assert logged_at == where[step]  # the step of an optimizer is the number of the batch
            assert trigger != "validation" or logged_at in validated
        assert own[-1][-1] == where[22] + 1  # when all batches had been


@pytest.mark.usefixtures("alone")
def test_fit_with_two_optimizers_logs_each_under_its_index(tmp_path):
    monitor, memory = CommunicationMonitor(), MemoryLogger()
    trainer_of(tmp_path, monitor, logger=memory).fit(TwoOptimizers(), loader(5))
    assert [(r.step, r.optimizer, r.trigger) for r in monitor.rounds] == [
        (4, 0, "period"),
        (4, 1, "period"),
        (5, 0, "train_end"),
        (5, 1, "train_end"),
    ]
    for round_, (_, metrics) in zip(monitor.rounds, memory.rounds(), strict=True):
        assert set(metrics) == {f"{name}_{round_.optimizer}" for name in METRICS - {"adpsgd/target"}}


@pytest.mark.usefixtures("alone")
def test_validation_and_checkpoint_rounds_of_a_fit_are_told_apart(tmp_path):
    monitor = CommunicationMonitor()
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=9)
    options = {"val_check_interval": 6, "num_sanity_val_steps": 0, "enable_checkpointing": True}
    trainer_of(tmp_path, monitor, saver, **options).fit(Tiny(), loader(), loader(1))
    assert [(r.step, r.trigger) for r in monitor.rounds] == [
        (4, "period"),
        (6, "validation"),
        (9, "checkpoint"),
        (10, "train_end"),
    ]
    assert monitor.summary()["triggers"] == {"period": 1, "validation": 1, "checkpoint": 1, "train_end": 1}


@pytest.mark.usefixtures("alone")
def test_history_of_a_fit_goes_on_after_a_checkpoint(tmp_path):
    first = CommunicationMonitor()
    trainer = trainer_of(tmp_path, first, max_steps=6, max_epochs=-1)
    trainer.fit(Tiny(), loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")

    second, memory = CommunicationMonitor(), MemoryLogger()
    trainer = trainer_of(tmp_path, second, max_steps=12, max_epochs=-1, logger=memory)
    trainer.fit(Tiny(), loader(), ckpt_path=tmp_path / "half.ckpt")
    assert second.rounds[: len(first.rounds)] == first.rounds
    assert [(r.step, r.trigger) for r in second.rounds] == [
        (4, "period"),
        (6, "train_end"),
        (10, "period"),
        (12, "train_end"),
    ]
    assert [metrics["adpsgd/syncs"] for _, metrics in memory.rounds()] == [3, 4]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("logger", [True, False])
def test_fit_draws_its_plot_next_to_its_logs(tmp_path, logger):
    monitor = CommunicationMonitor(plot=True)
    logger = CSVLogger(tmp_path, name="logs") if logger else False
    trainer_of(tmp_path, monitor, logger=logger).fit(Tiny(), loader())
    folder = tmp_path / "logs" / "version_0" if logger else tmp_path
    assert png_size(folder / "adpsgd.png") == SIZE


@pytest.mark.usefixtures("alone")
def test_fit_draws_its_plot_where_its_logs_are_in_any_file_system(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monitor = CommunicationMonitor(prefix="train/adpsgd", plot=True)
    trainer_of(tmp_path, monitor, default_root_dir="memory://runs/first").fit(Tiny(), loader())
    files = fsspec.filesystem("memory")
    assert files.cat_file("/runs/first/train/adpsgd.png").startswith(b"\x89PNG\r\n\x1a\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("alone")
def test_fast_dev_run_with_a_plot_runs_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monitor = CommunicationMonitor(plot=True)
    trainer_of(tmp_path, monitor, fast_dev_run=3, max_epochs=None, logger=True).fit(Tiny(), loader())
    assert [(r.step, r.trigger) for r in monitor.rounds] == [(3, "train_end")]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("alone")
def test_monitor_under_another_strategy_warns_and_records_nothing(tmp_path, capsys):
    monitor = CommunicationMonitor(plot=True)
    trainer = trainer_of(tmp_path, monitor, strategy="auto")
    with pytest.warns(UserWarning, match=r'nothing to record: SingleDeviceStrategy.*strategy="adpsgd"'):
        trainer.fit(Tiny(), loader())
    assert trainer.global_step == 10
    assert monitor.rounds == []
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("alone")
def test_fit_with_a_monitor_logs_nothing_between_rounds(tmp_path):
    memory = MemoryLogger()
    trainer_of(tmp_path, CommunicationMonitor(), logger=memory).fit(Tiny(), loader(3))
    assert [metrics["adpsgd/syncs"] for _, metrics in memory.rounds()] == [1]
