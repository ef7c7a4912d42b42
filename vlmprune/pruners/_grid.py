"""Cut an item's picture into as many cells as tokens are to stay."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.contract import Geometry


def shares(sizes: Tensor, total: int) -> Tensor:
    """Split `total`, at most their sum, over `sizes` (int64 [G]) in proportion: largest remainders, then the first."""
    whole = max(int(sizes.sum()), 1)
    floors = sizes * total // whole
    largest = (sizes * total - floors * whole).sort(descending=True, stable=True).indices
    floors[largest[: total - int(floors.sum())]] += 1
    return floors


def cell_of(geometry: Geometry, keep: int) -> Tensor:
    """Divide an item's N tokens into `keep` rectangular cells as even and as square as the grid allows.

    Every tile or frame gets its share of the cells by its size (largest remainders). Tokens that show no place (line
    breaks) get a cell of their own only when there are more cells than places.

    Returns:
        int64 [N], the cell of each token in 0..keep-1, -1 for a token that is in none. No cell is empty.
    """
    cell = torch.full((len(geometry),), -1, device="cpu")
    placed = ~geometry.placeless
    sizes = torch.bincount(geometry.plane[placed], minlength=len(geometry.grids))
    places = min(keep, int(sizes.sum()))
    first = 0
    for plane, ((rows, cols), share) in enumerate(zip(geometry.grids, shares(sizes, places).tolist())):
        if not share:
            continue
        here = placed & (geometry.plane == plane)
        bands = max(1, min(rows, share, round((share * rows / cols) ** 0.5)), -(-share // cols))
        band = geometry.row[here] * bands // rows
        begin = band * share // bands
        width = (band + 1) * share // bands - begin
        cell[here] = first + begin + geometry.col[here] * width // cols
        first += share
    loose = geometry.placeless.nonzero().flatten()[: keep - places]
    cell[loose] = first + torch.arange(len(loose), device="cpu")
    return cell


def centres(geometry: Geometry, cell: Tensor, keep: int) -> Tensor:
    """int64 [keep]: of each cell, the token in its middle (up and left of it where there are two)."""
    inside = (cell >= 0).nonzero().flatten()
    number = cell[inside]

    def middle(place: Tensor) -> Tensor:
        low = torch.zeros(keep, dtype=torch.int64, device="cpu").scatter_reduce(
            0, number, place, "amin", include_self=False
        )
        high = torch.zeros(keep, dtype=torch.int64, device="cpu").scatter_reduce(
            0, number, place, "amax", include_self=False
        )
        return ((low + high) // 2)[number]

    row, col = geometry.row[inside], geometry.col[inside]
    offset = (row - middle(row)).abs() + (col - middle(col)).abs()
    best = torch.full((keep,), len(geometry), device="cpu").scatter_reduce(0, number, offset, "amin")
    nearest = torch.where(offset == best[number], inside, len(geometry))
    return torch.full((keep,), len(geometry), device="cpu").scatter_reduce(0, number, nearest, "amin")
