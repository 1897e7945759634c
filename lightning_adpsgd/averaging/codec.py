"""How values travel: as differences from the last average, encoded, without losing what encoding cuts off."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from typing_extensions import override

from lightning_adpsgd.averaging.layout import Bucket, FlatLayout, hash48
from lightning_adpsgd.averaging.scaled_blocks import blocks_in, padded
from lightning_adpsgd.workers.group import WorkerGroup
from lightning_adpsgd.workers.reduction import Reduction

# On the CPU, what is done to a piece one pass after the other stays in a core's cache. Elements.
PIECE = 2**16

Pieces = tuple[Tensor, ...]


class Codec(ABC):
    """A wire format: rows of numbers to rows of bytes, and back.

    What :meth:`encode` cuts off is not lost: it travels in the next round (see ``DeltaCodec``). Blocks are encoded
    one by one: what becomes of a block does not depend on those beside it. :meth:`encode_` and :meth:`add_decoded_` are
    made of the other two; a codec that can do better in one go overrides them.
    """

    block = 1
    """How many elements are encoded together, with a scale in common for example: rows are padded to a multiple."""

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
        """Decode what :meth:`encode` has made of rows.

        Args:
            encoded: uint8, shape (rows, k · bytes per block).
            dtype: ``torch.float32`` or ``torch.float64``.

        Returns:
            Of that type, shape (rows, k · block).
        """

    def encode_(self, values: Tensor, encoded: Tensor) -> None:
        """Encode rows, and overwrite ``values`` by what that cuts off.

        Args:
            values: as for :meth:`encode`.
            encoded: to be overwritten by what :meth:`encode` returns.
        """
        encoded.copy_(self.encode(values))
        values.sub_(self.decode(encoded, values.dtype))

    def add_decoded_(self, encoded: Tensor, values: Tensor) -> None:
        """Add what :meth:`decode` returns to ``values``, fp32 or fp64, of shape (rows, k · block)."""
        values.add_(self.decode(encoded, values.dtype))


class CastCodec(Codec):
    """Numbers in a shorter floating-point type; those beyond its largest become that.

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
    """Sends what has changed since the last average through a codec, and what that cuts off the next time.

    All workers know the last average w̄. Worker i sends q_i = Q(w_i − w̄ + e_i) and keeps the error of rounding,
    e_i ← w_i − w̄ + e_i − q_i. Each worker averages its share of the elements, in the wide type, and sends the rounded
    mean s = Q(Σ_i q_i / n) to all; what that cuts off, Σ_i q_i − n·s, it adds to its own error. The new average is
    w̄ + s. A change too small for the type so adds up until it is not (error feedback; Seide et al., "1-bit stochastic
    gradient descent and its application to data-parallel distributed training of speech DNNs", 2014; Karimireddy et
    al., arXiv:1901.09847).

    It keeps two numbers per element, the average and the error, of the type in which elements are packed. Both change
    when a mean arrives, never before: what is sent and then thrown away leaves no trace.

    Tensors of no parameter group (BatchNorm statistics) travel as they are: they are few, a variance that is rounded
    may become negative, and a constant may be infinite.

    Args:
        layout: what travels; tensors of no group are apart.
        codec: Q.
        workers: who the values travel to; CPU tensors are packed on their device.
    """

    def __init__(self, layout: FlatLayout, codec: Codec, workers: WorkerGroup) -> None:
        self._codec = codec
        self._workers = workers
        self.has_residual = False
        """Whether there may be errors that have not travelled yet."""
        self._layout = layout
        self._spaces = {space.space: space for space in layout.cut_into_spaces() if layout.is_of_groups(space.space)}
        self._averages = {number: layout.new_buffer(space, workers.device) for number, space in self._spaces.items()}
        self._errors = {number: torch.zeros_like(average) for number, average in self._averages.items()}
        self._unknown = [*self._spaces.values()]
        self._bytes_of_a_block: dict[torch.dtype, int] = {}  # encoded, by the type of its elements

    @property
    def fingerprint(self) -> int:
        """A 48-bit hash of the elements of which the last average is known; workers have to agree on it."""
        return hash48(repr(self._unknown).encode())

    def knows(self, bucket: Bucket) -> bool:
        """Whether the last average of a whole bucket is known. If not, the bucket has to travel as it is."""
        return bucket.space in self._spaces and not any(bucket.overlaps(unknown) for unknown in self._unknown)

    def start(self) -> None:
        """Take what the tensors hold now, which is the same on all workers, for the last average."""
        for number, space in self._spaces.items():
            self._layout.pack(space, self._averages[number])
            self._errors[number].zero_()
        self.note_all()

    def forget(self) -> None:
        """Take note that workers do not know the same average: everything travels as it is once."""
        self._unknown = [*self._spaces.values()]

    def take_over(self, other: "DeltaCodec", places: Iterable[tuple[Bucket, Bucket]]) -> None:
        """Go on from what another layout's average and errors were.

        Args:
            other: of the layout before.
            places: of tensors that are in both: where they were, and where they are now.
        """
        for before, now in places:
            if before.space in other._spaces and now.space in self._spaces:
                self._of(now)[0].copy_(other._of(before)[0])
                self._of(now)[1].copy_(other._of(before)[1])
                if other.knows(before):
                    self._note_known(now)
        self.has_residual = other.has_residual

    def send(self, bucket: Bucket, values: Tensor, workers: WorkerGroup) -> tuple[Reduction, Tensor]:
        """Begin to find out the average's change from the workers' ``values`` of a bucket.

        Returns:
            What is under way, and what rounding cuts off of it, for :meth:`receive`; in the storage of ``values``.
        """
        self.has_residual = True
        average, error = self._of(bucket)
        shares = workers.shares(values)
        sizes = [blocks_in(len(share), self._codec.block) * self._block_bytes(values) for share in shares]
        rows = values.new_zeros(len(shares), sizes[0], dtype=torch.uint8)
        for row, *parts in zip(rows, shares, workers.shares(average), workers.shares(error), strict=True):
            for (change, known, owed), (encoded,) in self._pieces(parts, [row]):
                self._encode_(change.sub_(known).add_(owed), encoded)
        combine = partial(self._combine, shares[workers.rank], workers.count)
        return workers.exchange(rows, combine, shares, sizes), values

    def receive(self, bucket: Bucket, change: Tensor, cut_off: Tensor, tells: bool = False) -> Tensor:
        """The new average of a bucket, which nobody may write to.

        Args:
            bucket: the bucket.
            change: the average's change, encoded; uint8, shape (ranks, bytes of a share).
            cut_off: of :meth:`send`.
            tells: overwrite that by what was sent, less what the values were.
        """
        average, error = self._of(bucket)
        before = error.clone() if tells else error
        error.copy_(cut_off)
        if tells:
            torch.sub(before, cut_off, out=cut_off)
        for row, share in zip(change, self._workers.shares(average), strict=True):
            for (piece,), (encoded,) in self._pieces([share], [row]):
                self._add_decoded_(encoded, piece)
        return average

    def residual(self, bucket: Bucket) -> Tensor | None:
        """What is to be added to values that are about to travel as they are: what has been cut off so far."""
        return self._of(bucket)[1] if bucket.space in self._spaces else None

    def note(self, bucket: Bucket, mean: Tensor) -> None:
        """Take note of an average that travelled as it is."""
        if bucket.space in self._spaces:
            average, error = self._of(bucket)
            average.copy_(mean.to(self._layout.dtype(bucket.space)))  # as tensors of 16 bits hold it
            error.zero_()
            self._note_known(bucket)

    def note_all(self) -> None:
        """Take note that everything has travelled as it is."""
        self._unknown, self.has_residual = [], False

    def _combine(self, residual: Tensor, workers: int, rows: Tensor) -> Tensor:
        """Average one share of all workers, encoded as it is sent; what that cuts off goes to the residual."""
        combined = torch.zeros_like(rows[0])
        for (owed,), (encoded, *sent) in self._pieces([residual], [combined, *rows]):
            total = torch.zeros_like(owed)
            for each in sent:
                self._add_decoded_(each, total)
            self._encode_(total.div_(workers), encoded)
            owed.add_(total, alpha=workers)
        return combined

    # Pieces of whole blocks, but for the last one of a share

    def _pieces(self, parts: Sequence[Tensor], rows: Sequence[Tensor]) -> Iterator[tuple[Pieces, Pieces]]:
        """Pieces of tensors as long as a share, and of shares encoded, which may be longer."""
        block, block_bytes = self._codec.block, self._block_bytes(parts[0])
        blocks = blocks_in(len(parts[0]), block)
        length = min(max(1, PIECE // block), blocks) if rows[0].device.type == "cpu" else blocks
        if length == 0:
            return iter(())
        elements = zip(*(part.split(length * block) for part in parts), strict=True)
        encoded = zip(*(row[: blocks * block_bytes].split(length * block_bytes) for row in rows), strict=True)
        return zip(elements, encoded, strict=True)

    def _encode_(self, piece: Tensor, encoded: Tensor) -> None:
        """Encode a piece, and overwrite it by what that cuts off."""
        whole = padded(piece, self._codec.block)
        self._codec.encode_(whole[None], encoded[None])
        if whole is not piece:
            piece.copy_(whole[: len(piece)])

    def _add_decoded_(self, encoded: Tensor, piece: Tensor) -> None:
        whole = padded(piece, self._codec.block)
        self._codec.add_decoded_(encoded[None], whole[None])
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
