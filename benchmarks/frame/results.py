"""Files of results: what was measured, with which settings, and on what machine."""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "lightning", "lightning_adpsgd", "numpy")


def write_json(
    path: str | Path, benchmark: str, arguments: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Write the rows of a benchmark, with the arguments that it ran with, defaults included."""
    content = {
        "benchmark": benchmark,
        "command": [Path(sys.executable).name, "-m", f"benchmarks.{benchmark}", *sys.argv[1:]],
        "arguments": dict(arguments),
        "machine": machine(),
        "rows": [dict(row) for row in rows],
    }
    Path(path).write_text(json.dumps(content, indent=1, default=str) + "\n")


def machine() -> dict[str, Any]:
    """What a measurement depends on: versions and processors."""
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpu_count": os.cpu_count(),
        "cpus_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
