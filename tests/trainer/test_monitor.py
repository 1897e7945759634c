"""What the monitor logs, sums up, prints, keeps and draws."""

import contextlib
import io
from types import SimpleNamespace

import fsspec
import lightning.pytorch as pl
import matplotlib
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger
from matplotlib import pyplot
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_adpsgd import ADPSGDStrategy, AveragingRound, CommunicationMonitor
from tests.test_plot import RUN, SIZE, a_round, png_size

NAMES = ("variance", "variance_over_lr", "target", "period", "syncs", "sent_bytes", "sent_bytes_ddp", "round_seconds")
METRICS = {f"adpsgd/{name}" for name in NAMES}


class MemoryLogger(Logger):
    """A third-party logger: it has no directory, and keeps what it is given."""

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


# With a stand-in for a Trainer of four workers


def sgd(*sizes, frozen=(), dtype=torch.float32):
    parameters = [nn.Parameter(torch.zeros(size, dtype=dtype), requires_grad=size not in frozen) for size in sizes]
    return torch.optim.SGD(parameters, lr=0.1)


def started(monitor, **options):
    """A Trainer that ``monitor`` listens to."""
    listeners = []
    defaults = {
        "optimizers": [sgd(100)],
        "world_size": 4,
        "loggers": [MemoryLogger()],
        "global_step": 0,
        "is_global_zero": True,
        "strategy": SimpleNamespace(listeners=listeners, subscribe=listeners.append),
        "fast_dev_run": False,
        "log_dir": None,
        "default_root_dir": None,
    }
    trainer = SimpleNamespace(**{**defaults, **options})
    monitor.on_fit_start(trainer, None)
    return trainer


def emit(trainer, *rounds):
    """Emit rounds; the global step is ten times the round's own."""
    for round_ in rounds:
        trainer.global_step = 10 * round_.step
        for listener in trainer.strategy.listeners:
            listener(round_)


def run(monitor, *rounds, **options):
    trainer = started(monitor, **options)
    emit(trainer, *(rounds or RUN))
    return trainer


# What is logged


def test_every_round_is_logged_at_the_global_step_with_its_values_and_the_counts_so_far():
    (logger,) = run(CommunicationMonitor()).loggers
    rows = [
        (40, 0.02, 0.2, None, 4, 1, 660, 2400, 0.25),
        (80, 0.03, 0.3, 0.2, 4, 2, 1320, 4800, 0.25),
        (130, 0.0, 0.0, 0.25, 5, 3, 1980, 7800, 0.5),
        (150, 0.02, 0.2, 0.25, 6, 4, 2680, 9000, 1.0),
    ]
    assert logger.logged == [
        (step, {f"adpsgd/{name}": value for name, value in zip(NAMES, values, strict=True) if value is not None})
        for step, *values in rows
    ]


def test_every_logger_gets_every_round_under_the_prefix():
    loggers = [MemoryLogger(), MemoryLogger(), MemoryLogger()]
    run(CommunicationMonitor(prefix="local_sgd"), loggers=loggers)
    assert loggers[0].logged == loggers[1].logged == loggers[2].logged
    assert len(loggers[0].logged) == 4
    names = {name for _, metrics in loggers[0].logged for name in metrics}
    assert names == {f"local_sgd/{name}" for name in NAMES}


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


@pytest.mark.parametrize("options", [{"is_global_zero": False}, {"loggers": []}], ids=["other rank", "no logger"])
def test_rounds_are_recorded_where_nothing_is_logged(options):
    monitor = CommunicationMonitor()
    trainer = run(monitor, **options)
    assert monitor.rounds == list(RUN)
    assert all(logger.logged == [] for logger in trainer.loggers)


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
        (sgd(100, dtype=torch.bfloat16), 4, 300 * 15),
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
    emit(trainer, a_round(step=4, local_steps=4))
    optimizer.param_groups[0]["params"][1].requires_grad = False
    emit(trainer, a_round(step=10, local_steps=6))
    assert monitor.summary()["sent_bytes_ddp"] == 4 * 900 + 6 * 600


