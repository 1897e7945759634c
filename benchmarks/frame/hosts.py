"""Several hosts on one machine: network namespaces joined by a switch, each with its own interface and counters.

    with hosts(3, rate_mbit=1000) as cluster:
        processes = [host.start([sys.executable, "train.py"], env=...) for host in cluster]
        ...
        print(cluster[0].counters().tx_bytes)

A process on one of them reads the same counters with :class:`Interface`. Linux and root only.
"""

import ctypes
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.frame.errors import HostsUnavailableError

INTERFACE = "eth0"  # the name of every host's interface
HEADER_BYTES = 66  # of one packet: Ethernet (14), IPv4 (20), TCP with time stamps (32)

_NAMESPACES = Path("/run/netns")  # where iproute2 keeps the names
_NETWORK = 0x40000000  # CLONE_NEWNET
_serial = itertools.count()  # a process may lay out several clusters


class Counters(NamedTuple):
    """What an interface has counted since it was made; bytes include Ethernet, IP and TCP headers."""

    tx_bytes: int
    rx_bytes: int
    tx_packets: int
    rx_packets: int


class Interface:
    """An interface of the calling process's own network namespace; reading its counters takes microseconds.

    Start the process with :meth:`Host.start` or ``ip netns exec``, which mount the namespace's ``/sys``. A process that
    enters a namespace by itself still sees the interfaces of the one it came from.
    """

    def __init__(self, name: str = INTERFACE) -> None:
        folder = Path("/sys/class/net") / name / "statistics"
        self._files = [os.open(folder / counter, os.O_RDONLY) for counter in Counters._fields]

    def counters(self) -> Counters:
        """What it has counted so far."""
        return Counters(*(int(os.pread(file, 32, 0)) for file in self._files))


def read_retransmitted() -> int:
    """TCP segments of up to 1448 bytes that the calling process's network namespace has sent more than once."""
    names, values = (line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line[:4] == "Tcp:")
    return int(values[names.index("RetransSegs")])


class Host:
    """One network namespace, with a loopback and an interface ``eth0``.

    Args:
        name: of the namespace, as in ``ip netns exec NAME``.
        address: of ``eth0``; only the other hosts reach it.
        port: where its cable ends: the namespace of the switch, and the interface there.
    """

    def __init__(self, name: str, address: str, port: tuple[str, str] = ("", "")) -> None:
        self.name = name
        self.address = address
        self.interface = INTERFACE
        self._port = port
        self._processes: list[subprocess.Popen[Any]] = []

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command line that runs ``arguments`` on this host."""
        return ["ip", "netns", "exec", self.name, *arguments]

    def start(self, arguments: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
        """Start a process with options of ``Popen``; it is killed with all its children when the hosts are removed."""
        # In its own session: Ctrl-C reaches only the process that laid out the hosts, which then ends the others.
        process = subprocess.Popen(self.command(arguments), start_new_session=True, **options)
        self._processes.append(process)
        return process

    def enter(self) -> None:
        """Move the calling process onto this host; its threads that run already stay where they are."""
        libc = ctypes.CDLL(None, use_errno=True)  # os.setns is there from Python 3.12 on
        with open(_NAMESPACES / self.name) as namespace:
            if libc.setns(namespace.fileno(), _NETWORK) != 0:
                raise OSError(ctypes.get_errno(), f"{self!r} could not be entered: {os.strerror(ctypes.get_errno())}")

    def unplug(self) -> None:
        """Cut this host off: what is sent to it and by it is lost, and nobody is told."""
        self._plug("down")

    def plug_in(self) -> None:
        """Undo :meth:`unplug`."""
        self._plug("up")

    def _plug(self, state: str) -> None:
        # At the switch: an interface that is set down at the host would forget the addresses of the others.
        switch, port = self._port
        _ip("-n", switch, "link", "set", port, state)

    def stop(self) -> None:
        """Kill what :meth:`start` has started."""
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its session, so its children too
            process.wait()
        self._processes.clear()

    def counters(self) -> Counters:
        """This host's counters, read from outside."""
        shown = _ip("-n", self.name, "-json", "-statistics", "link", "show", INTERFACE)
        sent, received = (json.loads(shown)[0]["stats64"][direction] for direction in ("tx", "rx"))
        return Counters(sent["bytes"], received["bytes"], sent["packets"], received["packets"])

    def __repr__(self) -> str:
        return f"Host({self.name!r}, {self.address!r})"


@contextmanager
def hosts(count: int, *, rate_mbit: float | None = None, offload: bool = True) -> Iterator[list[Host]]:
    """Lay out hosts that reach each other and nothing else; remove them, and what runs on them, at the end.

    They are also removed after an error, Ctrl-C, SIGTERM and SIGHUP. Only the hosts' own traffic passes their
    interfaces: IPv6 is off (no neighbour discovery, no multicast reports), addresses are resolved beforehand (no ARP),
    and the switch has no address.

    Args:
        count: number of hosts, 1 to 250.
        rate_mbit: speed of each host's link in each direction, in 10⁶ bits per second; None is no limit.
        offload: pass TCP's data on in segments of up to 64 KiB, each counted as one packet. False cuts them into
            packets of 1500 bytes first, so that the counters show what a wire would see, headers included. At a low
            ``rate_mbit`` the queue cuts them in either case.

    Yields:
        The hosts, with addresses 10.77.0.1, 10.77.0.2 and so on.

    Raises:
        HostsUnavailableError: if this machine or this user cannot make network namespaces; says what is missing.
    """
    _require(shaping=rate_mbit is not None)
    prefix = f"adpsgd-{os.getpid()}-{next(_serial)}"
    switch = f"{prefix}-switch"
    cluster = [
        Host(f"{prefix}-{index}", f"10.77.0.{index + 1}", port=(switch, f"port{index}")) for index in range(count)
    ]
    names = [switch, *(host.name for host in cluster)]
    with termination_raises():
        try:
            _lay_out(switch, cluster)
            if not offload:
                for host in cluster:
                    _ip("-n", host.name, "link", "set", INTERFACE, "gso_max_segs", "1")
            if rate_mbit is not None:
                _shape(switch, cluster, rate_mbit)
            yield cluster
        finally:
            with _undisturbed():
                for host in cluster:
                    host.stop()
                # Deleting a namespace deletes its interfaces, and with one end of a pair the other.
                for name in names:
                    if (_NAMESPACES / name).exists():
                        _ip("netns", "delete", name)


