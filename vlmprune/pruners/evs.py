from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune.contract import Geometry, Keep, Sizes
from vlmprune.pruners._video import FrameMethod, cosine, spread
from vlmprune.registry import register_pruner


@register_pruner
@dataclass(kw_only=True)
class EVS(FrameMethod):
    """Keep the first frame whole, and what changed most against the same place of the frame before.

    "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference", arXiv 2510.14624.
    Dissimilarity is 1 - cosine of the features; the whole video is one pool, ties go to the lower index. Training-free,
    blind to the question. Published pruning rates 0.4 to 0.9 (`keep` = 1 - rate).

    The published count is never below one frame; a `keep` below that is spread evenly over the first frame here, and
    so is any `keep` of a single image, which has nothing to compare with.
    """

    keep: Keep = 0.3

    name: ClassVar[str] = "evs"
    paper: ClassVar[str] = "arXiv 2510.14624"

    def selection_flops(self, sizes: Sizes) -> int:
        return 0

    def of_image(self, geometry: Geometry, frames: Tensor, keep: int) -> tuple[Tensor, Tensor | None]:
        return spread(geometry, keep, frames.device)

    def choose(self, frames: Tensor, keep: int, part: Callable[[str], Tensor]) -> tuple[Tensor, Tensor | None]:
        size = frames.shape[1]
        if keep < size:
            return torch.arange(keep, device=frames.device) * size // keep, None
        return change(frames).flatten().sort(descending=True, stable=True).indices[:keep], None


def change(frames: Tensor) -> Tensor:
    """fp32 [T, n]: 1 - cosine to the same place in the frame before; 255 in the first frame."""
    first = frames.new_full((1, frames.shape[1]), 255.0, dtype=torch.float32)
    return torch.cat([first, 1 - cosine(frames[1:], frames[:-1])])


def published_count(frames: int, size: int, rate: float) -> int:
    """Tokens kept of `frames` frames of `size` tokens: int(T n (1 - rate)), at least one frame."""
    return max(size, int(frames * size * (1 - rate)))
