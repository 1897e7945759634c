"""Encodes what is sent: the change since the last average, with error feedback."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from typing_extensions import override

from lightning_adpsgd.averaging.layout import Bucket, FlatLayout, hash48
from lightning_adpsgd.averaging.scaled_blocks import blocks_in, padded
from lightning_adpsgd.workers.group import WorkerGroup
from lightning_adpsgd.workers.reduction import Reduction

# Elements. On the CPU, a piece stays in a core's cache from one pass to the next.
PIECE = 2**16

Pieces = tuple[Tensor, ...]


class Codec(ABC):
    """A wire format: encodes rows of numbers as rows of bytes, and decodes them.

    The error of :meth:`encode` is not lost: it is sent in the next round (see ``DeltaCodec``). Each block is encoded
    independently of the others. :meth:`encode_` and :meth:`add_decoded_` call the other two methods; override them if
    one pass can do the same faster.
    """

    block = 1
    """How many elements are encoded together, for example with one scale. Rows are padded to a multiple of it."""

    @abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """Encode rows of numbers.

        Args:
            values: fp32 or fp64, finite, of shape (rows, k · block).

        Returns:
            uint8, shape (rows, k · bytes per block), contiguous.
        """

    @abstractmethod
    def decode(self, encoded: Tensor, dtype: torch.dtype) -> Tensor:
        """Decode the result of :meth:`encode`.

        Args:
            encoded: uint8, shape (rows, k · bytes per block).
            dtype: of the result, ``torch.float32`` or ``torch.float64``.

        Returns:
            Shape (rows, k · block).
        """

    def encode_(self, values: Tensor, encoded: Tensor) -> None:
        """Write the result of :meth:`encode` into ``encoded``, and replace ``values`` by the encoding error.

        The error is ``values`` minus the decoded values.
        """
        encoded.copy_(self.encode(values))
        values.sub_(self.decode(encoded, values.dtype))

    def add_decoded_(self, encoded: Tensor, values: Tensor) -> None:
        """Add the result of :meth:`decode` to ``values``: fp32 or fp64, of shape (rows, k · block)."""
        values.add_(self.decode(encoded, values.dtype))


class CastCodec(Codec):
    """Numbers in a shorter floating-point type, clipped to its range.

    Args:
        dtype: ``torch.bfloat16`` or ``torch.float16``, for example.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    @override
    def encode(self, values: Tensor) -> Tensor:
        largest = torch.finfo(self.dtype).max
        return values.clamp(-largest, largest).to(self.dtype).view(torch.uint8)

    @override
    def decode(self, encoded: Tensor, dtype: torch.dtype) -> Tensor:
        return encoded.view(self.dtype).to(dtype)


