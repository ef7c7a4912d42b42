from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune.contract import Geometry, Keep, Selection, Sizes, VisualTokens, is_all
from vlmprune.pruners._top import top_indices
from vlmprune.pruners._video import FrameMethod, cosine, first_true, spread
from vlmprune.registry import register_pruner

WINDOW = 4


@register_pruner
@dataclass(kw_only=True)
class DyCoke(FrameMethod):
    """Merge time in windows of four frames; then drop from the KV cache what the answer does not look at.

    Tao et al., "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models", CVPR 2025, arXiv
    2411.15024. Stage 1, at the boundary: of frames i to i + 3 the first stays whole; i + 1 against i, i + 3 against
    i + 2 and i + 2 against i keep the tokens least similar (cosine) to the same place. `keep` says how many that leaves
    on average; every fourth frame alone is a lower bound. Published: K = 0.7, which is keep 0.475.
    Stage 2, in the cache, from decoder layer `layer` on: only the `1 - drop` of the visual tokens that the prompt's
    last token attends to most in that layer stay; published P = 0.7 from layer 3 on. Training-free.

    Deviations: the last window gets all of its steps and no frame is lost (the official loop stops early); what leaves
    the cache is gone and its memory with it, where the official code keeps all and chooses anew; no `drop` with
    `drop=0`. A single image keeps an even grid.
    """

    keep: Keep = 0.475
    layer: int = 3
    drop: float = 0.7

    name: ClassVar[str] = "dycoke"
    paper: ClassVar[str] = "arXiv 2411.15024"
    stage: ClassVar[str] = "boundary, cache"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop must be in [0, 1) (share of the cached visual tokens), got {self.drop!r}")
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise ValueError(f"layer must be an int >= 0, got {self.layer!r}")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"cache_attention"} if self.drop else ())

    @property
    def query_aware(self) -> bool:  # type: ignore[override]
        return bool(self.drop)

    def cache_layers(self, depth: int) -> tuple[int, ...]:
        return () if is_all(self.keep) or not self.drop else tuple(range(min(self.layer, depth - 1), depth))

    def cache_budget(self, count: int, left: int, layer: int, depth: int) -> int:
        return max(1, int(left * (1 - self.drop) + 1e-6)) if left and layer in self.cache_layers(depth) else left

    def selection_flops(self, sizes: Sizes) -> int:
        return 0

    def select_cache(self, tokens: VisualTokens) -> Selection:
        counts = torch.tensor(
            [self.cache_budget(count, count, tokens.layer, tokens.depth) for count in tokens.counts], device="cpu"
        )
        return Selection(top_indices(tokens.signal("cache_attention").masked_fill(~tokens.valid, -1), counts))

    def of_image(self, geometry: Geometry, frames: Tensor, keep: int) -> tuple[Tensor, Tensor | None]:
        return spread(geometry, keep, frames.device)

    def choose(self, frames: Tensor, keep: int, part: Callable[[str], Tensor]) -> tuple[Tensor, Tensor | None]:
        count, size = frames.shape[:2]
        whole = -(-count // WINDOW)
        if keep < whole * size:
            raise ValueError(
                f"dycoke keeps every fourth frame whole, here {whole} of {count}: use a keep of at least "
                f"{whole / count:.2f}, or another method"
            )
        each, more = divmod(keep - whole * size, count - whole)
        return first_true(changed(frames, each, more).flatten(), keep), None


def changed(frames: Tensor, each: int, more: int = 0) -> Tensor:
    """bool [T, n]: stage 1's choice, `each` tokens of every frame that is compared, one more of the first `more`."""
    count, size = frames.shape[:2]
    number = torch.arange(count, device="cpu")
    inside = number % WINDOW
    against = number - torch.where(inside == 2, 2, 1).masked_fill(inside == 0, 0)
    similar = cosine(frames, frames[against.to(frames.device)])
    rank = similar.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    compared = inside > 0
    keep = torch.where(compared, each + (compared.cumsum(0) <= more).long(), size)
    return rank < keep.to(frames.device, non_blocking=True)[:, None]
