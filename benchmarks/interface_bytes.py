"""Does the network see what the package reports? The counters of each host's interface, read around every round.

    sudo .venv/bin/python -m benchmarks.interface_bytes [--hosts 3] [--no-offload] [--json FILE]

Every rank runs on a host of its own (a network namespace, see `hosts.py`) as torchrun would start it, and is a real
`Trainer.fit`. Linux and root only. Four runs, one after the other; choose with `--strategy`:

- `adpsgd`: `ADPSGDStrategy(period=AdaptivePeriod())`. Shown are (a) that between two averaging rounds no byte of a
  collective crosses the network, and (b) that the bytes reported (`AveragingRound.sent_bytes`) are those that the
  interface has counted, within 5 %.
- `ddp`: Lightning's DDP, without its broadcast of buffers. Shown is (c) that the gradients of a step take the bytes
  that `CommunicationMonitor` claims for DDP, within 5 %. What Lightning itself broadcasts at every batch (whether
  SIGTERM has come) is in the column "between".
- `qsgd`: `QSGDStrategy`, without DDP's broadcast of buffers. Shown is (d) that the quantized gradients of a step take
  the bytes that it says it has sent, within 5 %, without the headers of packets.
- `control`: as `adpsgd`, but with a barrier, the smallest collective, at every step. Shown is (e) that (a) can fail:
  each one of them is seen.

The exit code is 0 if all of it is shown, 1 if not, and 2 if nothing could be measured.

How it is measured
------------------
Ranks read their interface's transmitted bytes at the start of every batch, before every optimizer step, after every
round and at the end of every epoch; they wait for each other (through a file, not the network) before and after each
reading, so no rank is ahead and sends while another one reads. Every byte between the first batch and the last round
is booked exactly once: to a round, or to the steps between. After communication that is meant to be, and before the
first batch, they wait another 50 ms, because TCP may hold back an acknowledgement for 40 ms.

What TCP sends by itself
------------------------
Between rounds the counters stand still: 0 bytes in every step. Without the 50 ms (`--settle 0`) a few steps have 66
bytes per connection, a delayed acknowledgement: Ethernet (14), IP (20) and TCP with time stamps (32), and no data. The
smallest message of a gloo collective is 66 + 48 bytes, and every rank that takes part sends at least one (a receiver
tells the sender that it is ready). So 100 bytes in a step is the bound: more than an acknowledgement, less than any
collective. For comparison: in Lightning's broadcast at every batch of `ddp` the ranks that only receive send 114 or
180 bytes; in a barrier each of two ranks sends about 300 to 500.

What the raw counters hold beyond the payload
---------------------------------------------
With segmentation offload the kernel hands a veth pair segments of up to 64 KiB, each counted with one header: the ratio
of counted to reported bytes is 1.002 to 1.004, and 1.0004 after taking off 66 bytes per packet; what then remains is
gloo's 48 bytes per message. With `--no-offload` there are packets of 1500 bytes, as on a wire: 66 bytes of headers for
1448 of payload are 4.6 %, and acknowledgements, most of which ride on data that goes the other way, are another 0.3 %.
The raw ratio is 1.047 to 1.0495, so just within the 5 %, and again 1.0004 without headers.

Quantized gradients are a quarter of the bytes in more messages per byte, each of which two ranks exchange directly: the
ratio of `qsgd` is 1.003 to 1.005 with offload and, as more acknowledgements travel alone, 1.05 to 1.06 without. So it
is judged by what is in the packets, which is 1.0006 (two hosts) to 1.0015 (four) in either case.

The messages and acknowledgements of a round cost 3.5 kB however little it averages (with two hosts), so the ratio of a
payload below some 70 kB is above 1.05 (`--width 50`). A segment that was sent again is counted again; the column "sent
again" tells how many were.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.baselines import QSGDStrategy
from benchmarks.hosts import INTERFACE, Host, HostsUnavailableError, hosts, read_counters, read_retransmitted
from lightning_adpsgd import AdaptivePeriod, ADPSGDStrategy, AveragingRound, CommunicationMonitor
from lightning_adpsgd.rounds.record import ring_bytes

RUNS = ("adpsgd", "ddp", "qsgd", "control")
HEADER_BYTES = 66  # of one packet: Ethernet, IPv4, TCP with time stamps
BOUND_BYTES = 100  # per step between rounds: more than a pure acknowledgement, less than gloo's smallest message
TOLERANCE = 0.05
SETTLE_SECONDS = 0.05  # longer than Linux delays an acknowledgement
EPOCHS = 3  # what happens between epochs is to be seen too
BATCH_SIZE = 32
PATIENCE_SECONDS = 120  # without a sign of another rank

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Traffic:
    """What an interface has sent in an interval."""

    bytes: int = 0
    packets: int = 0
    retransmitted: int = 0
    """TCP segments that were sent before."""

    def __add__(self, other: "Traffic") -> "Traffic":
        """The traffic of both intervals."""
        return Traffic(self.bytes + other.bytes, self.packets + other.packets, self.retransmitted + other.retransmitted)

    def __sub__(self, other: "Traffic") -> "Traffic":
        """What was sent since ``other`` was counted."""
        return Traffic(self.bytes - other.bytes, self.packets - other.packets, self.retransmitted - other.retransmitted)


class Account(NamedTuple):
    """What one rank's interface has counted in a fit, and what the package says it should be."""

    rank: int
    steps: int
    rounds: int
    """Averaging rounds; under DDP and QSGD, steps: each averages gradients."""
    between_bytes: list[int]
    """For each step, everything that was not sent by a round (under DDP and QSGD, by forward and backward)."""
    round_bytes: list[int]
    """For each round, what it sent."""
    packets: int
    """Of all rounds together."""
    retransmitted: int
    """TCP segments of all rounds together that were sent more than once."""
    reported_bytes: int
    """What the package says that all rounds together have sent."""
    ddp_bytes: int
    """What the package says that DDP would have sent in these steps."""

    @property
    def counted_bytes(self) -> int:
        """What the interface says that all rounds together have sent."""
        return sum(self.round_bytes)

    @property
    def ratio(self) -> float:
        """Counted to reported bytes, headers and all."""
        return self.counted_bytes / self.reported_bytes

    @property
    def ratio_without_headers(self) -> float:
        """The same for what is in the packets."""
        return (self.counted_bytes - HEADER_BYTES * self.packets) / self.reported_bytes


