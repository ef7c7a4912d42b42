from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmprune.contract import Pruner, Selection, Sizes, VisualTokens
from vlmprune.pruners._grid import cell_of, centres
from vlmprune.registry import register_pruner


@register_pruner
@dataclass(kw_only=True)
class Pool(Pruner):
    """Adaptive average pooling: cut the picture into `keep` equal cells and put the mean of each in its middle token.

    The baseline for merging methods: no token is lost, all are blurred.
    """

    name: ClassVar[str] = "pool"
    paper: ClassVar[str] = "baseline"

    def selection_flops(self, sizes: Sizes) -> int:
        return 0

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        keeps = budget.tolist()
        cells = [cell_of(geometry, keep) for geometry, keep in zip(tokens.geometry, keeps)]
        picks = [centres(geometry, cell, keep) for geometry, cell, keep in zip(tokens.geometry, cells, keeps)]
        device = tokens.features.device
        # Tokens in no cell, and padding, go to a row of their own behind the last.
        most = max(keeps)
        cell = pad_sequence([torch.where(c < 0, most, c) for c in cells], batch_first=True, padding_value=most)
        cell = cell.to(device, non_blocking=True)[..., None]
        rows = tokens.features.float()
        total = rows.new_zeros(len(keeps), most + 1, rows.shape[-1])
        total = total.scatter_add(1, cell.expand_as(rows), rows)
        size = rows.new_zeros(len(keeps), most + 1, 1).scatter_add(1, cell, torch.ones_like(rows[..., :1]))
        means = (total / size.clamp(min=1))[:, :most].to(tokens.features.dtype)
        index = pad_sequence(picks, batch_first=True, padding_value=-1).to(device, non_blocking=True)
        return Selection(index, means)
