from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune.contract import Keep, Presets, Selection, Sizes, VisualTokens
from vlmprune.pruners._schedule import outer_and_inner, stage_layers
from vlmprune.pruners._segments import ATTENTION, apportion, clusters, distance_flops, filled, means, top_of_each
from vlmprune.pruners._top import top_indices
from vlmprune.pruners._video import FrameMethod, cosine, first_true
from vlmprune.pruners.merge import fold, fold_flops
from vlmprune.registry import register_pruner

LONGEST = 1024  # frames of a window


@register_pruner
@dataclass(kw_only=True)
class HoliTom(FrameMethod):
    """Average what stands still over windows that maximise it, cluster that, keep what is attended to of the rest.

    Shao et al., "HoliTom: Holistic Token Merging for Fast Video Large Language Models", NeurIPS 2025, arXiv
    2505.21334. Training-free; the stage inside the decoder listens to the question.

    At the boundary, dynamic programming cuts the video into windows so that the most tokens go: a place is static in a
    window if the cosine from frame to frame exceeds `threshold` throughout. Static places become their mean over the
    window, at its first frame; density-peak clustering leaves their share of the budget, a cluster being
    `beta` * centre + (1 - beta) * mean of its others. Of a frame's other tokens those with the largest vision attention
    stay. Before layer `layer`, the share `inner` that the last token attends to most stays, and what leaves merges
    into the most similar that stays.

    `keep` is the average over the layers (published ratios R at the boundary are presets, keep = 23/28 R); budgets
    are exact: windows and frames share them in proportion, by largest remainders. A budget beyond what the windows
    leave goes to the static tokens with the largest attention, as they are. Inside the decoder a token becomes the mean
    of itself and all that join it, where the official code halves in order of arrival. Frames' other tokens are never
    clustered (D = 0, as published).

    Attributes:
        threshold: tau.
        beta: weight of a cluster's centre.
        layer, inner: the stage in the decoder of `model_depth` layers (scaled to others) and the share it leaves,
            rounded up.
    """

    keep: Keep = 0.25 * 23 / 28
    threshold: float = 0.8
    beta: float = 0.6
    layer: int = 18
    inner: float = 0.5
    model_depth: int = 28

    name: ClassVar[str] = "holitom"
    paper: ClassVar[str] = "arXiv 2505.21334"
    stage: ClassVar[str] = "boundary, decoder"
    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION, "last_attention"})
    query_aware: ClassVar[bool] = True
    presets: ClassVar[Presets] = {  # by the share R of the tokens at the boundary
        "llava": {
            ratio: {"keep": ratio * 23 / 28, "threshold": 0.65 if ratio == 0.1 else 0.8}
            for ratio in (0.25, 0.2, 0.15, 0.1)
        }
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.inner <= 1 and 0 <= self.beta <= 1):
            raise ValueError(f"holitom needs inner and beta in [0, 1], got {self.inner!r} and {self.beta!r}")
        if not 1 <= self.layer < self.model_depth:
            raise ValueError(f"holitom needs a layer from 1 to {self.model_depth - 1}, got {self.layer!r}")

    def layers(self, depth: int) -> tuple[int, ...]:
        return (0, *stage_layers((self.layer,), depth, self.model_depth))

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 28) -> list[int]:
        cut = self.layers(depth)[-1]
        return [outer_and_inner(count, self.keep, cut, self.inner, depth)[layer > 0] for count in counts]

    def selection_flops(self, sizes: Sizes) -> int:
        if sizes.layer:
            return fold_flops(sizes)
        return 2 * sizes.frames * distance_flops(sizes.tokens // sizes.frames, sizes.width)

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        if tokens.layer:
            attention = tokens.signal("last_attention").masked_fill(~tokens.valid, -1)
            return fold(tokens, top_indices(attention, budget))
        return super().select(tokens, budget)

    def choose(self, frames: Tensor, keep: int, part: Callable[[str], Tensor]) -> tuple[Tensor, Tensor | None]:
        count, size, width = frames.shape
        attention = part(ATTENTION)
        still = runs(cosine(frames[1:], frames[:-1]) > self.threshold)
        begin, _ = windows(still)
        number = torch.arange(count, device=frames.device)
        end = torch.searchsorted(begin, begin, right=True) - 1
        static = (still[end] >= (end - begin)[:, None]) & (end > begin)[:, None]
        first = static & (begin == number)[:, None]

        sizes = torch.cat([first.sum(1), (~static).sum(1)])
        together = torch.zeros_like(sizes)
        shares = apportion(sizes, sizes.sum().clamp(max=keep).expand_as(sizes), together).view(2, count)

        place = torch.arange(size, device=frames.device)
        into = torch.where(static, begin[:, None], number[:, None]) * size + place
        rows = means(frames.flatten(0, 1)[None], into.view(1, -1))[0].view(count, size, width)
        centre, join = clusters(rows, first, shares[0])
        together, members = means(rows, join.masked_fill(~first, -1))
        others = (members[..., None] * together - rows) / (members - 1).clamp(min=1)[..., None]
        mixed = self.beta * rows + (1 - self.beta) * others
        # A static token that comes back stays as it is; a centre is alone where nobody joined it.
        rows = torch.where((centre & (members > 1))[..., None], mixed, rows)
        kept = filled(centre | top_of_each(attention, ~static, shares[1]), attention, keep)
        index = first_true(kept.flatten(), keep)
        return index, rows.flatten(0, 1)[index]


def runs(static: Tensor) -> Tensor:
    """int64 [T, n]: how many frames in a row up to each frame a place did not change, from bool [T - 1, n]."""
    length = [torch.zeros_like(static[0], dtype=torch.int64)] if len(static) else []
    for each in static:
        length.append(torch.where(each, length[-1] + 1, 0))
    return torch.stack(length) if length else torch.zeros(1, static.shape[1], dtype=torch.int64, device=static.device)


def windows(still: Tensor, longest: int = LONGEST) -> tuple[Tensor, Tensor]:
    """Cut a video so that as many tokens as possible are static in their window, its first frame not counted.

    Args:
        still: int64 [T, n], see `runs`.
        longest: frames of a window at most.

    Returns:
        int64 [T], first frame of every frame's window, and int64 [], the number of those tokens. Of windows that are
        equally good the shorter one, counted from the end.
    """
    count, device = len(still), still.device
    best = [torch.zeros((), dtype=torch.int64, device=device)]  # best[i]: of the first i frames
    start = []
    for end in range(count):
        length = torch.arange(min(end + 1, longest), device=device)
        gain = (still[end][:, None] >= length).sum(0) * length
        value = torch.stack(best[::-1][: len(length)]) + gain
        choice = value.argmax()
        best.append(value.amax())
        start.append(end - choice)
    first = torch.full((), count, device=device)
    begin = []
    for end in range(count - 1, -1, -1):
        first = torch.where(first > end, start[end], first)
        begin.append(first)
    return torch.stack(begin[::-1]), best[-1]