# Layout


def _lay_out(switch: str, cluster: Sequence[Host]) -> None:
    for name in (switch, *(host.name for host in cluster)):
        _ip("netns", "add", name)
        _without_ipv6(name)
    # In its own namespace the bridge is independent of this machine's firewall and of the names of its interfaces.
    # Without snooping it sends no multicast queries.
    _ip_batch(switch, ["link add bridge type bridge mcast_snooping 0", "link set bridge up"])
    for index, host in enumerate(cluster):
        pair = f"link add {INTERFACE} address {_mac(index)} type veth peer name port{index} netns {switch}"
        known = [
            f"neighbour add {other.address} lladdr {_mac(place)} dev {INTERFACE} nud permanent"
            for place, other in enumerate(cluster)
            if other is not host
        ]
        up = ["link set lo up", f"link set {INTERFACE} up", f"address add {host.address}/24 dev {INTERFACE}"]
        _ip_batch(host.name, [pair, *up, *known])
        _ip_batch(switch, [f"link set port{index} master bridge", f"link set port{index} up"])
    for name in (switch, *(host.name for host in cluster)):
        _in_order(name)


def _without_ipv6(name: str) -> None:
    # Before there is any interface: new ones get the default. The files are absent if the kernel has no IPv6.
    _write(name, "/proc/sys/net/ipv6/conf/*/disable_ipv6", "1")


def _in_order(name: str) -> None:
    # A veth pair delivers a packet on the sender's CPU, so packets overtake each other when the sender moves to another
    # CPU. TCP assumes they are lost and sends them again, up to 2 % of all bytes. Receive packet steering gives every
    # connection one CPU. The files are absent if the kernel cannot do it.
    cpus = (1 << min(os.cpu_count() or 1, 32)) - 1
    _write(name, "/sys/class/net/*/queues/rx-0/rps_cpus", f"{cpus:x}")


def _shape(switch: str, cluster: Sequence[Host], rate_mbit: float) -> None:
    # A bucket of 2 ms limits bursts that pass unshaped; less than 16 KiB would limit the rate of fast links.
    burst = max(16 * 1024, int(rate_mbit * 1e6 / 8 * 0.002))
    bucket = ["root", "tbf", "rate", f"{int(rate_mbit * 1e6)}bit", "burst", str(burst), "latency", "50ms"]
    for index, host in enumerate(cluster):
        # Queues shape what is sent: at the host its own traffic, at the switch the traffic to the host.
        _run(["tc", "-n", host.name, "qdisc", "add", "dev", INTERFACE, *bucket])
        _run(["tc", "-n", switch, "qdisc", "add", "dev", f"port{index}", *bucket])


def _mac(index: int) -> str:
    return f"02:00:00:00:00:{index + 1:02x}"  # locally administered


# Commands


def _ip(*arguments: str) -> str:
    return _run(["ip", *arguments])


def _ip_batch(name: str, lines: Sequence[str]) -> None:
    _run(["ip", "-n", name, "-batch", "-"], "\n".join(lines) + "\n")


def _write(name: str, pattern: str, value: str) -> None:
    """Write a kernel setting of a namespace, into every file that matches."""
    script = f"for file in {pattern}; do if [ -w $file ]; then echo {value} > $file; fi; done"
    _run(["ip", "netns", "exec", name, "sh", "-ec", script])


def _run(command: Sequence[str], given: str | None = None) -> str:
    finished = subprocess.run(command, input=given, capture_output=True, text=True)
    if finished.returncode != 0:
        raise HostsUnavailableError(
            f"`{' '.join(command)}` failed with exit code {finished.returncode}:"
            f" {finished.stderr.strip() or 'no message'}. Laying out hosts needs the capability CAP_SYS_ADMIN and a"
            " kernel with network namespaces, veth and bridge (with rate_mbit also sch_tbf); in a container, start it"
            " privileged."
        )
    return finished.stdout


# What can go wrong


def _require(shaping: bool) -> None:
    if not sys.platform.startswith("linux"):
        raise HostsUnavailableError(f"Network namespaces exist on Linux only; this is {sys.platform}.")
    missing = [tool for tool in ("ip", *(("tc",) if shaping else ())) if shutil.which(tool) is None]
    if missing:
        raise HostsUnavailableError(f"Not found: {' and '.join(missing)}. Install iproute2.")
    if os.geteuid() != 0:
        raise HostsUnavailableError("Only root makes network namespaces: run this with sudo.")


@contextmanager
def termination_raises() -> Iterator[None]:
    """Turn signals that would end the process without cleaning up into an exception."""

    def leave(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    # Not those that are already handled or, as under nohup, ignored.
    deadly = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    with _handling(deadly, leave):
        yield


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore signals, so that a second Ctrl-C does not leave hosts behind."""
    with _handling((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), signal.SIG_IGN):
        yield


@contextmanager
def _handling(numbers: Sequence[signal.Signals], handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = [(number, signal.signal(number, handler)) for number in numbers]
    try:
        yield
    finally:
        for number, previous in before:
            signal.signal(number, previous)
