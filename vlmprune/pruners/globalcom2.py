from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate
from torch.nn.utils.rnn import pad_sequence

from vlmprune.contract import Geometry, Keep, Positions, Presets, Pruner, Selection, Sizes, VisualTokens
from vlmprune.pruners._pictures import picture_of
from vlmprune.pruners._schedule import truncate
from vlmprune.registry import register_pruner

_SCORES = {"auto": "cls_logits_last?", "logits": "cls_logits_last", "softmax": "cls_attention_last", "cosine": ""}


@register_pruner
@dataclass(kw_only=True)
class GlobalCom2(Pruner):
    """Let the thumbnail tell how much each crop keeps, and rank a crop's tokens by the thumbnail's and its own CLS.

    Liu et al., "Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution Large
    Vision-Language Models", AAAI 2026, arXiv 2501.05179. Training-free, blind to the question. For models that see an
    image as a thumbnail and crops (LLaVA-NeXT, LLaVA-OneVision). With retention ratio R:

    1. Score a: CLS's attention in the encoder's last layer, before the softmax, mean over heads.
    2. Crop j keeps the share r_j = min(1, R (1 + sigma_j - mean sigma)), where sigma is the softmax over crops, at
       `temperature`, of the sum of the thumbnail's a over the crop's region (`crop_ratios`).
    3. Within a crop tokens rank by a / |a| + g / |g|, where g is the thumbnail's a, resized to the crops
       (`holistic_scores`). The thumbnail keeps its own best.

    As in the official code: logits where the paper reads as if behind the softmax, regions that ignore padding. Unlike
    it, survivors stay in raster order at their true places (it sorts the thumbnail's by score and shifts those of
    padded crops), line breaks of unpadded rows alone exist, and by default exactly round(keep * tokens) stay, line
    breaks included: the thumbnail's share by its size, the crops' in proportion to r_j times their tokens
    (Sainte-Lague's divisors). `exact_budget=False` follows the code: int(N R) of the thumbnail, int(N_j r_j) of crop j,
    all line breaks on top; how many that makes only the scores tell.

    Where the official code has no rule: towers without CLS score by how little a token looks like the mean of its
    picture, -cos(x, mean), the rule reported for the paper's SigLIP models; items of several pictures but no thumbnail
    (frames, InternVL's tiles) take the mean over all their tokens as the global view: g = -cos(x, mean over the item),
    summed over a picture for step 2; an item of one picture, which the official code leaves whole, keeps its best by a.

    Attributes:
        score: "logits", "softmax" (its own temperature wanted: at 10 crops share evenly), "cosine"; "auto": logits
            where the tower has a CLS token, else cosine.
        alpha: weight of the global score beside the crop's own.
        newline: "keep" line breaks (with `exact_budget`, while they fill at most half of it), "drop" them, or keep
            those of "nonempty" rows (without `exact_budget`).
    """

    keep: Keep = 0.25
    positions: Positions = "compact"
    temperature: float = 10.0
    alpha: float = 0.5
    score: Literal["auto", "logits", "softmax", "cosine"] = "auto"
    newline: Literal["keep", "nonempty", "drop"] = "keep"
    exact_budget: bool = True

    name: ClassVar[str] = "globalcom2"
    paper: ClassVar[str] = "arXiv 2501.05179"
    otherwise: ClassVar[str] = 'set score="auto" or "cosine", which need no CLS token'
    presets: ClassVar[Presets] = {  # the official arithmetic, by the retention ratio R
        "llava-next": {ratio: {"keep": ratio, "exact_budget": False} for ratio in (0.25, 0.1, 0.5, 0.75)}
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature!r}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha!r}")
        if self.score not in _SCORES:
            raise ValueError(f"score must be one of {', '.join(map(repr, _SCORES))}, got {self.score!r}")
        if self.newline not in ("keep", "nonempty", "drop"):
            raise ValueError(f'newline must be "keep", "nonempty" or "drop", got {self.newline!r}')
        if self.newline == "nonempty" and self.exact_budget:
            raise ValueError('newline="nonempty" depends on the scores: set exact_budget=False as well')

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({_SCORES[self.score], "encoder_features"} - {""})

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 1) -> Sequence[int | None]:
        exact = super().budget(counts, layer, depth)
        if self.exact_budget:
            return exact
        return [kept if kept == count else None for kept, count in zip(exact, counts)]

    def selection_flops(self, sizes: Sizes) -> int:
        if sizes.signals & {"cls_logits_last", "cls_attention_last"}:
            return 0
        return (
            2 * (len(sizes.grids) + 2) * sizes.tokens * sizes.encoder_width
        )  # means of pictures; a thumbnail makes one less

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        scores = tokens.signal(_SCORES[self.score]) if _SCORES[self.score] else None
        kept = []
        for item, (geometry, keep) in enumerate(zip(tokens.geometry, budget.tolist())):
            count = len(geometry)
            view = _View(geometry, tokens.features.device)
            features = partial(_features, tokens, item, count)
            local = view.distinctness(features()) if scores is None else scores[item, :count]
            importance, sums = self._importance(view, local, features)
            pick = self._pick_exactly if self.exact_budget else self._pick_as_published
            kept.append(pick(view, importance, sums, keep))
        return Selection(pad_sequence(kept, batch_first=True, padding_value=-1))

    def _importance(self, view: _View, local: Tensor, features: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """fp32 [N], by which a picture's tokens rank; float64 [G], what the global view says of each picture."""
        if view.single:
            return local, view.sums(local)
        if view.thumbnail is None:
            rows = features()
            general = -cosine_similarity(rows, view.mean(rows), dim=-1)
            return holistic_scores(local, general, view.members, self.alpha), view.sums(general)
        overview = local[view.thumbnail]
        general = view.resized(overview)
        mixed = holistic_scores(local, general, view.members, self.alpha)
        mixed[view.thumbnail] = overview
        return mixed, view.region_sums(overview)

    def _pick_exactly(self, view: _View, importance: Tensor, sums: Tensor, keep: int) -> Tensor:
        """int64 [keep]."""
        breaks = view.breaks if self.newline == "keep" and 2 * view.breaks <= keep else max(0, keep - view.placed)
        shown = keep - breaks
        overview = round(shown * view.sizes[0] / max(view.placed, 1))
        quota = crop_ratios(sums, shown / max(view.placed, 1), self.temperature) * view.size_of[1:]
        rank = view.rank(importance)
        # Sainte-Lague: seat number k of a crop costs (k + 1/2) / quota; the cheapest seats are taken.
        cost = (rank + 0.5) / torch.cat([quota.new_ones(1), quota, quota.new_ones(1)])[view.group]
        cost = torch.where(view.group == 0, torch.where(rank < overview, -1.0, torch.inf), cost)
        cost = torch.where(view.group == view.last, torch.where(rank < breaks, -1.0, torch.inf), cost)
        return cost.argsort(stable=True)[:keep]

    def _pick_as_published(self, view: _View, importance: Tensor, sums: Tensor, keep: int) -> Tensor:
        """int64 [N], -1 behind the last."""
        whole = isinstance(self.keep, numbers.Integral)
        ratio = min(1.0, self.keep / len(importance)) if whole else float(self.keep)
        allowed = (crop_ratios(sums, ratio, self.temperature) * view.size_of[1:]).floor()
        overview = allowed.new_full((1,), truncate(view.sizes[0] * ratio))
        breaks = allowed.new_full((1,), view.breaks if self.newline == "keep" else 0)
        stays = view.rank(importance) < torch.cat([overview, allowed, breaks])[view.group]
        if self.newline == "nonempty":
            stays = stays | view.nonempty(stays)
        count = len(importance)
        index = torch.where(stays, torch.arange(count, device=stays.device), count).sort().values
        return index.masked_fill(index == count, -1)


def crop_ratios(sums: Tensor, ratio: float, temperature: float = 10.0) -> Tensor:
    """Share that each crop keeps, float64 [G], from what the global view says of it, `sums` [G].

    Step 2 of `GlobalCom2`: sigma = softmax(sums / temperature), with 1e-8 added to its
    denominator as the official code does; r = min(1, ratio (1 + sigma - mean sigma)).
    """
    above = ((sums.double() - sums.double().max()) / temperature).exp()
    sigma = above / (above.sum() + 1e-8)
    return (ratio * (1 + sigma - sigma.mean())).clamp(max=1)


def holistic_scores(local: Tensor, general: Tensor, members: Tensor, alpha: float = 0.5) -> Tensor:
    """fp32 [N]: alpha * general / |general| + (1 - alpha) * local / |local|, norms over the tokens of the same picture.

    Step 3 of `GlobalCom2`, where alpha 0.5 ranks as the sum does.

    Args:
        local, general: [N].
        members: bool [G, N], tokens of each picture; a token is in at most one.
    """

    def unit(scores: Tensor) -> Tensor:
        scores = scores.float()
        norm = torch.where(members, scores, 0.0).norm(dim=1).clamp(min=1e-12)
        return scores / (members.float() * norm[:, None]).sum(0).clamp(min=1e-12)

    return alpha * unit(general) + (1 - alpha) * unit(local)


def tile_grid(geometry: Geometry) -> tuple[int, int]:
    """(rows, columns) of the tiles that plane 1 is put together from; those lost to padding count."""
    assert geometry.tile is not None
    count, crops = len(geometry.pictures) - 1, geometry.plane == 1
    down = geometry.tile[crops & (geometry.col == 0)].unique().tolist()
    across = len(geometry.tile[crops & (geometry.row == 0)].unique())
    if len(down) > 1:
        across = down[1] - down[0]
    elif count % max(across, 1):
        across = count
    return count // across, across


def regions(shape: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """int64 [rows * cols]: the crop, numbered row by row, whose region each cell of a map of `shape` lies in."""
    (rows, cols), (down, across) = shape, grid
    row = (torch.arange(rows, device="cpu") // max(rows // down, 1)).clamp(max=down - 1)
    col = (torch.arange(cols, device="cpu") // max(cols // across, 1)).clamp(max=across - 1)
    return (row[:, None] * across + col).flatten()


def _features(tokens: VisualTokens, item: int, count: int) -> Tensor:
    return tokens.signal("encoder_features")[item, :count].float()


class _View:
    """One item as thumbnail (group 0), crops or frames (1 to G) and line breaks (the last group).

    Attributes:
        group: int64 [N].
        members: bool [G, N], tokens of each crop.
        thumbnail: int64 [rows * cols], its tokens in raster order; None: the item has none.
        sizes: tokens of each group; `size_of` the same as float64 [G + 1], without the line breaks.
        placed, breaks: tokens that show a place, and others.
        single: it is one picture.
    """

    def __init__(self, geometry: Geometry, device: torch.device) -> None:
        loose = geometry.placeless
        source = picture_of(geometry)
        tiled = geometry.tile is not None and len(geometry.grids) > 1
        crops = len(geometry.pictures) - tiled
        self.last = crops + 1
        group = torch.where(loose, self.last, source if tiled else source + 1)
        self.sizes = torch.bincount(group, minlength=self.last + 1).tolist()
        self.breaks = self.sizes[self.last]
        self.placed = len(geometry) - self.breaks
        self.single = crops == 1 and not tiled
        self.thumbnail: Tensor | None = None
        if tiled:
            (rows, cols), self._shape = geometry.grids
            place = (geometry.row * cols + geometry.col).masked_fill(group != 0, rows * cols)
            self.thumbnail = place.argsort(stable=True)[: rows * cols].to(device, non_blocking=True)
            self._map = rows, cols
            of = regions(self._map, tile_grid(geometry))
            self._regions = (of == torch.arange(crops, device="cpu")[:, None]).to(device, non_blocking=True)
            self._row = geometry.row.clamp(min=0).to(device, non_blocking=True)
            self._col = geometry.col.clamp(min=0).to(device, non_blocking=True)
        # A line break ends what stands between it and the one before, in its plane.
        line = (loose.cumsum(0) - loose.long()) * len(geometry.grids) + geometry.plane
        line = line.unique(return_inverse=True)[1]
        self._line, self._loose = line.to(device, non_blocking=True), loose.to(device, non_blocking=True)
        self.group = group.to(device, non_blocking=True)
        self.members = self.group == torch.arange(1, crops + 1, device=device)[:, None]
        self.size_of = torch.tensor(self.sizes[:-1], dtype=torch.float64, device="cpu").to(device, non_blocking=True)
        starts = torch.tensor([0, *self.sizes[:-1]], device="cpu").cumsum(0)
        self._start = starts.to(device, non_blocking=True)

    def rank(self, scores: Tensor) -> Tensor:
        """int64 [N]: place of each token in its group by descending score; line breaks in their order."""
        order = scores.masked_fill(self._loose, 0).argsort(descending=True, stable=True)
        order = order[self.group[order].argsort(stable=True)]
        place = torch.arange(len(order), device=order.device) - self._start[self.group[order]]
        return torch.empty_like(place).scatter(0, order, place)

    def sums(self, scores: Tensor) -> Tensor:
        """float64 [G]: sum of scores [N] over each crop."""
        return torch.where(self.members, scores.double(), 0.0).sum(1)

    def region_sums(self, overview: Tensor) -> Tensor:
        """float64 [G]: sum of the thumbnail's scores over each crop's region."""
        return torch.where(self._regions, overview.double(), 0.0).sum(1)

    def resized(self, overview: Tensor) -> Tensor:
        """fp32 [N]: the thumbnail's scores at the place of each token of the crops (bilinear)."""
        grid = interpolate(overview.float().view(1, 1, *self._map), size=self._shape, mode="bilinear")
        return grid[0, 0][self._row.clamp(max=self._shape[0] - 1), self._col.clamp(max=self._shape[1] - 1)]

    def mean(self, features: Tensor) -> Tensor:
        """[C]: mean of the features [N, C] of tokens that show a place."""
        return torch.where(self._loose[:, None], 0.0, features).sum(0) / max(self.placed, 1)

    def distinctness(self, features: Tensor) -> Tensor:
        """fp32 [N]: -cos(x, mean of its picture)."""
        groups = torch.arange(self.last + 1, device=features.device)
        member = (self.group == groups[:, None]).float()
        means = member @ features / member.sum(1, keepdim=True).clamp(min=1)
        return -cosine_similarity(features, means[self.group], dim=-1)

    def nonempty(self, stays: Tensor) -> Tensor:
        """bool [N]: line breaks of lines of which something stays."""
        stay = torch.zeros_like(self._line).scatter_add(0, self._line, stays.long())
        return self._loose & (stay[self._line] > 0)
