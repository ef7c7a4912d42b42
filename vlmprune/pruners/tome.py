from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune.contract import Patches, Sizes
from vlmprune.kernels import bipartite_flops, bipartite_match
from vlmprune.kernels.merge import Matching
from vlmprune.pruners._merging import OTHERWISE, Merging
from vlmprune.registry import register_pruner


@register_pruner
@dataclass(kw_only=True)
class ToMe(Merging):
    """Merge the most similar pairs of patches behind every layer of the vision tower.

    Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461, section 3: bipartite soft matching
    on the attention keys (mean over heads); merged rows are means weighted by size; attention is proportional to size
    (equation 1, `proportional`). As many pairs merge behind each layer; one that would have to merge more than half of
    its patches takes several rounds. Training-free, blind to the question; the tower itself gets faster.

    Pairs merge behind the block, not between attention and MLP as in the paper. A merged row keeps the place of the
    patch that was merged into (the official code shuffles). `keep` is of each picture's patches; rows that unpadding
    cuts away and line breaks are dropped on top. `where="boundary"` merges once behind the projector instead, by
    similarity of the features, on any family. Proportional attention needs eager or sdpa attention in the tower.
    """

    proportional: bool = True  # type: ignore[misc]

    name: ClassVar[str] = "tome"
    paper: ClassVar[str] = "arXiv 2210.09461"
    otherwise: ClassVar[str] = OTHERWISE

    def goal(self, count: int, keep: int, layer: int, depth: int) -> int:
        return count - round((count - keep) * (layer + 1) / depth)

    def metric(self, patches: Patches) -> Tensor:
        return patches.keys()

    def match(self, metric: Tensor, pairs: int, prefix: int, progress: float) -> Matching:
        return soft_match(metric, pairs, prefix)

    def metric_flops(self, rows: int, sizes: Sizes) -> tuple[int, int]:
        return sizes.encoder_key, 2 * rows * sizes.encoder_width**2

    def match_flops(self, rows: int, pairs: int, prefix: int, progress: float, width: int) -> int:
        return bipartite_flops(rows, width)


def soft_match(metric: Tensor, pairs: int, prefix: int) -> Matching:
    """Section 3 of ToMe: the best `pairs` between every other row of [P, T, d], without the first `prefix` rows."""
    protected = torch.zeros(metric.shape[:2], dtype=torch.bool, device=metric.device)
    protected[:, :prefix] = True
    return bipartite_match(metric, pairs, protected=protected)
