from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmprune.contract import Geometry, Keep, Positions, Pruner, Selection, Sizes, VisualTokens
from vlmprune.pruners._pictures import Pictures, picture_of
from vlmprune.pruners._schedule import truncate
from vlmprune.pruners._top import top_indices
from vlmprune.registry import register_pruner

_SCORES = {
    "received": ("received_attention",),
    "cls": ("cls_attention",),
    "logits": ("received_logits", "given_logits"),
}


@register_pruner
@dataclass(kw_only=True)
class FoPru(Pruner):
    """Keep the patches, or the rows of the picture, that receive most attention inside the vision tower.

    Jiang et al., "FoPru: Focal Pruning for Efficient Large Vision-Language Models", arXiv 2411.14164. Training-free,
    blind to the question. Significance of a patch: the attention it receives from all patches, mean over these and over
    heads, in the layer that makes the features. "rank" keeps the most significant patches, "row" whole rows of the
    picture by the sum over them; both in raster order. Each picture of an item (thumbnail, tile, frame) keeps the same
    share, and no line breaks.

    There is no official code. The only other one known takes logits in place of attention, and of the means over
    columns and rows the one with the larger variance, picture by picture: `score="logits"` (`more_varied`). Behind the
    softmax a mean over rows is the same for all patches but for what they give to CLS, so by default it is columns.
    Counts are rounded down, to at least one. In
    "row" mode an item keeps int(rows * keep) rows of each picture, never more than `keep` but for that one.

    Attributes:
        mode: "rank" or "row".
        score: "received"; "logits"; or "cls": the attention of the CLS token. Where a tower's patches attend to the
            background, as those of the bundled model do, "received" keeps that and "cls" what is in front.
    """

    keep: Keep = 0.25
    positions: Positions = "compact"
    mode: Literal["rank", "row"] = "rank"
    score: Literal["received", "cls", "logits"] = "received"

    name: ClassVar[str] = "fopru"
    paper: ClassVar[str] = "arXiv 2411.14164"
    otherwise: ClassVar[str] = 'set score="received", which needs no CLS token'

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("rank", "row"):
            raise ValueError(f'mode must be "rank" or "row", got {self.mode!r}')
        if self.score not in _SCORES:
            raise ValueError(f"score must be one of {', '.join(map(repr, _SCORES))}, got {self.score!r}")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(_SCORES[self.score])

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 1) -> Sequence[int | None]:
        kept = [self._share(count, count) for count in counts]
        if self.mode == "rank":
            return kept
        return [keep if keep == count else None for keep, count in zip(kept, counts)]

    def _share(self, parts: int, count: int) -> int:
        """Of `parts` equal parts of an item of `count` tokens, how many stay: rounded down, at least one."""
        ratio = self.keep / count if isinstance(self.keep, numbers.Integral) else self.keep
        return max(1, min(parts, truncate(parts * ratio)))

    def selection_flops(self, sizes: Sizes) -> int:
        if self.mode == "rank":
            return 0
        return 2 * len(sizes.grids) * sizes.geometry.grids[0][0] * max(sizes.parts)

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        pictures = Pictures(tokens, budget)
        scores, *others = (pictures.rows(tokens.signal(name)) for name in _SCORES[self.score])
        if others:
            scores = more_varied(scores, others[0], pictures.placed)
        scores = scores.masked_fill(~pictures.placed, -torch.inf)
        if self.mode == "rank":
            index = top_indices(scores, pictures.budget)
            used = torch.arange(index.shape[1], device="cpu") < pictures.budget[:, None]
            return Selection(pictures.collect(index, used)[0])
        lines = [line_of(shape) for shape in tokens.geometry]
        rows = pad_sequence(lines, batch_first=True).to(scores.device, non_blocking=True)
        line = pictures.rows(rows)
        many = [
            1 + int(lines[item][picture_of(tokens.geometry[item]) == number].max())
            for item, number in zip(pictures.item.tolist(), pictures.number.tolist())
        ]
        keep = [self._share(rows, tokens.counts[item]) for rows, item in zip(many, pictures.item.tolist())]
        stays = best_rows(scores, line, torch.tensor(many, device="cpu"), torch.tensor(keep, device="cpu"))
        width = tokens.features.shape[1]
        chosen = pictures.back(stays & pictures.placed, width)
        index = torch.where(chosen, torch.arange(width, device=chosen.device), width).sort(dim=1).values
        return Selection(index.masked_fill(index == width, -1))


def significance(attention: Tensor) -> Tensor:
    """Token significance [..., N] from attention [..., H, N, N]: means over queries or keys, whichever vary more."""
    mean = attention.float().mean(-3)
    return more_varied(mean.mean(-2), mean.mean(-1))


def more_varied(received: Tensor, given: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of two scores [..., N] the one with the larger unbiased variance over a row's `mask`; `given` in a tie."""
    mask = torch.ones_like(received, dtype=torch.bool) if mask is None else mask
    count = mask.sum(-1, keepdim=True)

    def variance(scores: Tensor) -> Tensor:
        mean = (scores * mask).sum(-1, keepdim=True) / count.clamp(min=1)
        return ((scores - mean).square() * mask).sum(-1, keepdim=True) / (count - 1).clamp(min=1)

    return torch.where(variance(received) > variance(given), received, given)


def best_rows(scores: Tensor, line: Tensor, many: Tensor, keep: Tensor) -> Tensor:
    """bool [B, N]: tokens of the rows whose scores sum to most.

    Args:
        scores: fp32 [B, N], -inf for tokens that have no row.
        line: int64 [B, N], row of each token.
        many, keep: int64 [B], on the CPU: rows there are, and how many stay.
    """
    number = torch.arange(int(many.max()), device=scores.device)
    inside = scores > -torch.inf
    member = ((line[:, None] == number[:, None]) & inside[:, None]).float()
    total = (member @ torch.where(inside, scores, 0.0)[..., None])[..., 0]
    there = (torch.arange(len(number), device="cpu") < many[:, None]).to(scores.device, non_blocking=True)
    best = top_indices(total.masked_fill(~there, -torch.inf), keep)
    stays = torch.zeros(len(scores), len(number) + 1, dtype=torch.bool, device=scores.device)
    stays = stays.scatter(1, torch.where(best < 0, len(number), best), True)[:, :-1]
    return stays.gather(1, line) & inside


def line_of(geometry: Geometry) -> Tensor:
    """int64 [N]: each token's row, counted from the first of its own picture (0 for tokens that show no place)."""
    picture, placed = picture_of(geometry), ~geometry.placeless
    first = torch.full((max(len(geometry.pictures), 1),), torch.iinfo(torch.int64).max, device="cpu")
    first = first.scatter_reduce(0, picture[placed], geometry.row[placed], "amin")
    return torch.where(placed, geometry.row - first[picture.clamp(min=0)], 0)
