from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmprune.contract import Keep, Positions, Presets, Selection, Sizes, VisualTokens
from vlmprune.pruners._schedule import StagedPruner
from vlmprune.pruners._top import top_indices
from vlmprune.registry import register_pruner


@register_pruner
@dataclass(kw_only=True)
class PyramidDrop(StagedPruner):
    """Halve the visual tokens at three decoder layers, by the attention of the prompt's last token.

    Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction",
    CVPR 2025, arXiv 2410.17247, inference part. Training-free, aware of the question through the last token.

    Before each layer of `layer_list` the tokens left are ranked by the attention row of the last prompt token in that
    very layer (its input norm, queries, keys and positions on the hidden states as they are), mean over heads, softmax
    over all keys; the count is a share of the original tokens, rounded down. Published for 32 layers: layers 8, 16, 24
    with 1/2, 1/4, 1/8, which is keep 0.46875 on average over the layers (270 of 576); positions compact (M-RoPE
    families: original). Any other keep raises the ratios to a common power.

    Unlike the official code: grouped-query models, several images (each ranked by itself, its count its own), fp32.
    """

    keep: Keep = 0.46875
    positions: Positions = "compact"
    layer_list: tuple[int, ...] = (8, 16, 24)
    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)

    name: ClassVar[str] = "pyramiddrop"
    paper: ClassVar[str] = "arXiv 2410.17247"
    stage: ClassVar[str] = "decoder"
    needs: ClassVar[frozenset[str]] = frozenset({"next_last_attention"})
    query_aware: ClassVar[bool] = True
    presets: ClassVar[Presets] = {"llava-1.5": {270: {}}, "llava-next": {0.46875: {}}}

    def selection_flops(self, sizes: Sizes) -> int:
        return 0

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        return Selection(top_indices(tokens.signal("next_last_attention").masked_fill(~tokens.valid, -1), budget))