# On each rank


class Network(L.LightningModule):
    """Linear layers with BatchNorm; a million parameters at the default width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (32, width, 2 * width, width)
        hidden = [
            nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU())
            for inputs, outputs in itertools.pairwise(sizes)
        ]
        self.network = nn.Sequential(*hidden, nn.Linear(width, 10))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy of a batch of this rank's share."""
        inputs, labels = batch
        return F.cross_entropy(self.network(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Handshake:
    """Where ranks wait for each other without a network: a file that all of them map into memory.

    Args:
        file: holds one int64 per rank, 0 at first.
        rank: the caller's.
    """

    def __init__(self, file: Path, rank: int) -> None:
        self._arrivals = np.memmap(file, dtype=np.int64, mode="r+")
        self._rank = rank

    def meet(self) -> None:
        """Wait until every rank has come here as often as this one.

        Raises:
            TimeoutError: if one does not come.
        """
        self._arrivals[self._rank] += 1
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self._arrivals.min() < self._arrivals[self._rank]:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"Rank {self._rank} has waited {PATIENCE_SECONDS} s for rank {int(self._arrivals.argmin())} to read"
                    " its counters; see whether that rank has failed."
                )
            time.sleep(0.0002)


class InterfaceReader(Callback):
    """Reads this host's counters around everything that may communicate, and books each byte once.

    Args:
        meeting: of all ranks.
        settle_seconds: how long to wait for the last acknowledgements of communication that is meant to be.
    """

    def __init__(self, meeting: Handshake, settle_seconds: float) -> None:
        self.rounds: list[Traffic] = []
        """Of each averaging round; under DDP and QSGD, of each step's forward and backward pass."""
        self.between: list[Traffic] = []
        """Of each step: all else."""
        self._meeting = meeting
        self._settle_seconds = settle_seconds
        self._counted = Traffic()
        self._averages_gradients = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Be told of rounds, if there are any."""
        if isinstance(trainer.strategy, ADPSGDStrategy):
            trainer.strategy.subscribe(self._on_round)
        else:
            self._averages_gradients = True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Close the interval between two steps; before the first one ranks have met and agreed on weights."""
        if trainer.global_step == 0:
            self._sent(settle=True)
        else:
            self._book_between(trainer.global_step, self._sent())

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Close the interval of forward and backward; a round comes after the optimizer's step."""
        if self._averages_gradients:
            self.rounds.append(self._sent(settle=True))
        else:
            self._book_between(trainer.global_step + 1, self._sent())

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the last step's interval; a round may come when training ends."""
        self._book_between(trainer.global_step, self._sent())

    def _on_round(self, round_: AveragingRound) -> None:
        self.rounds.append(self._sent(settle=True))

    def _book_between(self, step: int, sent: Traffic) -> None:
        self.between += [Traffic()] * (step - len(self.between))
        self.between[step - 1] += sent

    def _sent(self, settle: bool = False) -> Traffic:
        """What was sent since the last call, read while no rank does anything else."""
        self._meeting.meet()
        if settle:
            time.sleep(self._settle_seconds)
        before, counters = self._counted, read_counters()
        self._counted = Traffic(counters.tx_bytes, counters.tx_packets, read_retransmitted())
        self._meeting.meet()
        return self._counted - before


class BarrierAtEveryStep(Callback):
    """The smallest collective, where there must be none."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Communicate."""
        trainer.strategy.barrier()


def run_rank(options: argparse.Namespace) -> None:
    """All runs, on this rank; leaves its accounts in the folder of the run."""
    rank = int(os.environ["RANK"])
    meeting = Handshake(options.rank_folder / "meeting", rank)
    accounts = {run: measure(run, rank, meeting, options) for run in options.strategy}
    (options.rank_folder / f"{rank}.json").write_text(json.dumps(accounts))


def measure(run: str, rank: int, meeting: Handshake, options: argparse.Namespace) -> Account:
    """Fit, and account for what this rank's interface has sent meanwhile."""
    torch.manual_seed(0)
    reader, monitor = InterfaceReader(meeting, options.settle), CommunicationMonitor()
    callbacks: dict[str, list[Callback]] = {
        "adpsgd": [reader, monitor],
        "ddp": [reader],
        "qsgd": [reader],
        "control": [reader, monitor, BarrierAtEveryStep()],
    }
    strategy = _strategy(run)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=options.hosts,
        strategy=strategy,
        callbacks=callbacks[run],
        max_steps=options.steps,
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    network = Network(options.width)
    trainer.fit(network, _loader(options))

    total = sum(reader.rounds, Traffic())
    # Where gradients are averaged, the monitor has nothing to record: its formula, over gradients that are there.
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in network.parameters() if p.grad is not None)
    formula = ring_bytes(trainer.global_step * gradients, trainer.world_size)
    reported = by_ddp = formula
    if isinstance(strategy, ADPSGDStrategy):
        summary = monitor.summary()
        reported, by_ddp = summary["sent_bytes"], summary["sent_bytes_ddp"]
    elif isinstance(strategy, QSGDStrategy):
        reported = strategy.sent_bytes
    return Account(
        rank=rank,
        steps=trainer.global_step,
        rounds=len(reader.rounds),
        between_bytes=[traffic.bytes for traffic in reader.between],
        round_bytes=[traffic.bytes for traffic in reader.rounds],
        packets=total.packets,
        retransmitted=total.retransmitted,
        reported_bytes=reported,
        ddp_bytes=by_ddp,
    )