# The summary

SUMMARY = (
    *("rounds", "steps", "rounds_per_step", "first_period", "last_period", "sent_bytes", "sent_bytes_ddp"),
    *("factor_saved", "seconds", "transport", "dropped", "triggers"),
)


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        (RUN, (4, 15, 4 / 15, 4, 6, 2680, 9000, 9000 / 2680, 2.0, "at once", 0, {"period": 3, "train_end": 1})),
        ((), (0, 0, 0.0, None, None, 0, 0, None, 0, "at once", 0, {})),
    ],
    ids=["four rounds", "no round"],
)
def test_summary_is_the_one_computed_by_hand(rounds, expected):
    monitor = CommunicationMonitor()
    emit(started(monitor), *rounds)
    approximately = [pytest.approx(value) if isinstance(value, float) else value for value in expected]
    assert monitor.summary() == dict(zip(SUMMARY, approximately, strict=True))


def test_dropped_workers_are_counted_logged_and_shown_from_the_first_on(capsys):
    monitor = CommunicationMonitor()
    rounds = (a_round(), a_round(step=8, dropped=2), a_round(step=12), a_round(step=16, dropped=1))
    trainer = run(monitor, *rounds)
    (logger,) = trainer.loggers
    assert [metrics.get("adpsgd/dropped") for _, metrics in logger.logged] == [None, 2, 2, 3]
    assert monitor.summary()["dropped"] == 3
    monitor.on_fit_end(trainer, None)
    assert "dropped         3 time(s) a worker that had diverged" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    ("sent_bytes", "world_size", "line"),
    [
        (0, 1, "factor saved    nothing was sent"),
        (999, 4, "sent per rank   999 B"),
        (1_500_000, 4, "sent per rank   1.5 MB"),
        (2_000_000_000, 4, "sent per rank   2.0 GB"),
        (3e12, 4, "sent per rank   3.0 TB"),
    ],
)
def test_printed_bytes_have_a_unit_that_makes_them_readable(sent_bytes, world_size, line, capsys):
    monitor = CommunicationMonitor()
    monitor.on_fit_end(run(monitor, a_round(sent_bytes=sent_bytes), world_size=world_size), None)
    assert line in capsys.readouterr().out


def test_summary_has_the_transport_and_prints_it_unless_rounds_are_plain(capsys):
    monitor, listeners = CommunicationMonitor(), []
    strategy = SimpleNamespace(listeners=listeners, subscribe=listeners.append, transport="in bf16")
    monitor.on_fit_end(run(monitor, strategy=strategy), None)
    assert "rounds travel   in bf16" in capsys.readouterr().out
    assert monitor.summary()["transport"] == "in bf16"


@pytest.mark.parametrize(("rounds", "is_global_zero"), [((), True), (RUN, False)], ids=["no round", "other rank"])
def test_nothing_is_printed_or_drawn_without_rounds_or_on_other_ranks(rounds, is_global_zero, tmp_path, capsys):
    monitor = CommunicationMonitor(plot=True)
    trainer = started(monitor, is_global_zero=is_global_zero, log_dir=str(tmp_path))
    monitor.on_train_start(trainer, None)
    emit(trainer, *rounds)
    monitor.on_fit_end(trainer, None)
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


# The state


