from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vlmprune.contract import Keep, Positions, Presets, Pruner, Selection, Sizes, VisualTokens
from vlmprune.kernels import max_min_flops, max_min_select
from vlmprune.registry import register_pruner


@register_pruner
@dataclass(kw_only=True)
class DivPrune(Pruner):
    """Keep the visual tokens that lie farthest apart: greedy max-min diversity under cosine distance.

    Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025, arXiv
    2503.02175, Algorithm 1. Training-free, blind to the question. The first pick is the most isolated token, each
    further one the token farthest from those already kept. All tiles and frames of an item are one pool. The budget is
    `keep` times the item's tokens, rounded half to even; published ratio 0.098, published positions compact.

    Unlike the official code, which computes in the model's dtype, distances are in fp32; a token is never picked twice,
    and a zero row is similar to nothing.

    Attributes:
        features: between what distances are: "projected" tokens, as published, or what the projector takes ("encoder"),
            as a port to Qwen2.5-VL does.
    """

    keep: Keep = 0.098
    positions: Positions = "compact"
    features: Literal["projected", "encoder"] = "projected"

    name: ClassVar[str] = "divprune"
    paper: ClassVar[str] = "arXiv 2503.02175"
    presets: ClassVar[Presets] = {
        "llava-1.5": {56: {}},
        "llava-next": {0.098: {}},
        "llava-next-video": {115: {"keep": 0.1}},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features not in ("projected", "encoder"):
            raise ValueError(f'features must be "projected" or "encoder", got {self.features!r}')

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"encoder_features"} if self.features == "encoder" else ())

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        rows = tokens.features if self.features == "projected" else tokens.signal("encoder_features")
        return Selection(max_min_select(rows, budget, mask=tokens.valid))

    def selection_flops(self, sizes: Sizes) -> int:
        width = sizes.width if self.features == "projected" else sizes.encoder_width
        return max_min_flops(sizes.tokens, sizes.keep, width)