def _strategy(run: str) -> Strategy:
    if run == "ddp":
        return DDPStrategy(broadcast_buffers=False)
    if run == "qsgd":
        return QSGDStrategy(broadcast_buffers=False)
    return ADPSGDStrategy(period=AdaptivePeriod())


def _loader(options: argparse.Namespace) -> DataLoader:
    inputs = torch.randn(math.ceil(options.steps / EPOCHS) * BATCH_SIZE * options.hosts, 32)
    labels = inputs[:, :10].argmax(dim=1)
    return DataLoader(TensorDataset(inputs, labels), batch_size=BATCH_SIZE, shuffle=True)


# All ranks together


class RankFailedError(RuntimeError):
    """A rank has ended without its accounts."""


def run_all(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, list[Account]]:
    """Start one rank per host, wait, and collect their accounts.

    Args:
        options: the parsed command line.
        arguments: the command line, for the ranks.

    Returns:
        For each run the accounts of all ranks, in order.

    Raises:
        HostsUnavailableError: if there can be no hosts.
        RankFailedError: if a rank fails; with the end of what it has printed.
    """
    with tempfile.TemporaryDirectory(prefix="interface-bytes-") as name:
        folder = Path(name)
        np.zeros(options.hosts, dtype=np.int64).tofile(folder / "meeting")
        with hosts(options.hosts, offload=options.offload) as cluster:
            _wait([_start(rank, cluster, folder, arguments) for rank in range(options.hosts)], folder)
        written = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(options.hosts)]
    return {run: [Account(*accounts[run]) for accounts in written] for run in options.strategy}