def restore(monitor, state):
    """Load a state as it comes out of a checkpoint file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    monitor.load_state_dict(torch.load(file, weights_only=True))


ALL_TRIGGERS = (*RUN, a_round(trigger="validation", dropped=2), a_round(trigger="checkpoint", optimizer=1))


@pytest.mark.parametrize("rounds", [ALL_TRIGGERS, ()], ids=["some rounds", "no round"])
def test_restored_monitor_has_the_same_rounds_and_summary(rounds):
    monitor, restored = CommunicationMonitor(), CommunicationMonitor()
    emit(started(monitor, optimizers=[sgd(9)] * 2), *rounds)
    restore(restored, monitor.state_dict())
    assert restored.rounds == monitor.rounds == list(rounds)
    assert all(isinstance(round_, AveragingRound) for round_ in restored.rounds)
    assert [list(map(type, round_)) for round_ in restored.rounds] == [list(map(type, r)) for r in monitor.rounds]
    assert restored.summary() == monitor.summary()


def test_counts_continue_from_a_restored_state_which_replaces_what_was_recorded_before():
    monitor, restored = CommunicationMonitor(), CommunicationMonitor()
    run(monitor, *RUN[:2])
    run(restored)
    restore(restored, monitor.state_dict())
    assert restored.summary() == monitor.summary()
    (logger,) = run(restored, *RUN[2:]).loggers
    names = ("syncs", "sent_bytes", "sent_bytes_ddp")
    assert [[metrics[f"adpsgd/{name}"] for name in names] for _, metrics in logger.logged] == [
        [3, 1980, 7800],
        [4, 2680, 9000],
    ]
    assert restored.rounds == list(RUN)


# What the constructor refuses


def test_plot_without_matplotlib_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr("lightning_adpsgd.plot.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"plot=True.*pip install matplotlib.*plot=False"):
        CommunicationMonitor(plot=True)
    CommunicationMonitor(plot=False)


# With a real Trainer, one process


class Tiny(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def training_step(self, batch):
        self.log_batch()
        return self.layer(batch[0]).square().mean()

    def log_batch(self):
        """Log the batch's number where its loss would be logged."""
        self.log("batch", float(self.trainer.fit_loop.epoch_loop.total_batch_idx + 1))

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
        self.log_batch()
        for optimizer, layer in zip(self.optimizers(), (self.layer, self.other), strict=True):
            optimizer.zero_grad()
            self.manual_backward(layer(batch[0]).square().mean())
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.layer, self.other)]


def loader(batches=10):
    return DataLoader(TensorDataset(torch.ones(2 * batches, 4)), batch_size=2)


def trainer_of(tmp_path, *callbacks, **options):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    defaults = {"strategy": ADPSGDStrategy(period=4), "max_epochs": 1, "default_root_dir": tmp_path, **quiet}
    return pl.Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), **{**defaults, **options})


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
    """Makes the CPU behave like a GPU: a round's measurements are read in the next step."""

    def on_train_start(self, trainer, pl_module):
        for local_sgd in trainer.strategy.local_sgd:
            local_sgd._engine._reads_later = True


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("late", [False, True], ids=["read at once", "read a step later"])
@pytest.mark.parametrize("model", [Tiny, TwoOptimizers])
def test_a_round_is_logged_at_the_step_at_which_the_loss_of_its_batch_is(tmp_path, model, late):
    monitor, memory = CommunicationMonitor(), MemoryLogger()
    callbacks = [monitor, ReadLater()] if late else [monitor]
    options = {"max_epochs": 2, "log_every_n_steps": 1, "val_check_interval": 6, "num_sanity_val_steps": 0}
    trainer_of(tmp_path, *callbacks, logger=memory, **options).fit(model(), loader(11), loader(1))
    where = {logged["batch"]: step for step, logged in memory.logged if "batch" in logged}
    validated = {step for step, logged in memory.logged if "val_loss" in logged}

    for optimizer in {round_.optimizer for round_ in monitor.rounds}:
        logged = [
            (round_, *entry)
            for round_, entry in zip(monitor.rounds, memory.rounds(), strict=True)
            if round_.optimizer == optimizer
        ]
        suffix = f"_{optimizer}" if model is TwoOptimizers else ""
        for _, _, metrics in logged:
            assert set(metrics) == {f"{name}{suffix}" for name in METRICS - {"adpsgd/target"}}
        own = [(round_.step, round_.trigger, step) for round_, step, _ in logged]
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
        assert own[-1][-1] == where[22] + 1  # after all batches


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
def test_history_of_a_fit_continues_after_a_checkpoint(tmp_path):
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
def test_fit_draws_its_plot_next_to_its_logs(tmp_path, logger, capsys):
    monitor = CommunicationMonitor(plot=True)
    logger = CSVLogger(tmp_path, name="logs") if logger else False
    trainer_of(tmp_path, monitor, logger=logger).fit(Tiny(), loader())
    folder = tmp_path / "logs" / "version_0" if logger else tmp_path
    assert png_size(folder / "adpsgd.png") == SIZE
    assert str(folder / "adpsgd.png") in capsys.readouterr().out


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


