"""How to average: tensors and process groups in, averages and variances out."""

from lightning_adpsgd.averaging.averager import ParameterAverager
from lightning_adpsgd.averaging.layout import FlatLayout, Range
from lightning_adpsgd.averaging.round import TRIGGERS, AveragingRound, Trigger, ring_bytes
from lightning_adpsgd.averaging.workers import Reduction, Workers

__all__ = [
    "TRIGGERS",
    "AveragingRound",
    "FlatLayout",
    "ParameterAverager",
    "Range",
    "Reduction",
    "Trigger",
    "Workers",
    "ring_bytes",
]
