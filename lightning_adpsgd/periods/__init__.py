"""When to average: rules that compute the averaging period from measured numbers. No tensors, no communication."""

from lightning_adpsgd.periods.adaptive import AdaptivePeriod
from lightning_adpsgd.periods.base import AveragingPeriod
from lightning_adpsgd.periods.constant import ConstantPeriod

__all__ = ["AdaptivePeriod", "AveragingPeriod", "ConstantPeriod"]