# A figure at any time


def test_plot_returns_the_figure_of_the_run_so_far_which_a_notebook_shows(tmp_path):
    monitor = CommunicationMonitor()
    run(monitor, *RUN[:2])
    figure = monitor.plot()
    assert figure.axes[0].get_title() == "2 averaging rounds in 8 steps"
    assert figure._repr_png_().startswith(b"\x89PNG")
    figure.savefig(tmp_path / "run.png", dpi=130)
    assert png_size(tmp_path / "run.png") == SIZE


def test_plot_leaves_pyplot_alone():
    monitor = CommunicationMonitor()
    run(monitor)
    before = (pyplot.get_fignums(), matplotlib.get_backend(), dict(matplotlib.rcParams))
    monitor.plot()
    assert (pyplot.get_fignums(), matplotlib.get_backend(), dict(matplotlib.rcParams)) == before


def test_plot_is_an_error_that_says_what_to_do_without_rounds_or_without_matplotlib(monkeypatch):
    monitor = CommunicationMonitor()
    with pytest.raises(ValueError, match=r"plot\(\) has nothing to draw.*after the first one"):
        monitor.plot()
    run(monitor)
    monkeypatch.setattr("lightning_adpsgd.plot.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"CommunicationMonitor.plot\(\).*pip install matplotlib"):
        monitor.plot()


@pytest.mark.usefixtures("alone")
def test_history_of_a_fit_is_kept_where_a_checkpoint_is_tested_or_validated(tmp_path):
    monitor = CommunicationMonitor()
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=4)
    trainer = trainer_of(tmp_path, monitor, saver, strategy=ADPSGDStrategy(3), enable_checkpointing=True)
    trainer.fit(Tiny(), loader())
    before = list(monitor.rounds)
    first = str(next(tmp_path.glob("*step=4.ckpt")))
    trainer.validate(Tiny(), loader(), ckpt_path=first)
    assert monitor.rounds == before
    trainer.fit_loop.epoch_loop.max_steps = 14
    trainer.fit(Tiny(), loader(), ckpt_path=first)
    assert [round_.step for round_ in monitor.rounds][:3] == [3, 4, 7]


@pytest.mark.usefixtures("alone")
def test_several_monitors_have_a_history_each_in_a_checkpoint(tmp_path):
    def run(path=None):
        monitors = [CommunicationMonitor(progress_bar=True), CommunicationMonitor("second", progress_bar=True)]
        saver, bar = ModelCheckpoint(tmp_path, filename="last"), Bar()
        options = {
            "enable_checkpointing": True,
            "enable_progress_bar": True,
            "max_steps": 10 if path is None else 12,
            "max_epochs": 2,
        }
        trainer = trainer_of(tmp_path, *monitors, saver, bar, strategy=ADPSGDStrategy(2), **options)
        trainer.fit(Tiny(), loader(), ckpt_path=path)
        assert bar.shown[-1] == {"adpsgd": "period 2, 0 B saved", "second": "period 2, 0 B saved"}
        assert "get_metrics" not in vars(bar)
        return [[round_.step for round_ in monitor.rounds] for monitor in monitors]

    assert run() == [[2, 4, 6, 8, 10]] * 2
    first, second = run(str(tmp_path / "last.ckpt"))
    assert first == second
    assert first[:5] == [2, 4, 6, 8, 10]
    assert len(first) == 6


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside the default one"])
def test_history_that_version_0_1_saved_under_another_prefix_continues(tmp_path, beside):
    monitor = CommunicationMonitor("mine")
    trainer = SimpleNamespace(callbacks=[monitor, *([CommunicationMonitor()] if beside else [])])
    former = CommunicationMonitor()
    former._add(a_round(), 2400)
    monitor.on_load_checkpoint(trainer, None, {"callbacks": {"CommunicationMonitor": former.state_dict()}})
    assert monitor.rounds == ([] if beside else [a_round()])


