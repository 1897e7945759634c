"""The process group of a rank."""

import os
from functools import cache

import torch
import torch.distributed as dist

from benchmarks.frame.rank import ADDRESS, LOOPBACK, LOOPBACK_INTERFACE


@cache
def divide(group_size: int) -> int:
    """Split all ranks into groups, make the calling rank a member of its group only, and return the group's number."""
    group, rank = divmod(int(os.environ["RANK"]), group_size)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(group_size), "LOCAL_WORLD_SIZE": str(group_size)}
    return group


def connect(backend: str = "gloo", port: int | None = None) -> None:
    """Connect the calling rank with the others; it stays connected from order to order.

    Args:
        backend: "gloo" or "nccl". NCCL accepts no two ranks of one host on one GPU, so it is told that each rank is on
            its own host, reached over loopback.
        port: on which the first rank listens; the order's by default.
    """
    if dist.is_initialized():
        return
    if port is not None:
        os.environ["MASTER_PORT"] = str(port)
    if os.environ.get(ADDRESS) == LOOPBACK:
        os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK_INTERFACE
    if backend == "nccl":
        os.environ |= {
            "NCCL_HOSTID": f"rank-{os.environ['RANK']}",
            "NCCL_SOCKET_IFNAME": LOOPBACK_INTERFACE,
            "NCCL_NET": "Socket",
            "NCCL_P2P_DISABLE": "1",
            "NCCL_SHM_DISABLE": "1",
            "NCCL_MNNVL_ENABLE": "0",
        }
    dist.init_process_group(backend, device_id=torch.device("cuda:0") if backend == "nccl" else None)
