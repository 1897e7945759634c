"""What each worker adds to a sum over the workers, so that the sum is their mean."""

from typing import NamedTuple

import torch
from torch import Tensor


class Contribution(NamedTuple):
    """What this worker contributes to a mean over the workers."""

    contributors: int
    """The number of workers that are averaged."""
    place: int | None
    """This worker's place among them, from 0; None: it contributes nothing, and receives the others' mean."""

    @property
    def contributes(self) -> bool:
        """Whether this worker is one of those that are averaged."""
        return self.place is not None

    @property
    def divides(self) -> bool:
        """Whether all send an n-th of their values: n times x/n is x in any order only for n = 1, 2 and 4."""
        return self.contributors in (1, 2, 4)

    def part_(self, values: Tensor) -> Tensor:
        r"""Replace a worker's values by its part of the mean, in place: the mean is the sum of all workers' parts.

        If all workers hold the same number x, infinities and subnormal numbers included, the sum is x, bit for bit,
        in whatever order a collective adds up. With p_j = fl(x · (n + j)/2n), which is a multiple of half a unit in
        the last place of x, the worker at place j sends 2(p_{j+1} − p_j). That difference is exact. All of them have
        the sign of x and are multiples of its unit, so every sum of some of them is exact as well (compare Sterbenz,
        *Floating-Point Computation*, 1974), and that of all is 2(p_n − p_0) = x. No such sum exceeds x, so none
        overflows. If the workers' numbers differ, a part is off from x/n by at most a unit in the last place of x,
        in either direction: the mean of n fp32 numbers is off by about 4e-8 · √n of its value.

        Args:
            values: contiguous, fp32 or fp64.

        Returns:
            ``values``.
        """
        n, place = self.contributors, self.place
        if place is None:
            return values.zero_()
        if n == 1:
            return values
        if self.divides and place > 0:
            return values.div_(n)
        if self.divides:
            part = values / n
            part += torch.sub(values, part, alpha=n).nan_to_num_(0.0, 0.0, 0.0)  # not 0 if x/n is subnormal
        else:
            # p_j is multiplied first, and doubled last: 2x may be infinite, and half a subnormal number may not exist.
            largest = torch.finfo(values.dtype).max  # infinity minus this is infinity
            part = values * ((n + place + 1) / (2 * n))
            if place == 0:
                part = (part - values.clamp(-largest, largest)).add_(part)
            else:
                part.sub_((values * ((n + place) / (2 * n))).clamp_(-largest, largest)).mul_(2)
        return torch.copysign(part, values, out=values)  # −0, too, stays what it is