def _start(rank: int, cluster: Sequence[Host], folder: Path, arguments: Sequence[str]) -> "subprocess.Popen[bytes]":
    environment = {
        **os.environ,
        "MASTER_ADDR": cluster[0].address,
        "MASTER_PORT": "29500",  # nobody else is in these namespaces
        "WORLD_SIZE": str(len(cluster)),
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "GROUP_RANK": str(rank),
        "NODE_RANK": str(rank),
        "TORCHELASTIC_RUN_ID": "interface_bytes",  # by this Lightning knows torchrun
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "OMP_NUM_THREADS": "1",  # as torchrun does: ranks share this machine's cores
    }
    command = [sys.executable, "-m", "benchmarks.interface_bytes", *arguments, "--rank-folder", str(folder)]
    with open(folder / f"{rank}.log", "wb") as log:
        return cluster[rank].start(command, env=environment, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT)


def _wait(processes: Sequence["subprocess.Popen[bytes]"], folder: Path) -> None:
    codes: list[int | None] = [None]
    # One that failed keeps the others waiting: then they need not be waited for.
    while None in codes and not any(codes):
        time.sleep(0.05)
        codes = [process.poll() for process in processes]
    for rank, code in enumerate(codes):
        if code:
            lines = (folder / f"{rank}.log").read_text(errors="replace").splitlines()
            end = "\n".join(lines[-30:])
            raise RankFailedError(f"Rank {rank} ended with exit code {code}. It printed last:\n{end}")


# What is found


def complaints(runs: Mapping[str, Sequence[Account]]) -> list[str]:
    """What is not as claimed; nothing if all is."""
    return [complaint for run, accounts in runs.items() for complaint in _complaints(run, accounts)] + [
        f"Rank {ddp.rank} has sent {ddp.counted_bytes / ddp.steps:,.0f} bytes of gradients per step under DDP, but"
        f" CommunicationMonitor claims {adpsgd.ddp_bytes / adpsgd.steps:,.0f}."
        for adpsgd, ddp in zip(runs.get("adpsgd", ()), runs.get("ddp", ()), strict=False)
        if not _agree((ddp.counted_bytes / ddp.steps) / (adpsgd.ddp_bytes / adpsgd.steps))
    ]


def _complaints(run: str, accounts: Sequence[Account]) -> Iterator[str]:
    for account in accounts:
        # On the smaller messages of QSGD, headers alone can be more than the tolerance.
        if not _agree(account.ratio_without_headers if run == "qsgd" else account.ratio):
            yield (
                f"{run}: rank {account.rank} has sent {account.counted_bytes:,} bytes where {account.reported_bytes:,}"
                f" are reported: a ratio of {account.ratio:.4f}, more than {TOLERANCE:.0%} off. It is"
                f" {account.ratio_without_headers:.4f} without the headers of {account.packets:,} packets; segments"
                f" sent again: {account.retransmitted}."
            )
        loud = [step for step, sent in enumerate(account.between_bytes, start=1) if sent > BOUND_BYTES]
        if run == "adpsgd" and loud:
            yield (
                f"{run}: rank {account.rank} has sent more than {BOUND_BYTES} bytes outside of rounds in {len(loud)} of"
                f" {account.steps} steps, at most {max(account.between_bytes):,}; the first is step {loud[0]}."
                " Something communicates between averaging rounds."
            )
        if run == "control" and len(loud) < account.steps:
            yield (
                f"{run}: rank {account.rank} had a barrier in each of {account.steps} steps, but only in {len(loud)} of"
                f" them did its interface send more than {BOUND_BYTES} bytes outside of rounds. The measurement is"
                " blind: it cannot show that there is no communication."
            )


