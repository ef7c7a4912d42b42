from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune.contract import Keep, Positions, Pruner, Selection, Sizes, VisualTokens
from vlmprune.registry import register_pruner


@register_pruner
@dataclass(kw_only=True)
class YOPO(Pruner):
    """Let all visual tokens leave the language model at one layer: later layers see text alone.

    The layer cut of Zhang et al., "Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See", arXiv
    2410.06169. Training-free, blind to the question. The paper zeroes the attention to visual tokens from layer 20 of
    32 on; without renormalising, and still computing the tokens. Here they are dropped, so that the softmax is over
    what is left and the saving is real. The other parts of the method (attention windows, a head mask, half of the FFN)
    cut computation on tokens rather than tokens, and are not part of this package.

    `keep` is the average over decoder layers, hence the share of layers that see the tokens, rounded to whole layers,
    at least one: published 20 of 32. It cannot be a count, for every item leaves at the same layer; nor a share of the
    cost, which another layer would meet for every prompt.
    """

    keep: Keep = 0.625
    positions: Positions = "original"

    name: ClassVar[str] = "yopo"
    paper: ClassVar[str] = "arXiv 2410.06169, layer cut only"
    stage: ClassVar[str] = "decoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.keep, numbers.Integral | str):
            raise ValueError(f"keep of yopo is a ratio (the share of layers that see visual tokens), got {self.keep!r}")

    def layers(self, depth: int) -> tuple[int, ...]:
        if self.keep * depth < 1 - 1e-9:
            raise ValueError(
                f"yopo cannot keep {self.keep} on average: the first of {depth} layers sees every token, which alone "
                f"averages {1 / depth:.3g}; use a larger keep"
            )
        return (max(1, min(round(self.keep * depth), depth - 1)),)

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 32) -> list[int]:
        return [count if self.keep == 1 else 0 for count in counts]

    def selection_flops(self, sizes: Sizes) -> int:
        return 0

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        return Selection(torch.empty(len(tokens.counts), 0, dtype=torch.int64, device=tokens.features.device))
