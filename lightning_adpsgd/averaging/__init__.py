"""How to average: tensors and process groups in, averages and variances out."""

from lightning_adpsgd.averaging.averager import InFlight, ParameterAverager
from lightning_adpsgd.averaging.layout import FlatLayout, Order, Range, has_mean, hash48
from lightning_adpsgd.averaging.momentum import LookAhead, check_known_moments
from lightning_adpsgd.averaging.optimizer_state import (
    average_moments,
    forget,
    has_state,
    moments,
    reset_moments,
    share_state,
    state_at_start,
)
from lightning_adpsgd.averaging.round import TRIGGERS, AveragingRound, Trigger, ring_bytes
from lightning_adpsgd.averaging.stopwatch import Stopwatch
from lightning_adpsgd.averaging.workers import (
    CollectiveError,
    NodeWorkers,
    Numbers,
    Reduction,
    Share,
    Workers,
    closed_at_exit,
)

__all__ = [
    "TRIGGERS",
    "AveragingRound",
    "CollectiveError",
    "FlatLayout",
    "InFlight",
    "LookAhead",
    "NodeWorkers",
    "Numbers",
    "Order",
    "ParameterAverager",
    "Range",
    "Reduction",
    "Share",
    "Stopwatch",
    "Trigger",
    "Workers",
    "average_moments",
    "check_known_moments",
    "closed_at_exit",
    "forget",
    "has_mean",
    "has_state",
    "hash48",
    "moments",
    "reset_moments",
    "ring_bytes",
    "share_state",
    "state_at_start",
]