@pytest.mark.usefixtures("alone")
def test_plot_that_cannot_be_written_is_warned_of_and_does_not_fail_the_fit(tmp_path):
    (tmp_path / "adpsgd.png").mkdir()
    trainer = trainer_of(tmp_path, CommunicationMonitor(plot=True), strategy=ADPSGDStrategy(2))
    with pytest.warns(UserWarning, match=r"could not be written to .*adpsgd\.png .*The run is not affected"):
        trainer.fit(Tiny(), loader())
    assert trainer.state.finished


# The progress bar's entry


class Bar(ProgressBar):
    """Keeps what it would show after each step."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def disable(self):
        pass

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.shown.append(self.get_metrics(trainer, pl_module))


@pytest.mark.usefixtures("alone")
def test_progress_bar_shows_the_latest_period_and_the_bytes_saved_and_loggers_do_not(tmp_path):
    bar, memory = Bar(), MemoryLogger()
    monitor = CommunicationMonitor(progress_bar=True)
    strategy = ADPSGDStrategy(4)
    trainer = trainer_of(tmp_path, monitor, bar, strategy=strategy, logger=memory, enable_progress_bar=True)
    trainer.fit(Tiny(), loader())
    before, after = {"v_num": 0}, {"v_num": 0, "adpsgd": "period 4, 0 B saved"}
    assert bar.shown == [before] * 3 + [after] * 7
    assert "get_metrics" not in vars(bar)  # as it was, once training has ended
    assert {name for _, metrics in memory.logged for name in metrics} == METRICS - {"adpsgd/target"}
    assert set(trainer.callback_metrics) == {"batch"}  # the module's own


@pytest.mark.parametrize(
    ("rounds", "optimizers", "told"),
    [
        (RUN, 1, "period 6, 6.3 kB saved"),
        ((a_round(sent_bytes=5000),), 1, "period 4, 2.6 kB more than DDP"),
        ((a_round(), a_round(optimizer=1, period=9)), 2, "period 4, 9, 3.5 kB saved"),
        ((), 1, ""),
    ],
    ids=["a run", "more than DDP", "two optimizers", "no round"],
)
def test_progress_bar_entry_is_the_one_computed_by_hand(rounds, optimizers, told):
    monitor = CommunicationMonitor(progress_bar=True)
    emit(started(monitor, optimizers=[sgd(100)] * optimizers), *rounds)
    assert monitor.in_brief() == told


class Stops(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 5:
            raise ValueError("a bad sample")


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("fails", [False, True], ids=["to its end", "until an error"])
@pytest.mark.parametrize("own", [False, True], ids=["the bar's method", "a method of the user's on this bar"])
def test_progress_bar_is_as_it_was_after_training(tmp_path, fails, own):
    bar = Bar()
    method = bar.get_metrics
    if own:
        bar.get_metrics = lambda *_: {"mine": 1}
        method = bar.get_metrics
    callbacks = [CommunicationMonitor(progress_bar=True), bar, *([Stops()] if fails else [])]
    trainer = trainer_of(tmp_path, *callbacks, strategy=ADPSGDStrategy(2), enable_progress_bar=True)
    with pytest.raises(ValueError, match="a bad sample") if fails else contextlib.nullcontext():
        trainer.fit(Tiny(), loader())
    base = {"mine": 1} if own else {}
    assert bar.shown[0] == base
    assert bar.shown[3] == {**base, "adpsgd": "period 2, 0 B saved"}
    assert bar.get_metrics == method
    assert ("get_metrics" in vars(bar)) == own


@pytest.mark.usefixtures("alone")
def test_progress_bar_is_left_alone_unless_asked_for(tmp_path):
    bar = Bar()
    trainer_of(tmp_path, CommunicationMonitor(), bar, enable_progress_bar=True).fit(Tiny(), loader())
    assert all("adpsgd" not in shown for shown in bar.shown)
