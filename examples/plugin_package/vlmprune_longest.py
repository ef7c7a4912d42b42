"""Keep the visual tokens with the largest norm: a method in a package of its own."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmprune import Keep, Pruner, Selection, VisualTokens


@dataclass(kw_only=True)
class Longest(Pruner):
    """Keep the tokens whose features have the largest `p`-norm."""

    keep: Keep = 0.25
    p: float = 2.0

    name: ClassVar[str] = "longest"
    paper: ClassVar[str] = "an example"

    def select(self, tokens: VisualTokens, budget: torch.Tensor) -> Selection:
        norm = tokens.features.float().norm(p=self.p, dim=-1).masked_fill(~tokens.valid, -1)
        index = norm.sort(dim=1, descending=True, stable=True).indices[:, : int(budget.max())]
        place = torch.arange(index.shape[1], device=index.device)
        return Selection(index.masked_fill(place >= budget.to(index.device)[:, None], -1))
