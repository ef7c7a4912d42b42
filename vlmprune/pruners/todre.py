from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from vlmprune.contract import Keep, Positions, Presets, Pruner, Selection, Sizes, VisualTokens
from vlmprune.kernels import max_min_flops, max_min_select
from vlmprune.pruners._places import fill_up, overview, placed, remaining
from vlmprune.registry import register_pruner

Objective = Literal["maxsum", "kcenter"]
_PIVOT = "cls_attention_last|received_attention_last?"


@register_pruner
@dataclass(kw_only=True)
class ToDRE(Pruner):
    """Keep a diverse set grown from the token most salient to the encoder; late in the decoder drop all, if ignored.

    Li et al., "ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance", arXiv 2505.18757 (v2; no
    official code). Training-free.

    Stage 1, at the boundary (Algorithm 1, `todre_select`): from the pivot, each pick is the token with the smallest sum
    of cosines to those picked. The pivot has the largest CLS attention in the encoder's last layer (mean over heads):
    of the thumbnail's tokens where an image has one, of all frames of a video. Encoders without CLS: the attention
    received in that layer, failing that the token least similar to the mean. Line breaks are no candidates.

    Stage 2, before layer floor(7L/8) of L (Eq. 8, `visual_mass`): if the text behind the image gives it less than `tau`
    of its attention in the layer before, every visual token goes. Each image or video is judged by itself. The second
    ratio of Eq. 8, attention of visual tokens to the text, is zero for text behind the image, and text before it is
    taken for system prompt. Positions: decoding continues where stage 1 left them.

    `keep` is what stage 1 leaves. Whether stage 2 fires is known only then, and an average over layers is at most
    `keep`, at least 7/8 of it. The count rounds down, to at least 1. Published: 0.25 and 0.1 with tau 0.1; positions
    compact (M-RoPE families: original).

    Args:
        tau: largest share of attention that still counts as none; 0: no stage 2.
        objective: "maxsum" as in Algorithm 1, or "kcenter" as in the abstract of v1 (nearest pick instead of the sum).
    """

    keep: Keep = 0.25
    positions: Positions = "compact"
    tau: float = 0.1
    objective: Objective = "maxsum"

    name: ClassVar[str] = "todre"
    paper: ClassVar[str] = "arXiv 2505.18757"
    stage: ClassVar[str] = "boundary, decoder"
    query_aware: ClassVar[bool] = True
    presets: ClassVar[Presets] = {"llava-next": {720: {"keep": 0.25}, 288: {"keep": 0.1}}}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tau >= 0:
            raise ValueError(f"todre needs tau >= 0 (0: no second stage), got {self.tau!r}")
        if self.objective not in get_args(Objective):
            raise ValueError(f'todre\'s objective is "maxsum" or "kcenter", got {self.objective!r}')

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({_PIVOT, "text_attention", "text_mask"} if self.tau else {_PIVOT})

    def layers(self, depth: int) -> tuple[int, ...]:
        gate = 7 * depth // 8
        return (0, gate) if self.tau and gate else (0,)

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 1) -> Sequence[int | None]:
        left = [self._first(count) for count in counts]
        return [None if layer and keep < count else keep for keep, count in zip(left, counts)]

    def _first(self, count: int) -> int:
        if isinstance(self.keep, numbers.Integral):
            return min(int(self.keep), count)
        return min(count, max(1, math.floor(self.keep * count + 1e-6)))

    def selection_flops(self, sizes: Sizes) -> int:
        if sizes.layer:
            return 0
        first = 0 if any(name in _PIVOT for name in sizes.signals) else 4 * sizes.tokens * sizes.width
        return first + max_min_flops(sizes.tokens, sizes.keep, sizes.width)

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        if tokens.layer:
            faded = visual_mass(tokens.signal("text_attention"), tokens.signal("text_mask")) < self.tau
            index = torch.arange(tokens.valid.shape[1], device=faded.device).expand_as(tokens.valid)
            return Selection(index.masked_fill(~tokens.valid | faded[:, None], -1))
        saliency = tokens.signal(_PIVOT)
        if saliency is not None:
            seen = remaining(tokens, [overview(shape) for shape in tokens.shapes])
            saliency = saliency.masked_fill(~seen, -torch.inf)
        index = todre_select(tokens.features, saliency, budget, mask=placed(tokens), objective=self.objective)
        return Selection(fill_up(index, tokens, budget))


@torch.no_grad()
def todre_select(
    features: Tensor,
    saliency: Tensor | None,
    k: Tensor,
    *,
    mask: Tensor | None = None,
    objective: Objective = "maxsum",
    backend: str = "auto",
) -> Tensor:
    """Stage 1: greedy diversity from the most salient token, in the order of selection.

    Args:
        features: [I, N, D] projected visual tokens.
        saliency: [I, N]; None: start from the token least similar to the mean.
        k: int64 [I], picks of each item.
        mask: bool [I, N], which rows are candidates; None: all.
        objective: as in `ToDRE`.
        backend: of the kernel.

    Returns:
        int64 [I, K], -1 behind an item's last.
    """
    if saliency is not None and mask is not None:
        saliency = saliency.masked_fill(~mask, -torch.inf)
    return max_min_select(
        features,
        k,
        mask=mask,
        first="eccentric" if saliency is None else saliency.argmax(1),
        objective="max_sum" if objective == "maxsum" else "max_min",
        backend=backend,
    )


def visual_mass(attention: Tensor, text_mask: Tensor) -> Tensor:
    """alpha_tv of Eq. 8: of the text's attention, the share that goes to visual tokens.

    Args:
        attention: fp32 [I, T, N], attention of text tokens to visual ones, softmax over all keys.
        text_mask: bool [I, T], which of these are real.

    Returns:
        fp32 [I] in [0, 1]; 1 where there is no text to judge by.
    """
    count = text_mask.sum(1)
    mass = (attention.sum(2) * text_mask).sum(1) / count.clamp(min=1)
    return torch.where(count > 0, mass, 1.0)