class DeltaCodec:
    """Sends the change since the last average through a codec, and the encoding error in the next round.

    All workers know the last average w̄. Worker i sends q_i = Q(w_i − w̄ + e_i), and keeps the error
    e_i ← w_i − w̄ + e_i − q_i. Each worker averages its share of the elements without further rounding, and sends the
    encoded mean s = Q(Σ_i q_i / n) to all. It adds the error of that, Σ_i q_i − n·s, to its own. The new average is
    w̄ + s. So changes that are too small for the type add up until they are not (error feedback; Seide et al., "1-bit
    stochastic gradient descent and its application to data-parallel distributed training of speech DNNs", 2014;
    Karimireddy et al., arXiv:1901.09847).

    This takes two numbers per element, the average and the error, in the dtype of packed buffers. They change only when
    a mean arrives, so a message that is discarded leaves no trace.

    Tensors of no parameter group (BatchNorm statistics) are sent unencoded: they are few, a rounded variance may be
    negative, and a constant may be infinite.

    Args:
        layout: the tensors to send; those of no group are in index spaces of their own.
        codec: Q.
        workers: the workers to average over; CPU tensors are packed on their device.
    """

    def __init__(self, layout: FlatLayout, codec: Codec, workers: WorkerGroup) -> None:
        self._codec = codec
        self._workers = workers
        self.has_residual = False
        """Whether there may be errors that have not been sent yet."""
        self._layout = layout
        self._spaces = {space.space: space for space in layout.cut_into_spaces() if layout.is_of_groups(space.space)}
        self._averages = {number: layout.new_buffer(space, workers.device) for number, space in self._spaces.items()}
        self._errors = {number: torch.zeros_like(average) for number, average in self._averages.items()}
        self._unknown = [*self._spaces.values()]
        self._bytes_of_a_block: dict[torch.dtype, int] = {}  # by dtype of the elements

    @property
    def fingerprint(self) -> int:
        """A 48-bit hash of the elements whose last average is known. All workers have to have the same."""
        return hash48(repr(self._unknown).encode())

    def knows(self, bucket: Bucket) -> bool:
        """Whether the last average of the whole bucket is known. If not, it has to be sent unencoded."""
        return bucket.space in self._spaces and not any(bucket.overlaps(unknown) for unknown in self._unknown)

    def start(self) -> None:
        """Record the tensors' current values, which are the same on all workers, as the last average."""
        for number, space in self._spaces.items():
            self._layout.pack(space, self._averages[number])
            self._errors[number].zero_()
        self.note_all()

    def forget(self) -> None:
        """Record that workers do not know the same average: everything is sent unencoded once."""
        self._unknown = [*self._spaces.values()]

    def take_over(self, other: "DeltaCodec", places: Iterable[tuple[Bucket, Bucket]]) -> None:
        """Take over the average and the errors of the previous layout.

        Args:
            other: the previous layout's codec.
            places: where each tensor that is in both layouts was, and where it is now.
        """
        for before, now in places:
            if before.space in other._spaces and now.space in self._spaces:
                self._of(now)[0].copy_(other._of(before)[0])
                self._of(now)[1].copy_(other._of(before)[1])
                if other.knows(before):
                    self._note_known(now)
        self.has_residual = other.has_residual

    def send(self, bucket: Bucket, values: Tensor, workers: WorkerGroup) -> tuple[Reduction, Tensor]:
        """Start to reduce the change of a bucket's average; ``values`` are overwritten.

        Returns:
            The reduction, and the encoding error, for :meth:`receive`; the error is in the storage of ``values``.
        """
        self.has_residual = True
        average, error = self._of(bucket)
        shares = workers.shares(values)
        sizes = [blocks_in(len(share), self._codec.block) * self._block_bytes(values) for share in shares]
        rows = values.new_zeros(len(shares), sizes[0], dtype=torch.uint8)
        for row, *parts in zip(rows, shares, workers.shares(average), workers.shares(error), strict=True):
            for (change, known, residual), (encoded,) in self._pieces(parts, [row]):
                self._encode_(change.sub_(known).add_(residual), encoded)
        combine = partial(self._combine, shares[workers.rank], workers.count)
        return workers.exchange(rows, combine, shares, sizes), values

    def receive(self, bucket: Bucket, change: Tensor, cut_off: Tensor, with_rounding: bool = False) -> Tensor:
        """The new average of a bucket; read-only.

        Args:
            bucket: the bucket.
            change: the encoded change of the average; uint8, shape (ranks, bytes of a share).
            cut_off: the encoding error, from :meth:`send`.
            with_rounding: whether to overwrite ``cut_off`` with (values sent − values held).
        """
        average, error = self._of(bucket)
        before = error.clone() if with_rounding else error
        error.copy_(cut_off)
        if with_rounding:
            torch.sub(before, cut_off, out=cut_off)
        for row, share in zip(change, self._workers.shares(average), strict=True):
            for (piece,), (encoded,) in self._pieces([share], [row]):
                self._add_decoded_(encoded, piece)
        return average

    def residual(self, bucket: Bucket) -> Tensor | None:
        """The error so far, to be added to values that are about to be sent unencoded; None if there is none."""
        return self._of(bucket)[1] if bucket.space in self._spaces else None

    def note(self, bucket: Bucket, mean: Tensor) -> None:
        """Record an average that was sent unencoded."""
        if bucket.space in self._spaces:
            average, error = self._of(bucket)
            average.copy_(mean.to(self._layout.dtype(bucket.space)))  # as tensors of 16 bits hold it
            error.zero_()
            self._note_known(bucket)

    def note_all(self) -> None:
        """Record that everything was sent unencoded."""
        self._unknown, self.has_residual = [], False

    def _combine(self, residual: Tensor, workers: int, rows: Tensor) -> Tensor:
        """Average the workers' encoded shares, and encode the mean; its error is added to the residual."""
        combined = torch.zeros_like(rows[0])
        for (piece,), (encoded, *sent) in self._pieces([residual], [combined, *rows]):
            total = torch.zeros_like(piece)
            for each in sent:
                self._add_decoded_(each, total)
            self._encode_(total.div_(workers), encoded)
            piece.add_(total, alpha=workers)
        return combined

    def _pieces(self, parts: Sequence[Tensor], rows: Sequence[Tensor]) -> Iterator[tuple[Pieces, Pieces]]:
        """Cut shares and encoded shares (which may be padded) into pieces of whole blocks; the last may be shorter."""
        block, block_bytes = self._codec.block, self._block_bytes(parts[0])
        blocks = blocks_in(len(parts[0]), block)
        length = min(max(1, PIECE // block), blocks) if rows[0].device.type == "cpu" else blocks
        if length == 0:
            return iter(())
        elements = zip(*(part.split(length * block) for part in parts), strict=True)
        encoded = zip(*(row[: blocks * block_bytes].split(length * block_bytes) for row in rows), strict=True)
        return zip(elements, encoded, strict=True)

    def _encode_(self, piece: Tensor, encoded: Tensor) -> None:
        with self._whole_blocks(piece) as rows:
            self._codec.encode_(rows, encoded[None])

    def _add_decoded_(self, encoded: Tensor, piece: Tensor) -> None:
        with self._whole_blocks(piece) as rows:
            self._codec.add_decoded_(encoded[None], rows)

    @contextmanager
    def _whole_blocks(self, piece: Tensor) -> Iterator[Tensor]:
        """A piece as a row of whole blocks, to be changed in place."""
        whole = padded(piece, self._codec.block)
        yield whole[None]
        if whole is not piece:
            piece.copy_(whole[: len(piece)])

    def _block_bytes(self, like: Tensor) -> int:
        if like.dtype not in self._bytes_of_a_block:
            block = self._codec.encode(like.new_zeros(1, self._codec.block))
            self._bytes_of_a_block[like.dtype] = block.shape[1]
        return self._bytes_of_a_block[like.dtype]

    def _note_known(self, bucket: Bucket) -> None:
        self._unknown = [rest for unknown in self._unknown for rest in unknown.without(bucket)]

    def _of(self, bucket: Bucket) -> tuple[Tensor, Tensor]:
        here = slice(bucket.start, bucket.stop)
        return self._averages[bucket.space][here], self._errors[bucket.space][here]
