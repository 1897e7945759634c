"""QSGD: gradients are averaged at every step, quantized at random to 8 bits (Alistarh et al., arXiv:1610.02132)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.baselines.hooked import CountedDDP
from lightning_adpsgd.averaging import scaled_blocks
from lightning_adpsgd.validation import given, type_of

LEVELS = 127  # s: with a sign, what fits into a byte
LARGEST_SEED = 2**62  # so that every rank's fits into 64 bits


class QSGDCodec(NamedTuple):
    """Quantizes to 8 bits at random, without bias: Q_s of the paper's section 3.1, with s = 127.

    A value v of a bucket whose Euclidean norm is ‖b‖ becomes the code sgn(v)·ξ, where ξ is one of the two whole numbers
    next to s·|v|/‖b‖, drawn so that its mean is exact; it is decoded to ‖b‖·code/s. For buckets of d elements
    E‖Q(b) − b‖² ≤ min(d/s², √d/s)·‖b‖² (lemma 3.1), and each element is off by less than ‖b‖/s.

    In a message every bucket is a row of bytes: a code per element, as int8, and the norm, as fp32.
    """

    bucket_size: int = 512  # d; elements that share a norm. A larger one takes fewer bytes, and its error is larger

    def rows(self, numel: int) -> int:
        """Buckets for ``numel`` elements; the last one may not be full, and takes as many bytes as the others."""
        return scaled_blocks.blocks_in(numel, self.bucket_size)

    @property
    def row_bytes(self) -> int:
        """Bytes per bucket."""
        return scaled_blocks.row_bytes(self.bucket_size, torch.float32)

    def encode(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """Quantize floating-point values of shape (numel,), in fp32, to uint8 of shape (rows, bucket_size + 4).

        A bucket of zeros stays one. If a value is not finite, neither is its bucket's norm. The generator has to be on
        the device of the values, as is the result.
        """
        full = scaled_blocks.padded(values.float(), self.bucket_size).view(-1, self.bucket_size)
        # In fp64 squares of fp32 numbers are exact: a norm is never less than a value, so no code is beyond ±127.
        norms = torch.linalg.vector_norm(full, dim=1, keepdim=True, dtype=torch.float64).float()
        # 0/0 and ∞/∞ get the code 0; the norm tells which it was. Divided first, because s/‖b‖ may be infinite.
        scaled = full.div(norms).nan_to_num_().mul_(LEVELS)
        # ⌊x⌋ + 1 with probability x − ⌊x⌋, else ⌊x⌋: for a negative x as well, this is sgn(x)·ξ.
        codes = scaled.floor()
        chances = torch.rand(scaled.shape, generator=generator, device=scaled.device)
        codes += chances < scaled.sub_(codes)
        wire = torch.empty(len(full), self.row_bytes, dtype=torch.uint8, device=values.device)
        scaled_blocks.write([codes], norms, wire, torch.float32)
        return wire

    def decode(self, wire: Tensor) -> Tensor:
        """What :meth:`encode` has quantized, as fp32 of shape (rows · bucket_size,); the same bits on every rank."""
        codes, norms = scaled_blocks.read(wire, torch.float32)
        return codes.float().div_(LEVELS).mul_(norms).flatten()


@dataclass
class _Exchange:
    """The exchange of a DDP bucket: quantized slices go to their owners, and the owners' means to all ranks."""

    gradient: Tensor  # as DDP has it, shape (numel,); holds the mean in the end
    future: "torch.futures.Future[Tensor]"  # what DDP waits for
    slices: Sequence[int]  # rows of each rank's slice; as even as possible, without padding
    sent: Any = None  # kept while in flight
    received: Any = None
    work: Any = None

    def send(self, wire: Tensor, to: Sequence[int], from_: Sequence[int]) -> None:
        """Begin to exchange rows, given how many go to each rank and come from each."""
        self.sent = wire
        self.received = wire.new_empty(sum(from_), wire.shape[1])
        self.work = dist.all_to_all_single(self.received, wire, [*from_], [*to], async_op=True)

    def wait(self) -> Tensor:
        """The rows that were sent here, on the gradient's device."""
        self.work.wait()
        received: Tensor = self.received.to(self.gradient.device)
        return received


