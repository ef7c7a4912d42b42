from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmprune.contract import Keep, Positions, Presets, Selection, Sizes, VisualTokens
from vlmprune.pruners._schedule import StagedPruner
from vlmprune.pruners._top import top_indices
from vlmprune.registry import register_pruner


@register_pruner
@dataclass(kw_only=True)
class TransPrune(StagedPruner):
    """Keep the visual tokens that the layers change most and that the instruction attends to most.

    Li et al., "TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model", CVPR 2026, arXiv
    2507.20630. Training-free.

    Token transition variation (TTV, Eq. 1 to 4) of a block with input x and output y: |y| / |x| times the softmax over
    the sequence of 1 - cos(x, y); summed over attention and MLP of the layers from one before the first of `layer_list`
    up to the stage. Instruction-guided attention (IGA, Eq. 5): what the text behind the image attends to in the layer
    behind the stage, mean over rows and heads. Each is divided by its sum over the image, and
    score = alpha TTV + (1 - alpha) IGA (Eq. 6). Each image is ranked by itself; counts round down.

    `formula="code"` is the official code: the cosine keeps its sign, the softmax takes in text tokens, both signals are
    divided by their sums. `formula="paper"` is the paper's text: 1 - |cos(x, y)|, the softmax over the image alone, and
    Eq. 6 on the signals as they are. Published for 32 layers: layers 7, 9, 12; positions compact (M-RoPE families:
    original). Presets: "high", the default (keep 0.41), and "low" (0.3125; ratios reconstructed from the published
    FLOPs).
    """

    keep: Keep = 236.25 / 576
    positions: Positions = "compact"
    layer_list: tuple[int, ...] = (7, 9, 12)
    ratios: tuple[float, ...] = (0.875, 0.625, 0.125)
    alpha: float = 0.5
    formula: Literal["code", "paper"] = "code"

    name: ClassVar[str] = "transprune"
    paper: ClassVar[str] = "arXiv 2507.20630"
    stage: ClassVar[str] = "decoder"
    query_aware: ClassVar[bool] = True
    presets: ClassVar[Presets] = {
        "high": {236.25: {"keep": 236.25 / 576, "ratios": (0.875, 0.625, 0.125)}},
        # The authors give its FLOPs, 1.19 T, and not its ratios: these cost 1.187 T by the formula that gives 1.557 T
        # for "high", published as 1.56 T.
        "low": {180: {"keep": 180 / 576, "ratios": (0.5, 0.25, 0.0625)}},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"transprune's alpha must be between 0 (attention alone) and 1, got {self.alpha!r}")
        if self.formula not in ("code", "paper"):
            raise ValueError(f'transprune\'s formula is "code" or "paper", got {self.formula!r}')

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({self._transition, "next_text_attention", "text_mask"})

    @property
    def _transition(self) -> str:
        return "transition" if self.formula == "code" else "transition_strict"

    def accumulate(self, depth: int) -> tuple[int, ...]:
        layers = self.layers(depth)
        return tuple(range(layers[0] - 1, layers[-1])) if layers else ()

    def selection_flops(self, sizes: Sizes) -> int:
        return 0

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        transition, attention = tokens.signal(self._transition), tokens.signal("next_text_attention")
        if self.formula == "code":
            score = transition_score(transition, attention, self.alpha)
        else:
            rows = tokens.signal("text_mask").sum(1, keepdim=True).clamp(min=1)
            score = self.alpha * transition + (1 - self.alpha) * attention.sum(1) / rows
        return Selection(top_indices(score.masked_fill(~tokens.valid, -1), budget))


def transition_score(transition: Tensor, attention: Tensor, alpha: float = 0.5) -> Tensor:
    """alpha TTV + (1 - alpha) IGA, each divided by its sum over an item's tokens (Eq. 6).

    Args:
        transition: fp32 [I, N], TTV summed over layers, 0 for padding.
        attention: fp32 [I, T, N], attention of text rows, 0 for padding; its sum over rows is their mean but for a
            factor that the division takes out.

    Returns:
        fp32 [I, N]: shares of each item that sum to 1, or to alpha where there is no text behind the image.
    """
    return alpha * _shares(transition) + (1 - alpha) * _shares(attention.sum(1))


def _shares(values: Tensor) -> Tensor:
    return values / (values.sum(1, keepdim=True) + 1e-8)


def token_transition(x: Tensor, y: Tensor) -> Tensor:
    """TTV of one block (Eq. 1 to 4): |y| / |x| times the softmax over the sequence of 1 - cos(x, y), signed.

    Args:
        x: [..., S, D], what enters the block; any floating dtype.
        y: [..., S, D], what it adds to the residual.

    Returns:
        fp32 [..., S].
    """
    x, y = x.float(), y.float()
    turn = 1 - torch.cosine_similarity(x, y, dim=-1)
    return y.norm(dim=-1) / x.norm(dim=-1) * turn.softmax(dim=-1)
