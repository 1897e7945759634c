"""How far momentum will move parameters while a mean is in flight."""

import math

from torch.optim import Optimizer

from lightning_adpsgd.averaging.momentum import Momentum, MomentumReader


class LookAhead:
    """How far momentum will move an optimizer's parameters, as a multiple of their latest step."""

    def __init__(self, optimizer: Optimizer, reader: MomentumReader) -> None:
        self._optimizer = optimizer
        self._reader = reader

    def factors(self, delay: int) -> list[float]:
        r"""What momentum alone is expected to add up to in the next ``delay`` steps, as a multiple of the latest step.

        This is their mean if future gradients have mean zero and the size of past ones, so that bias-corrected second
        moments do not change. In torch's optimizers (source: the algorithms in the documentation of ``torch.optim``)
        the first moment is m_t = β m_{t−1} + κ g_t and a step is Δ_t ∝ a g_t + b_t m_t, so the next d steps add up to
        Σ_{j=1…d} b_{t+j} β^j m_t. If a = 0, that is

            Σ_{j=1…d} (b_{t+j} / b_t) β^j · Δ_t,

        exactly. If the gradient itself is part of the step (a > 0), Δ_t does not determine m_t. If gradients are
        independent from step to step, like mini-batch noise, the estimate with the least mean square error is c · Δ_t
        (in place of 1 / b_t · Δ_t) with

            c = E[m_t Δ_t] / E[Δ_t²] = (a κ + b_t s) / (a² + 2 a b_t κ + b_t² s),   s = κ² (1 − β^{2t}) / (1 − β²),

        exact at the first step.

        ============================= ===== ======= ============================== ==========================
        optimizer                     β     κ       b_t                            a
        ============================= ===== ======= ============================== ==========================
        SGD, RMSprop with momentum    μ     1       1                              0
        SGD with Nesterov's momentum  μ     1       μ                              1
        Adam, AdamW, Adamax           β₁    1 − β₁  1 / (1 − β₁^t)                 0
        RAdam                         β₁    1 − β₁  rectification / (1 − β₁^t)     0
        NAdam                         β₁    1 − β₁  μ_{t+1} / (1 − μ_1 … μ_{t+1})  (1 − μ_t) / (1 − μ_1 … μ_t)
        ============================= ===== ======= ============================== ==========================

        RAdam's steps before rectification begins do not predict those after it, which differ in size. The factor is 0
        for any other optimizer: its steps do not repeat its momentum (Adagrad, Rprop), or only where a gradient is not
        zero (SparseAdam), or in a different way (Muon), or it is not known (Lion, Adan, schedule-free ones).

        Args:
            delay: d.

        Returns:
            A factor for each parameter group, ≥ 0.
        """
        return [_factor(*self._reader.of(group), delay) for group in self._optimizer.param_groups]


def _factor(momentum: Momentum | None, steps: int, delay: int) -> float:
    if momentum is None:
        return 0.0
    a, b, gain = momentum.newest(steps), momentum.kept(steps), momentum.gain
    if a == 0.0:
        c = 1.0 / b
    else:
        variance = gain**2 * _geometric(momentum.decay**2, steps)
        c = (a * gain + b * variance) / (a**2 + 2 * a * b * gain + b**2 * variance)
    terms = (c * momentum.kept(steps + j) * momentum.decay**j for j in range(1, delay + 1))
    return sum(term for term in terms if math.isfinite(term))


def _geometric(ratio: float, terms: int) -> float:
    """1 + q + … + q^(n−1)."""
    return float(terms) if ratio >= 1.0 else (1.0 - ratio**terms) / (1.0 - ratio)
