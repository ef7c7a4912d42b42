"""The highest-scoring tokens of each item."""

from __future__ import annotations

import torch
from torch import Tensor


def top_indices(scores: Tensor, budget: Tensor) -> Tensor:
    """int64 [I, K]: of scores [I, N], the `budget` [I] largest of each row, lowest index first in a tie, then -1."""
    index = scores.sort(dim=1, descending=True, stable=True).indices[:, : int(budget.max())]
    place = torch.arange(index.shape[1], device=index.device)
    return index.masked_fill(place >= budget.to(index.device, non_blocking=True)[:, None], -1)
