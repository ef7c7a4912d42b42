from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmprune.contract import Geometry, Keep, Pruner, Selection, VisualTokens
from vlmprune.pruners._schedule import check_reach
from vlmprune.pruners._segments import means
from vlmprune.pruners._video import cosine
from vlmprune.registry import register_pruner


@dataclass
class _Course:
    """How far one item has come: token-layers used so far, whether merging goes on, whether all is done."""

    spent: int = 0
    merging: bool = True
    done: bool = False


@register_pruner
@dataclass(kw_only=True)
class FrameFusion(Pruner):
    """Merge what looks the same from frame to frame, layer after layer while it pays; then keep what is attended to.

    Fu et al., "FrameFusion: Combining Similarity and Importance for Video Token Reduction on Large Visual Language
    Models", ICCV 2025, arXiv 2501.01986. Training-free, aware of the question through the last token.

    Before decoder layer 0, and before each following one while merging goes on, tokens whose cosine to the token before
    them at the same place in the picture is at least `similarity` merge with it; a run of such tokens becomes its mean,
    at its first. Merging ends when fewer than `least` of the tokens did so. Before the next layer, those that the last
    token attends to most in the layer before stay: as many as make the average over all layers `keep`. Where merging
    alone can reach that, only the most similar pairs merge and nothing is cut.

    How many tokens leave where depends on the video: the count of each stage is known only then (a synchronisation on a
    GPU), their average over the layers is `keep`, rounded. Since layer 0 may see all tokens, `keep` is at least
    1 / depth (`start` / depth). Merging acts before a layer, the official code between its attention and its MLP; the
    number of layers is the model's (there 28 for all); merging gives way to the cut where it would use up the budget,
    and has no limit like `merges` there. An image has no frames to merge, and is cut before layer `start`.

    Not for one forward pass inside another: where an item stands is kept from one stage to the next.

    Attributes:
        similarity: least cosine of tokens that merge.
        least: share of the tokens below which merging ends.
        merges: layers before which it merges at most.
        start: second of the layers before which it acts; Qwen3-VL, whose first three get visual features, needs 3.
    """

    keep: Keep = 0.3
    similarity: float = 0.6
    least: float = 0.1
    merges: int = 8
    start: int = 1

    name: ClassVar[str] = "framefusion"
    paper: ClassVar[str] = "arXiv 2501.01986"
    stage: ClassVar[str] = "boundary, decoder"
    needs: ClassVar[frozenset[str]] = frozenset({"last_attention"})
    query_aware: ClassVar[bool] = True

    _courses: list[_Course] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.least <= 1:
            raise ValueError(f"framefusion needs least in [0, 1] (share of the tokens), got {self.least!r}")
        for value, name in ((self.merges, "merges"), (self.start, "start")):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"framefusion needs {name} to be an int >= 1 (decoder layers), got {value!r}")

    def layers(self, depth: int) -> tuple[int, ...]:
        return (0, *range(self.start, min(depth, self.start + self.merges)))

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 28) -> list[int | None]:
        left: list[int | None] = []
        for count in counts:
            whole = self._target(count) >= count
            if not whole:
                check_reach(count, self.keep, count * min(self.start, depth) / depth, depth)
            left.append(count if whole else None)
        return left

    def _target(self, count: int) -> float:
        return float(self.keep) if isinstance(self.keep, numbers.Integral) else self.keep * count

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        if tokens.layer == 0:
            self._courses = [_Course() for _ in tokens.counts]
        index, rows, made = [], [], []
        for number, (course, count) in enumerate(zip(self._courses, tokens.counts, strict=True)):
            own = tokens.features[number, :count]
            into = torch.arange(count, device=own.device)
            kept = torch.ones_like(into, dtype=torch.bool)
            if not course.done:
                into, kept = self._step(tokens, number, course)
            course.spent += int(kept.sum()) * (self._next(tokens) - tokens.layer)
            merged, weight = (x[0] for x in means(own[None], into[None]))
            several = weight > 1
            index.append(kept.nonzero().flatten())
            rows.append(torch.where(several[:, None], merged.to(own.dtype), own)[kept])
            made.append(several[kept])
        chosen = pad_sequence(index, batch_first=True, padding_value=-1)
        if not any(bool(each.any()) for each in made):
            return Selection(chosen)
        return Selection(chosen, pad_sequence(rows, batch_first=True), pad_sequence(made, batch_first=True))

    def _next(self, tokens: VisualTokens) -> int:
        """The layer before which it acts next; the depth, if there is none."""
        return next((layer for layer in self.layers(tokens.depth) if layer > tokens.layer), tokens.depth)

    def _step(self, tokens: VisualTokens, number: int, course: _Course) -> tuple[Tensor, Tensor]:
        """Where each token of an item goes, int64 [N], and which stay, bool [N]."""
        count, shape, device = tokens.counts[number], tokens.geometry[number], tokens.features.device
        total = self._target(len(tokens.shapes[number])) * tokens.depth
        left = goal(total, course.spent, tokens.depth - tokens.layer)
        fewest = max(1, min(count, round(left)))
        own = torch.arange(count, device=device)
        if course.merging:
            place = places(shape).to(device)
            order, likeness = similarity(tokens.features[number, :count], place)
            alike = likeness >= self.similarity
            merges = int(alike.sum())
            if merges >= count - fewest:
                best = likeness.sort(descending=True, stable=True).indices[: count - fewest]
                course.done = True
                alike = torch.zeros_like(alike).index_fill(0, best, True)
                into = joined(order, alike)
                return into, into == own
            # Another stage of merging must leave a token to each of the layers behind.
            following = self._next(tokens)
            after = course.spent + (count - merges) * (following - tokens.layer) + tokens.depth - following
            more = after <= total and following < tokens.depth
            if more or tokens.layer == 0:
                course.merging = merges >= self.least * count
                into = joined(order, alike)
                return into, into == own
        course.done = True
        attention = tokens.signal("last_attention")[number, :count]
        best = attention.sort(descending=True, stable=True).indices[:fewest]
        return own, torch.zeros_like(own, dtype=torch.bool).index_fill(0, best, True)


def goal(total: float, spent: float, layers: int) -> float:
    """Tokens for each of the `layers` left, of `total` token-layers of which `spent` are used."""
    return (total - spent) / layers


def places(shape: Geometry) -> Tensor:
    """int64 [N], on the CPU: place of each token in the picture, the same in every frame; -1: none, or an image."""
    if shape.kind != "video":
        return torch.full((len(shape),), -1, device="cpu")
    columns = max((grid[1] for grid in shape.grids), default=1)
    return torch.where(shape.placeless, -1, shape.row * columns + shape.col)


@torch.no_grad()
def similarity(rows: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens sorted by place, int64 [N], and in this order the cosine of each to the one before, fp32 [N].

    Args:
        rows: [N, D], frame after frame.
        place: int64 [N], see `places`. The first token of a place, and those that show none, have -2.
    """
    order = place.argsort(stable=True)
    same = place[order][1:] == place[order][:-1]
    rows = rows[order]
    likeness = torch.where(same & (place[order][1:] >= 0), cosine(rows[1:], rows[:-1]), -2)
    return order, torch.cat([likeness.new_full((1,), -2), likeness])


def joined(order: Tensor, alike: Tensor) -> Tensor:
    """int64 [N]: the first token of the run that each token is in.

    Args:
        order: int64 [N], tokens in which runs follow one another.
        alike: bool [N], in this order: which continue the run of the one before.
    """
    step = torch.arange(len(order), device=order.device)
    first = torch.where(alike, 0, step).cummax(0).values
    return torch.empty_like(order).scatter(0, order, order[first])
