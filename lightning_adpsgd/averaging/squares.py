"""Sums of squares per parameter group, added up in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_adpsgd.averaging.tiles import Tile


def sum_of(deviations: Sequence[Tensor], groups: int, device: torch.device) -> Tensor:
    """The sum over several buckets, per parameter group; float64, shape (groups,), on ``device``."""
    total = torch.zeros(groups, dtype=torch.float64, device=device)
    for part in deviations:
        total += part.to(device)
    return total


def add_squares(found: dict[int, list[Tensor]], tile: Tile, values: Tensor) -> None:
    """Append the sum of squares of each run of a tile's ``values`` to ``found``, by parameter group."""
    for group, start, stop in tile.runs:
        part = values[start:stop]
        found[group].append(torch.dot(part, part))


def add_up(found: dict[int, list[Tensor]], groups: int, device: torch.device) -> Tensor:
    """Add up ``found`` per parameter group; float64, shape (groups,)."""
    sums = torch.zeros(groups, dtype=torch.float64, device=device)
    for group, squares in found.items():
        sums[group] = torch.stack(squares).double().sum()
    return sums
