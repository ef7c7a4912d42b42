from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmprune.contract import Keep, Positions, Presets, Pruner, Selection, Sizes, VisualTokens
from vlmprune.pruners._contextual import (
    Merge,
    Query,
    check_choices,
    contextual_count,
    encoder_needs,
    encoder_stage,
    encoder_stage_flops,
)
from vlmprune.registry import register_pruner


@register_pruner
@dataclass(kw_only=True)
class VisionZip(Pruner):
    """Keep the patches that the CLS token attends to, and fold the others into a few by the likeness of their keys.

    Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025, arXiv 2412.04467
    (dominant token selection, contextual tokens merging). Training-free, blind to the question. Works on what the
    projector takes, in the layer that makes it: CLS attention, mean over heads; keys, mean over heads. Of K kept,
    int(K / 6.4) are contextual (at least one); the CLS row is one of the others, and goes through the projector too.

    As in the official code a contextual token is its target *plus* the mean of those that join it, and several pictures
    (thumbnail and tiles, frames) are each reduced alone, without line breaks. Unlike it: budgets are shares of the
    token count, split over pictures by size; a contextual token stands where its target stood, the CLS row at the first
    place that its picture does not keep, instead of behind and before all others; the targets are at most as many as
    the tokens that are left; computed in fp32. Towers without CLS rank by the attention that a patch receives from all
    (EffiVLM-Bench's rule for SigLIP), with one more patch in the CLS row's stead, as do towers whose projector takes
    blocks of patches.

    Attributes:
        contextual: share of the kept tokens that are contextual.
        query: "cls" or "all" (attention received from all patches); "auto": CLS where there is one.
        merge: "sum" (published) or "average": a contextual token is the mean of target and joiners.
        keep_cls: whether a kept CLS row takes one of the places.
    """

    keep: Keep = 0.111
    positions: Positions = "compact"
    contextual: float = 1 / 6.4
    query: Query = "auto"
    merge: Merge = "sum"
    keep_cls: bool = True

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = "arXiv 2412.04467"
    otherwise: ClassVar[str] = 'set query="auto", which ranks by the attention received where there is no CLS token'
    presets: ClassVar[Presets] = {
        "llava-1.5": {tokens: {"keep": tokens} for tokens in (64, 128, 192)},
        # Of 2880 tokens in five pictures: 32, 64 or 128 of each one's 576.
        "llava-next": {tokens: {"keep": tokens / 2880} for tokens in (160, 320, 640)},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self.query, self.merge)
        if not 0 <= self.contextual < 1:
            raise ValueError(f"contextual must be a share in [0, 1) of the kept tokens, got {self.contextual!r}")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return encoder_needs(self.query, self.keep_cls)

    def selection_flops(self, sizes: Sizes) -> int:
        return encoder_stage_flops(sizes, self._contextual)

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        return encoder_stage(
            tokens, budget, self._contextual, query=self.query, merge=self.merge, keep_cls=self.keep_cls
        )

    def _contextual(self, kept: int) -> int:
        return contextual_count(kept, int(kept * self.contextual + 1e-6)) if self.contextual else 0
