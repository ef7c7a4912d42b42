from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune.contract import Pruner, Selection, Sizes, VisualTokens
from vlmprune.pruners._grid import cell_of, centres
from vlmprune.registry import register_pruner


@register_pruner
@dataclass(kw_only=True)
class Uniform(Pruner):
    """Keep an even grid of tokens: the middle token of each of `keep` equal cells. A baseline that sees nothing."""

    name: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "baseline"

    def selection_flops(self, sizes: Sizes) -> int:
        return 0

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        picks = [
            centres(geometry, cell_of(geometry, keep), keep) for geometry, keep in zip(tokens.geometry, budget.tolist())
        ]
        index = torch.nn.utils.rnn.pad_sequence(picks, batch_first=True, padding_value=-1)
        return Selection(index.to(tokens.features.device, non_blocking=True))
