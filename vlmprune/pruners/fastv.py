from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vlmprune.contract import Keep, Positions, Presets, Pruner, Selection, Sizes, VisualTokens
from vlmprune.pruners._top import top_indices
from vlmprune.registry import register_pruner


@register_pruner
@dataclass(kw_only=True)
class FastV(Pruner):
    """Keep the visual tokens that the last prompt token attends to most, from decoder layer `layer` on.

    Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024, arXiv 2403.06764. Training-free, aware of the
    question through the last token. Layers before `layer` (K in the paper) see every token; the ranking is the
    attention in layer K - 1, mean over heads, softmax over all keys: `query="last"`, the row of the last token, as in
    the official code, or `query="all"`, the mean over all tokens that can see a token, as the paper's text has it.

    `keep` is the average over all decoder layers, as for every method; layers 0..K-1 count in full, and what is left
    for the others is rounded half to even. Published for 32 layers: K = 2 and R = 0.5, which is keep 0.53125, with
    original positions.
    """

    keep: Keep = 0.53125
    positions: Positions = "original"
    layer: int = 2
    query: Literal["last", "all"] = "last"

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "arXiv 2403.06764"
    stage: ClassVar[str] = "decoder"
    query_aware: ClassVar[bool] = True
    presets: ClassVar[Presets] = {
        # K = 2 and R = 0.5, 0.75 or 0.9; K = 3 and R = 0.5.
        "llava-1.5": {
            306: {"keep": 306 / 576},
            171: {"keep": 171 / 576},
            90: {"keep": 90 / 576},
            315: {"keep": 315 / 576, "layer": 3},
        }
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 1:
            raise ValueError(
                f"layer must be an int >= 1 (the number of layers that see every token), got {self.layer!r}"
            )
        if self.query not in ("last", "all"):
            raise ValueError(f'query must be "last" or "all", got {self.query!r}')

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({f"{self.query}_attention"})

    def layers(self, depth: int) -> tuple[int, ...]:
        return (self.layer,)

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 32) -> list[int]:
        return [self._after(count, depth) for count in counts]

    def _after(self, count: int, depth: int) -> int:
        whole = isinstance(self.keep, numbers.Integral)
        if (whole and self.keep >= count) or depth <= self.layer:
            return count
        average = self.keep if whole else self.keep * count
        left = (average * depth - count * self.layer) / (depth - self.layer)
        if left < 0:
            raise ValueError(
                f"fastv cannot keep {self.keep} on average: its first {self.layer} of {depth} layers see every token, "
                f"which alone averages {self.layer / depth:.3g}; use a larger keep or a smaller layer"
            )
        return round(left)

    def selection_flops(self, sizes: Sizes) -> int:
        return 0

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        return Selection(top_indices(tokens.signal(f"{self.query}_attention").masked_fill(~tokens.valid, -1), budget))
