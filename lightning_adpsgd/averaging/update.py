"""What is done with the workers' mean: it is adopted, or an outer step makes something else of it."""

from abc import ABC, abstractmethod

from torch import Tensor
from typing_extensions import override

from lightning_adpsgd.averaging.layout import Bucket, FlatLayout


class Update(ABC):
    """Decides what all workers go on from after a round that the period asks for.

    It sees numbers that are the same on all workers, and has to make the same of them everywhere. Rounds for a
    validation, a checkpoint or the end adopt the mean as it is: whoever looks, sees the average.
    """

    def start(self, layout: FlatLayout) -> None:  # noqa: B027 - an update without a state needs nothing
        """Take note of what is averaged from now on; called before the first round, and when that has changed.

        Args:
            layout: ``layout.cut_into_spaces()`` says how many elements each index space has.
        """

    @abstractmethod
    def apply(self, bucket: Bucket, mean: Tensor) -> Tensor:
        """What takes the place of the mean.

        Args:
            bucket: elements ``start`` to ``stop`` of one index space. All buckets of a round come once, in any order.
            mean: w̄ of these elements over the workers, fp32 or fp64, of shape (len(bucket),); may be overwritten.

        Returns:
            As many elements. Those of no parameter group (BatchNorm statistics) are adopted as they were in ``mean``.
        """


class Adopt(Update):
    """Local SGD's own: all workers go on from their mean."""

    @override
    def apply(self, bucket: Bucket, mean: Tensor) -> Tensor:
        return mean