def _agree(ratio: float) -> bool:
    return abs(ratio - 1.0) <= TOLERANCE


def table(runs: Mapping[str, Sequence[Account]]) -> str:
    """The accounts, one line per run and rank."""
    header = [
        f"{'run':<8}{'rank':>5}{'steps':>6}{'rounds':>7}  {'between rounds [B]':^21}  {'in rounds [B]':^27}"
        f"  {'ratio':>7}{'without':>9}{'sent':>7}",
        f"{'':<26}  {'max a step':>11}{'total':>10}  {'counted':>13}{'reported':>14}  "
        f"{'':>7}{'headers':>9}{'again':>7}",
    ]
    lines = [
        f"{run:<8}{a.rank:>5}{a.steps:>6}{a.rounds:>7}  {max(a.between_bytes):>11,}{sum(a.between_bytes):>10,}"
        f"  {a.counted_bytes:>13,}{a.reported_bytes:>14,}  {a.ratio:>7.4f}{a.ratio_without_headers:>9.4f}"
        f"{a.retransmitted:>7,}"
        for run, accounts in runs.items()
        for a in accounts
    ]
    return "\n".join([*header, "-" * len(header[0]), *lines])


def _as_json(runs: Mapping[str, Sequence[Account]], options: argparse.Namespace, found: Sequence[str]) -> str:
    derived = ("counted_bytes", "ratio", "ratio_without_headers")
    return json.dumps(
        {
            "hosts": options.hosts,
            "offload": options.offload,
            "parameters": _parameter_count(options.width),
            "bound_bytes": BOUND_BYTES,
            "tolerance": TOLERANCE,
            "complaints": list(found),
            "runs": {
                run: [account._asdict() | {name: getattr(account, name) for name in derived} for account in accounts]
                for run, accounts in runs.items()
            },
        },
        indent=1,
    )


def _parameter_count(width: int) -> int:
    return sum(parameter.numel() for parameter in Network(width).parameters())


# The command


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(arguments)
    if options.rank_folder is not None:
        run_rank(options)
        return 0
    try:
        runs = run_all(options, arguments)
    except (HostsUnavailableError, RankFailedError) as error:
        print(f"Nothing was measured. {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the hosts are removed.", file=sys.stderr)
        return 130
    found = complaints(runs)
    packets = "segments of up to 64 KiB (offload)" if options.offload else "packets of 1500 bytes"
    print(f"{options.hosts} hosts, {_parameter_count(options.width):,} parameters, bytes counted in {packets}\n")
    print(table(runs))
    print("\n" + "\n".join(found or ["All as claimed."]))
    if options.json is not None:
        options.json.write_text(_as_json(runs, options, found))
    return 1 if found else 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.interface_bytes",
        description="Compare the bytes that each host's interface counts with those that the package reports.",
    )
    parser.add_argument("--hosts", type=_at_least(2), default=2, metavar="N", help="hosts, one rank each (2)")
    parser.add_argument("--strategy", nargs="+", choices=RUNS, default=RUNS, help="what to run (all four)")
    parser.add_argument(
        "--steps", type=_at_least(1), default=120, metavar="N", help="optimizer steps of each run (120)"
    )
    parser.add_argument("--width", type=_at_least(1), default=500, metavar="N", help="of the network's layers (500)")
    parser.add_argument(
        "--settle",
        type=_at_least(0, float),
        default=SETTLE_SECONDS,
        metavar="SECONDS",
        help="wait for acknowledgements after each round (0.05)",
    )
    parser.add_argument(
        "--no-offload", dest="offload", action="store_false", help="count packets of 1500 bytes, as on a wire"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    parser.add_argument("--rank-folder", type=Path, help=argparse.SUPPRESS)  # how ranks are started
    options = parser.parse_args(arguments)
    options.strategy = list(dict.fromkeys(options.strategy))
    if options.rank_folder is None and options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.absolute().parent}; make it first.")
    return options


def _at_least(least: int, kind: type = int) -> Callable[[str], Any]:
    def number(given: str) -> Any:
        with contextlib.suppress(ValueError):
            if least <= kind(given) < math.inf:
                return kind(given)
        raise argparse.ArgumentTypeError(f"expected {kind.__name__} of at least {least}, got {given!r}")

    return number


if __name__ == "__main__":
    sys.exit(main())
