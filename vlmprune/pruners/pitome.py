from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune.contract import Patches, Presets, Sizes
from vlmprune.kernels import bipartite_flops, bipartite_match, pairwise_cosine
from vlmprune.kernels.merge import Matching
from vlmprune.pruners._merging import OTHERWISE, Merging
from vlmprune.pruners.tome import soft_match
from vlmprune.registry import register_pruner


@register_pruner
@dataclass(kw_only=True)
class PiToMe(Merging):
    """Merge patches of large similar clusters behind every layer of the vision tower; protect the isolated ones.

    Tran et al., "Accelerating Transformers with Spectrum-Preserving Token Merging", NeurIPS 2024, arXiv 2405.16148.
    Each patch has an energy (equation 4): the mean over all patches of how far their cosine similarity exceeds a
    `margin` that shrinks with depth, below it `alpha` (exp(x - margin) - 1). The pairs come from the patches of highest
    energy, split alternately; merged rows are means weighted by size. As published for LLaVA-1.5, the first half of the
    tower merges as ToMe does, similarity is that of the layer's output, and the same share is left behind each layer.
    Training-free, blind to the question.

    A merged row keeps the place of the patch that was merged into. `keep` is of each picture's patches; rows that
    unpadding cuts away and line breaks are dropped on top. `where="boundary"` merges once behind the projector.
    """

    margin: float = 0.9
    alpha: float = 1.0

    name: ClassVar[str] = "pitome"
    paper: ClassVar[str] = "arXiv 2405.16148"
    otherwise: ClassVar[str] = OTHERWISE
    # Left of each layer 0.9, 0.95 or 0.975; 23 of 24 layers make the features.
    presets: ClassVar[Presets] = {"llava-1.5": {tokens: {"keep": tokens} for tokens in (54, 183, 330)}}

    def goal(self, count: int, keep: int, layer: int, depth: int) -> int:
        return max(keep, round(count * (keep / count) ** ((layer + 1) / depth)))

    def metric(self, patches: Patches) -> Tensor:
        return patches.features

    def match(self, metric: Tensor, pairs: int, prefix: int, progress: float) -> Matching:
        if progress < 0.5:
            return soft_match(metric, pairs, prefix)
        energy = cluster_energy(metric[:, prefix:], self.margin * (1 - progress), self.alpha)
        order = energy.sort(dim=1, descending=True, stable=True).indices[:, : 2 * pairs] + prefix
        return bipartite_match(metric, pairs, order=order)

    def metric_flops(self, rows: int, sizes: Sizes) -> tuple[int, int]:
        return sizes.encoder_width, 0

    def match_flops(self, rows: int, pairs: int, prefix: int, progress: float, width: int) -> int:
        if progress < 0.5:
            return bipartite_flops(rows, width)
        return 2 * (rows - prefix) ** 2 * width + bipartite_flops(2 * pairs, width)


BLOCK = 2**22  # entries of a table of similarities


def cluster_energy(metric: Tensor, margin: float, alpha: float) -> Tensor:
    """fp32 [P, T]: equation 4 of PiToMe for rows [P, T, d], a picture's rows among themselves."""
    energy = []
    for block in metric.split(max(1, BLOCK // metric.shape[1]), dim=1):  # a long video's whole table takes gigabytes
        excess = pairwise_cosine(block, metric) - margin
        energy.append(torch.where(excess > 0, excess, alpha * excess.exp().sub(1)).mean(2))
    return torch.cat(energy, dim=1)
