from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune.contract import Keep, Presets, Sizes
from vlmprune.pruners._segments import (
    ATTENTION,
    BLOCK,
    density,
    distance_flops,
    filled,
    means,
    scenes,
    top_of_each,
    total_of,
)
from vlmprune.pruners._video import FrameMethod, first_true
from vlmprune.registry import register_pruner


@register_pruner
@dataclass(kw_only=True)
class FastVID(FrameMethod):
    """Cut a video into scenes; keep what its frames attend to, and fold the rest into anchors of each scene.

    Shen et al., "FastVID: Dynamic Density Pruning for Fast Video Large Language Models", NeurIPS 2025, arXiv
    2503.11187. Scenes end where neighbouring frames' mean features differ most, at least `least_scenes` of them. Of a
    frame's share of the budget, `1 - merged` goes to the tokens with the largest vision attention; with the rest, every
    `every`-th frame of a scene, counted from its end, sets up anchors, tokens that are density peaks among those left.
    All tokens that are left join the most similar anchor of each anchor frame; an anchor becomes
    w * anchor + (1 - w) * mean of those, w = max(1 / (count + 1), `beta`). Training-free, blind to the question.

    Shares round down, per frame and per anchor frame, as published; the rest of the budget goes to the tokens with the
    largest attention that are not kept yet. Where anchor frames have fewer tokens than their share, likewise. Frame
    features are means of visual tokens on every family (the official code takes SigLIP's pooling head where there is
    one), attention is that of CLS, or what a patch receives, in the last layer. Not here: the variant for Qwen2.5-VL
    that lets still frames share anchors (`DySeg_ignore`).

    Attributes:
        least_scenes: c in the paper.
        threshold: cosine of neighbouring frames below which a scene ends.
        merged: share of the budget that is anchors (d).
        every: distance of anchor frames (p).
        beta: least weight of an anchor among those that join it.
    """

    keep: Keep = 0.1
    least_scenes: int = 8
    threshold: float = 0.9
    merged: float = 0.4
    every: int = 4
    beta: float = 0.6

    name: ClassVar[str] = "fastvid"
    paper: ClassVar[str] = "arXiv 2503.11187"
    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION})
    presets: ClassVar[Presets] = {  # "llava": OneVision and Video
        "llava": {0.1: {"keep": 0.1}},
        "qwen2.5-vl": {0.27: {"keep": 0.27, "threshold": 0.84}},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.least_scenes < 1 or self.every < 1:
            raise ValueError(
                f"fastvid needs least_scenes and every of at least 1, got {self.least_scenes!r} and {self.every!r}"
            )
        if not (0 <= self.merged <= 1 and 0 <= self.beta <= 1):
            raise ValueError(f"fastvid needs merged and beta in [0, 1], got {self.merged!r} and {self.beta!r}")

    def selection_flops(self, sizes: Sizes) -> int:
        size = sizes.tokens // sizes.frames
        late = int(sizes.keep // sizes.frames * self.merged + 1e-6)
        passes = -(-sizes.frames // self.every)  # of the longest scene there can be
        return sizes.frames * (distance_flops(size, sizes.width) + passes * 2 * size**2 * sizes.width) if late else 0

    def choose(self, frames: Tensor, keep: int, part: Callable[[str], Tensor]) -> tuple[Tensor, Tensor | None]:
        attention = part(ATTENTION)
        share = keep // len(frames)
        late = int(share * self.merged + 1e-6)
        kept = top_of_each(attention, torch.ones_like(attention, dtype=torch.bool), share - late)
        if not late:
            return first_true(filled(kept, attention, keep).flatten(), keep), None
        scene = scenes(frames, self.threshold, self.least_scenes)
        anchors = anchors_of(frames, ~kept, scene, late, self.every)
        kept = filled(kept | anchors, attention, keep)
        rows = folded(frames, anchors | ~kept, anchors, scene, self.every, self.beta)
        index = first_true(kept.flatten(), keep)
        return index, rows.flatten(0, 1)[index]


def anchors_of(frames: Tensor, left: Tensor, scene: Tensor, share: int, every: int) -> Tensor:
    """bool [T, n]: the anchors.

    Args:
        frames: [T, n, D].
        left: bool [T, n], which tokens may be anchors.
        scene: int64 [T], ascending.
        share: anchors a frame; the anchor frames of a scene split those of all its frames (the remainder is lost).
        every: distance of anchor frames, counted from the scene's end.
    """
    begin, length = _span(scene)
    number = torch.arange(len(scene), device=scene.device)
    setting = (begin + length - 1 - number) % every == 0
    each = share * length // (-(-length // every))
    return top_of_each(density(frames, left, 4), left, torch.where(setting, each, 0))


def folded(frames: Tensor, members: Tensor, anchors: Tensor, scene: Tensor, every: int, beta: float) -> Tensor:
    """fp32 [T, n, D]: the frames, the anchors with what has joined them.

    Args:
        frames: [T, n, D].
        members: bool [T, n], which tokens join the most similar anchor of each anchor frame of their scene.
        anchors: bool [T, n]; members too.
        scene: int64 [T], ascending.
        every: distance of anchor frames, counted from the scene's end.
        beta: least weight of an anchor.
    """
    count, size, width = frames.shape
    rows = frames.float().flatten(0, 1)
    own = torch.arange(count * size, device=frames.device)
    begin, length = _span(scene)
    out = rows
    for back in range(0, count, every):
        frame = begin + length - 1 - back
        there = frame >= begin
        if there.device.type == "cpu" and not there.any():
            break
        frame = frame.clamp(min=0)
        open_slots = anchors[frame] & there[:, None]
        joins = members & open_slots.any(dim=1, keepdim=True)
        target = frame[:, None] * size + _most_similar(frames, frame, open_slots)
        of_here = torch.zeros_like(frame).index_add(0, frame, there.long()) > 0
        set_up = (anchors & of_here[:, None]).flatten()
        into = torch.where(set_up, own, torch.where(joins, target, -1).flatten())
        mean, joined = means(rows[None], into[None])
        weight = (1 / (joined[0] + 1)).clamp(min=beta)[:, None]
        out = torch.where(set_up[:, None], weight * rows + (1 - weight) * mean[0], out)
    return out.view(count, size, width)


@torch.no_grad()
def _most_similar(frames: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """int64 [T, n]: for each token, by cosine, the most similar of those in `mask` [T, n] of frame `other` [T]."""
    unit = torch.nn.functional.normalize(frames.float(), dim=-1)
    block = max(1, BLOCK // frames.shape[1] ** 2)
    parts = zip(unit.split(block), other.split(block), mask.split(block))
    return torch.cat([(x @ unit[o].mT).masked_fill_(~m[:, None], -torch.inf).argmax(2) for x, o, m in parts])


def _span(scene: Tensor) -> tuple[Tensor, Tensor]:
    """First frame and length, int64 [T] each, of every frame's scene."""
    return torch.searchsorted(scene, scene), total_of(torch.ones_like(scene), scene)