class QSGDReducer:
    """Averages DDP's gradients in two phases, as a ring does, but as bytes of a :class:`QSGDCodec`.

    Every rank owns a slice of each DDP bucket. It gets the quantized values of all ranks there, decodes and averages
    them, and sends the mean, quantized again, to all; so all ranks decode the same bytes, and each sends 2(n−1)/n of a
    quantized gradient however many ranks there are. (Algorithm 1 of the paper sends each rank's gradient to the n−1
    others.) The second quantization has no bias either, but its error is not averaged over ranks. Each rank draws from
    its own generator, seeded with seed + rank: errors are independent, and no other random numbers change.
    """

    def __init__(self, codec: QSGDCodec, seed: int) -> None:
        # Configuration
        self._codec = codec
        self._seed = seed

        # State
        self.steps = 0  # reductions of all gradients
        self.sent_bytes = 0  # what this rank has sent to others
        self._generator: torch.Generator | None = None
        self._under_way: list[_Exchange] = []

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """DDP's communication hook: begin a bucket's exchange; with the last one, finish all.

        Other hooks wait in callbacks of their futures, which gloo runs on two threads: with many buckets in flight no
        thread is left to complete them. Here the backward pass's own thread waits, in the same order on each rank.
        """
        self.steps += bucket.is_last()
        if bucket.index() == 0:
            self._under_way = []  # of a backward pass that has failed
        exchange = self._begin(bucket.buffer())
        if bucket.is_last():
            self._finish()
        return exchange.future

    def _begin(self, gradient: Tensor) -> _Exchange:
        size, rank = dist.get_world_size(), dist.get_rank()
        rows = self._codec.rows(len(gradient))
        slices = [rows // size + (owner < rows % size) for owner in range(size)]
        on_cuda = gradient.device.type == "cuda"
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[gradient.device] if on_cuda else None)
        exchange = _Exchange(gradient, future, slices)
        if size == 1:
            future.set_result(gradient)
            return exchange
        self._under_way.append(exchange)
        exchange.send(self._encode(gradient), to=slices, from_=[slices[rank]] * size)
        self.sent_bytes += (rows - slices[rank]) * self._codec.row_bytes
        return exchange

    def _finish(self) -> None:
        exchanges, self._under_way = self._under_way, []
        for exchange in exchanges:
            self._average(exchange)
        for exchange in exchanges:
            # The last row is padded where the gradient does not fill it.
            mean = self._codec.decode(exchange.wait())[: len(exchange.gradient)]
            exchange.future.set_result(exchange.gradient.copy_(mean))

    def _average(self, exchange: _Exchange) -> None:
        """The second phase: this rank's slice is sent to all."""
        size, mine = dist.get_world_size(), exchange.slices[dist.get_rank()]
        parts = self._codec.decode(exchange.wait()).view(size, mine * self._codec.bucket_size)
        wire = self._encode(parts.mean(dim=0))
        # Not an all-gather: backends want slices of equal length there.
        exchange.send(wire.repeat(size, 1), to=[mine] * size, from_=exchange.slices)
        self.sent_bytes += (size - 1) * mine * self._codec.row_bytes

    def _encode(self, values: Tensor) -> Tensor:
        if self._generator is None or self._generator.device != values.device:
            self._generator = torch.Generator(values.device)
            self._generator.manual_seed(self._seed + dist.get_rank())
        wire = self._codec.encode(values, self._generator)
        return wire.cpu() if dist.get_backend() == "gloo" else wire  # gloo exchanges what is on the host


class QSGDStrategy(CountedDDP):
    """DDP that averages gradients quantized to 8 bits, in about a quarter of the bytes (QSGD, arXiv:1610.02132).

    With one process nothing is sent, and gradients are unchanged. A run that continues from a checkpoint draws its
    randomness from the start.

    Args:
        bucket_size: gradient elements that share a norm. A larger one takes fewer bytes, 1 + 4/bucket_size per
            element, and its error is larger.
        seed: of the quantization; each rank adds its own number.
        options: of ``DDPStrategy``, ``bucket_cap_mb`` and ``process_group_backend`` for example.

    Raises:
        ValueError: if an argument is not what it has to be.
    """

    def __init__(self, bucket_size: int = 512, seed: int = 0, **options: Any) -> None:
        codec = QSGDCodec(_check("bucket_size", bucket_size, 1, 2**31 - 1, "for example 512"))
        super().__init__(QSGDReducer(codec, _check("seed", seed, 0, LARGEST_SEED, "for example 0")), **options)


def _check(name: str, value: object, least: int, most: int, example: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(
            f"{given(name, value, 'QSGDStrategy')}: expected an int from {least} to {most}, got {type_of(value)}. Pass"
            f" {example}."
        )
    return value
