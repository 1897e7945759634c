"""When to average: rules that turn measured numbers into an averaging period. No tensors, no networks."""

from lightning_adpsgd.periods.adaptive import AdaptivePeriod
from lightning_adpsgd.periods.base import AveragingPeriod
from lightning_adpsgd.periods.constant import ConstantPeriod

__all__ = ["AdaptivePeriod", "AveragingPeriod", "ConstantPeriod"]
