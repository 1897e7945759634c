"""Sockets that processes listen on, as Linux shows them in /proc."""

import contextlib
import os
import subprocess
from collections.abc import Collection

from benchmarks.frame.hosts import Host

_LISTENING = "0A"
_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")


def listening_sockets(pid: int) -> set[str]:
    """The inodes of the TCP sockets that a process has open and something listens on; empty if it has ended."""
    links, text = [], ""
    with contextlib.suppress(OSError):
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                links.append(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
    for table in _TABLES:
        with contextlib.suppress(OSError), open(table.replace("/proc/", f"/proc/{pid}/")) as file:
            text += file.read()
    return set(_ports(text)) & {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}


def ports_held(host: Host, sockets: Collection[str]) -> list[int]:
    """The ports of those of some sockets that something on a host still listens on, whoever has them open."""
    shown = subprocess.run(host.command(["cat", *_TABLES]), capture_output=True, text=True)  # one may be missing
    return sorted(port for socket, port in _ports(shown.stdout).items() if socket in sockets)


def _ports(text: str) -> dict[str, int]:
    """The port of each socket that something listens on, by inode."""
    lines = [line.split() for line in text.splitlines() if "local_address" not in line]
    return {fields[9]: int(fields[1].rpartition(":")[2], 16) for fields in lines if fields[3] == _LISTENING}
