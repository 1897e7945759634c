"""The baselines that the paper compares ADPSGD with (arXiv:2007.06134), each a Lightning strategy for a YAML file.

- Full communication, FULLSGD: gradients are averaged at every step, which is Lightning's own DDP (``full.yaml``).
- CPSGD: parameters are averaged at a constant period, which is ``ADPSGDStrategy`` with ``ConstantPeriod``
  (``cpsgd.yaml``); with `EvenRounds` it has a given number of rounds, such as an adaptive run has had.
- QSGD: gradients are averaged at every step, quantized to 8 bits, which is `QSGDStrategy` (``qsgd.yaml``).

`HookedDDP` is what `QSGDStrategy` is made from: DDP with a communication hook, on any device.
"""

from benchmarks.baselines.even_rounds import EvenRounds
from benchmarks.baselines.hooked import HookedDDP
from benchmarks.baselines.qsgd import QSGDStrategy

__all__ = ["EvenRounds", "HookedDDP", "QSGDStrategy"]
