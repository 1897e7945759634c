"""What crossed the network and why, for Fabric's loggers."""

from typing import Any

from lightning_adpsgd.history import RoundHistory
from lightning_adpsgd.rounds.record import AveragingRound

from .family import Fabric, rank_zero_warn


class CommunicationMonitor(RoundHistory):
    """A callback of Fabric's: logs every averaging round to its loggers, and passes it on to other callbacks.

    Given as ``Fabric(callbacks=[CommunicationMonitor()])``, it hears the rounds from ``fabric.setup`` on. The names of
    what it logs are those of :class:`lightning_adpsgd.CommunicationMonitor`; the step is the optimizer's. It calls
    ``on_averaging_round(averaging_round)`` of all callbacks that have one, with an
    :class:`~lightning_adpsgd.AveragingRound`. ``fabric.call("on_train_end")`` prints the summary and draws the plot.

    Args:
        prefix: what the names begin with, and what the plot's file is called.
        plot: whether to draw ``<prefix>.png`` into the first logger's folder, or else the working directory. Needs
            matplotlib.

    Raises:
        TypeError, ValueError, ModuleNotFoundError: as for :class:`lightning_adpsgd.CommunicationMonitor`.
    """

    def __init__(self, prefix: str = "adpsgd", plot: bool = False) -> None:
        super().__init__(prefix, plot)
        self._fabric: Fabric | None = None
        self._warned = False

    def on_after_setup(self, fabric: Fabric, module: Any) -> None:
        """Hear of the rounds, from the first ``fabric.setup`` on."""
        if self._fabric is fabric:
            return
        if self._listen(fabric.strategy, self._on_round, "Fabric"):
            self._fabric = fabric
        else:
            self._warned = True

    def on_after_optimizer_step(self, strategy: Any, optimizer: Any) -> None:
        """Warn if the rounds go by unheard: ``fabric.setup_module`` tells callbacks nothing."""
        if self._fabric is None and not self._warned:
            self._warned = True
            rank_zero_warn(
                "CommunicationMonitor records nothing: fabric.setup_module and fabric.setup_optimizers do not tell"
                " callbacks of the set-up, as fabric.setup does. Add this line after them:"
                ' fabric.call("on_after_setup", fabric=fabric, module=model).'
            )

    def on_train_end(self) -> None:
        """Print the summary, and draw the plot."""
        if self._fabric is None or not self._fabric.is_global_zero or not self.rounds:
            return
        path = None
        if self._plots_at_the_end:
            folders = [getattr(logger, "log_dir", None) or logger.root_dir for logger in self._fabric.loggers]
            path = f"{str(next(filter(None, folders), '.')).rstrip('/')}/{self.prefix}.png"
        self._print_summary(path)

    def _on_round(self, round_: AveragingRound) -> None:
        assert self._fabric is not None
        strategy: Any = self._fabric.strategy
        metrics = self._note(round_, strategy.optimizers, self._fabric.world_size)
        self._fabric.log_dict(metrics, step=round_.step)
        self._fabric.call("on_averaging_round", averaging_round=round_)
