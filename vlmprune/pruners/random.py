from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune.contract import Pruner, Selection, Sizes, VisualTokens
from vlmprune.registry import register_pruner


@register_pruner
@dataclass(kw_only=True)
class Random(Pruner):
    """Keep tokens drawn without replacement. The baseline that every method must beat.

    The draw depends on `seed` and the item's token count alone, so that a prompt keeps the same tokens in any batch;
    average over several seeds.
    """

    seed: int = 0

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "baseline"

    def selection_flops(self, sizes: Sizes) -> int:
        return 0

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        picks = [
            torch.randperm(count, generator=torch.Generator().manual_seed(self.seed), device="cpu")[:keep]
            for count, keep in zip(tokens.counts, budget.tolist())
        ]
        index = torch.nn.utils.rnn.pad_sequence(picks, batch_first=True, padding_value=-1)
        return Selection(index.to(tokens.features.device, non_blocking=True))
