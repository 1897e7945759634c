"""The baselines that the paper compares ADPSGD with (arXiv:2007.06134), each a Lightning strategy for a YAML file.

- Full communication, FULLSGD: gradients are averaged at every step, which is Lightning's own DDP (``full.yaml``).
- CPSGD: parameters are averaged at a constant period, which is ``ADPSGDStrategy`` with ``ConstantPeriod``
  (``cpsgd.yaml``); with `EvenRounds` it has a given number of rounds, such as that of an adaptive run.
- QSGD: gradients are averaged at every step, quantized to 8 bits, which is `QSGDStrategy` (``qsgd.yaml``).
- PowerSGD: gradients are averaged at every step, as products of thin matrices, which is `PowerSGDStrategy`
  (``powersgd.yaml``). The paper does not compare with it, nor with the next one.
- Gradients in bf16: `BF16Strategy` (``bf16.yaml``).

`HookedDDP` is the base of those that average gradients: DDP with a communication hook, on any device. `CountedDDP`
also says how much its hook has sent.
"""

from benchmarks.baselines.bf16 import BF16Strategy
from benchmarks.baselines.even_rounds import EvenRounds
from benchmarks.baselines.hooked import CountedDDP, HookedDDP
from benchmarks.baselines.powersgd import PowerSGDStrategy
from benchmarks.baselines.qsgd import QSGDStrategy

__all__ = ["BF16Strategy", "CountedDDP", "EvenRounds", "HookedDDP", "PowerSGDStrategy", "QSGDStrategy"]
