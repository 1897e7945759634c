"""What a round does with the workers' mean: adopt it, or apply an outer step to it."""

from abc import ABC, abstractmethod

from torch import Tensor
from typing_extensions import override

from lightning_adpsgd.averaging.layout import Bucket, FlatLayout


class Update(ABC):
    """Decides which values all workers continue from after a round that the period asks for.

    Its inputs are the same on all workers, and its results have to be the same too. Rounds for a validation, a
    checkpoint or the end of training, and rounds that drop a worker, adopt the mean instead. Each optimizer gets a
    copy. Checkpoints do not hold what an update keeps: it begins anew when a run is resumed.
    """

    def start(self, layout: FlatLayout) -> None:  # noqa: B027 - an update without state needs nothing
        """Called before the first round, and whenever the averaged tensors have changed.

        Args:
            layout: of the averaged tensors; ``layout.cut_into_spaces()`` has the length of each index space.
        """

    @abstractmethod
    def apply(self, bucket: Bucket, mean: Tensor) -> Tensor:
        """Compute the values that replace the mean.

        Args:
            bucket: elements ``start`` to ``stop`` of one index space. A round passes each bucket once, in any order.
            mean: w̄ of these elements over the workers, fp32 or fp64, of shape (len(bucket),); may be overwritten.

        Returns:
            The new values, of the same shape. Elements of no parameter group (BatchNorm statistics) keep their mean.
        """


def check_result(update: Update, mean: Tensor, result: object) -> Tensor:
    """Return an update's ``result`` if it can replace ``mean``.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if its shape, dtype or device is another one.
    """
    expected = f"a tensor of shape {tuple(mean.shape)}, {mean.dtype}, on {mean.device}, as the mean that it is given"
    what = f"{type(update).__name__}.apply returned"
    if not isinstance(result, Tensor):
        raise TypeError(f"{what} {type(result).__name__}; expected {expected}. Return the new values of all elements.")
    if (result.shape, result.dtype, result.device) != (mean.shape, mean.dtype, mean.device):
        given = f"a tensor of shape {tuple(result.shape)}, {result.dtype}, on {result.device}"
        raise ValueError(f"{what} {given}; expected {expected}. Compute with tensors like it, and return all elements.")
    return result


class Adopt(Update):
    """Plain local SGD: all workers continue from their mean."""

    @override
    def apply(self, bucket: Bucket, mean: Tensor) -> Tensor:
        return mean
