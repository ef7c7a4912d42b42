"""Merging in rounds: what ToMe and PiToMe share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmprune.contract import Keep, Patches, Pruner, Reduced, Selection, Sizes, VisualTokens, budget, is_all
from vlmprune.kernels import merge_plan, merge_tokens
from vlmprune.kernels.merge import Matching

OTHERWISE = 'set where="boundary", which merges behind the projector'
Match = Callable[[Tensor, int], Matching]
"""(metric [P, T, d], pairs) -> the pairs that merge."""


def merge_rounds(features: Tensor, metric: Tensor, size: Tensor, goal: int, prefix: int, match: Match) -> Reduced:
    """Merge pairs until `goal` rows are left, at most half of them a round; merged rows are means weighted by size.

    Args:
        features: [P, T, C].
        metric: [P, T, d], what similarity is measured on; merged along.
        size: [P, T], weights.
        prefix: rows in front that `match` leaves alone.
    """
    keep = torch.arange(features.shape[1], device=features.device).expand(len(features), -1)
    into = keep
    while (left := features.shape[1]) > goal:
        pairs = min(left - goal, (left - prefix) // 2)
        plan = merge_plan(match(metric, pairs), left, left - pairs)
        features, merged = merge_tokens(features, plan.keep, plan.into, weight=size)
        metric, _ = merge_tokens(metric, plan.keep, plan.into, weight=size)
        keep, into, size = keep.gather(1, plan.keep), plan.into.gather(1, into), merged
    return Reduced(features, keep, into)


def representatives(tokens: VisualTokens) -> Selection:
    """The tokens that stand for a group behind an encoder stage."""
    size = tokens.signal("encoder_kept")
    order = (size <= 0).int().sort(dim=1, stable=True).indices
    size = size.gather(1, order)
    rows = tokens.features.gather(1, order[..., None].expand_as(tokens.features))
    return Selection(order.masked_fill(size <= 0, -1), rows, size > 1)


@dataclass(kw_only=True)
class Merging(Pruner):
    """Merges patches behind the layers of the vision tower, or visual tokens once behind the projector.

    `keep` is of each picture's patches; rows that unpadding cuts away and line breaks are dropped on top.
    """

    keep: Keep = 0.5
    where: str = "encoder"

    stage: ClassVar[str] = "encoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.where not in ("encoder", "boundary"):
            raise ValueError(f'where must be "encoder" or "boundary", got {self.where!r}')

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"encoder_kept"} if self.where == "encoder" else ())

    def encoder_layers(self, depth: int) -> tuple[int, ...]:
        return () if is_all(self.keep) or self.where == "boundary" else tuple(range(depth))

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 1) -> Sequence[int | None]:
        if is_all(self.keep) or self.where == "boundary":
            return super().budget(counts, layer, depth)
        return [None] * len(counts)

    @abstractmethod
    def goal(self, count: int, keep: int, layer: int, depth: int) -> int:
        """Patches, of `count`, left behind `layer` (of `depth`) where `keep` are to be left behind the last."""

    def encoder_rows(self, count: int, layer: int, depth: int) -> int:
        return min(count, self.goal(count, max(1, budget(count, self.keep)), layer, depth))

    @abstractmethod
    def metric(self, patches: Patches) -> Tensor:
        """[P, T, d]: what similarity is measured on inside the tower."""

    @abstractmethod
    def match(self, metric: Tensor, pairs: int, prefix: int, progress: float) -> Matching:
        """Which pairs merge, `progress` (0 to 1) of the way through the tower."""

    @abstractmethod
    def metric_flops(self, rows: int, sizes: Sizes) -> tuple[int, int]:
        """Columns of `metric` inside the tower, and the products that make it of so many rows."""

    @abstractmethod
    def match_flops(self, rows: int, pairs: int, prefix: int, progress: float, width: int) -> int:
        """Products of `match` on so many rows of so many columns."""

    def _rounds_flops(self, rows: int, goal: int, prefix: int, progress: float, width: int) -> int:
        total = 0
        while rows > goal:
            pairs = min(rows - goal, (rows - prefix) // 2)
            total += self.match_flops(rows, pairs, prefix, progress, width)
            rows -= pairs
        return total

    def reduce(self, patches: Patches) -> Reduced | None:
        count = patches.grid[0] * patches.grid[1]
        goal = self.encoder_rows(count, patches.layer, patches.depth) + patches.prefix
        if goal >= patches.features.shape[1]:
            return None
        progress = patches.layer / patches.depth
        return merge_rounds(
            patches.features,
            self.metric(patches),
            patches.size,
            goal,
            patches.prefix,
            lambda metric, pairs: self.match(metric, pairs, patches.prefix, progress),
        )

    def selection_flops(self, sizes: Sizes) -> int:
        if self.where == "boundary":
            return self._rounds_flops(sizes.tokens, sizes.keep, 0, 0.5, sizes.width)
        total = 0
        for down, across in sizes.grids:
            rows = down * across + sizes.prefix
            for layer in self.encoder_layers(sizes.encoder_depth):
                goal = self.encoder_rows(down * across, layer, sizes.encoder_depth) + sizes.prefix
                if goal < rows:
                    progress = layer / sizes.encoder_depth
                    width, made = self.metric_flops(rows, sizes)
                    total += made + self._rounds_flops(rows, goal, sizes.prefix, progress, width)
                    rows = goal
        return total

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        if self.where == "encoder":
            return representatives(tokens)
        done = []
        for rows, count, keep in zip(tokens.features, tokens.counts, budget.tolist()):
            own = rows[None, :count]
            size = torch.ones(own.shape[:2], device=rows.device)
            done.append(merge_rounds(own, own, size, keep, 0, lambda metric, pairs: self.match(metric, pairs, 0, 0.5)))
        merged = [
            torch.zeros_like(each.keep[0]).scatter_add(0, each.into[0], torch.ones_like(each.into[0])) for each in done
        ]
        return Selection(
            pad_sequence([each.keep[0] for each in done], batch_first=True, padding_value=-1),
            pad_sequence([each.features[0] for each in done], batch_first=True),
            pad_sequence([each > 1 for each in merged], batch_first=True),
        )
