from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune.contract import Keep, Sizes
from vlmprune.pruners._video import FrameMethod, first_true
from vlmprune.registry import register_pruner


@register_pruner
@dataclass(kw_only=True)
class VidCom2(FrameMethod):
    """Keep what stands out from its frame and from the whole video, more of it in frames that stand out.

    Liu et al., "Video Compression Commander", EMNLP 2025, arXiv 2505.14454. Similarity to a mean is a sum of Gaussian
    kernels of five widths, over the half of the channels that varies least; a frame's share of the budget follows a
    softmax (temperature 0.01) of how little its tokens resemble the video's mean. Training-free, blind to the
    question, no loop. After the official code, whose counts only come close to the budget: here frames' counts are
    reconciled (largest remainders, 1 to n a frame) so that they add up to it.
    """

    keep: Keep = 0.25

    name: ClassVar[str] = "vidcom2"
    paper: ClassVar[str] = "arXiv 2505.14454"

    def selection_flops(self, sizes: Sizes) -> int:
        return 0

    def choose(self, frames: Tensor, keep: int, part: Callable[[str], Tensor]) -> tuple[Tensor, Tensor | None]:
        video, frame = likeness(frames)
        count, size = frames.shape[:2]
        shares = reconciled(frame_scales(video, keep / (count * size)) * size, keep, size)
        rank = (video + frame).argsort(dim=1, stable=True).argsort(dim=1, stable=True)
        return first_true((rank < shares[:, None]).flatten(), keep), None


def likeness(frames: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [T, n] each: how much tokens [T, n, D] resemble the video's mean, and their frame's."""
    rows = frames.float()
    steady = rows.flatten(0, 1).var(dim=0).sort(stable=True).indices[: max(1, rows.shape[-1] // 2)]
    rows = torch.nn.functional.normalize(rows[..., steady.sort().values], dim=-1)
    means = rows.mean(dim=(0, 1), keepdim=True), rows.mean(dim=1, keepdim=True)
    widths = [2.0**power for power in range(-3, 2)]
    video, frame = (sum(torch.exp(-(rows - mean).square().sum(-1) / (2 * width)) for width in widths) for mean in means)
    assert isinstance(video, Tensor)
    assert isinstance(frame, Tensor)
    return video, frame


def frame_scales(video: Tensor, base: float) -> Tensor:
    """fp32 [T]: share of each frame's tokens to keep, at most 1, from likeness to the video [T, n] and the ratio."""
    distinct = -video.mean(dim=1)
    weight = ((distinct - distinct.max()) / 0.01).softmax(dim=0)
    return (base * (1 + weight - weight.mean())).clamp(max=1)


def reconciled(wanted: Tensor, total: int, size: int) -> Tensor:
    """int64 [T]: counts near `wanted` (fp32 [T]) that add up to `total`, each at most `size` and, if it can be, 1."""
    least = 1.0 if total >= len(wanted) else 0.0
    share = wanted.double().clamp(least, size)
    for _ in range(16):  # what is clamped leaves its surplus to the others
        share = (share * (total / share.sum())).clamp(least, size)
    whole = share.floor().long()
    room = torch.where(whole < size, share - whole, -1.0)
    order = room.sort(descending=True, stable=True).indices
    extra = torch.arange(len(wanted), device=wanted.device) < total - whole.sum()
    return whole.scatter_add(0, order, extra.long())
