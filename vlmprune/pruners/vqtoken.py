from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from vlmprune.contract import Geometry, Keep, Positions, Pruner, Selection, Sizes, VisualTokens
from vlmprune.kernels import max_min_flops, max_min_select, merge_tokens, pairwise_cosine
from vlmprune.pruners._places import fill_up, placed, remaining
from vlmprune.pruners._weights import check_made_for, check_width, load_module, products, save_module, trained_module
from vlmprune.registry import register_pruner

BLOCK = 1 << 26  # entries of the table of similarities held at a time, 256 MiB in fp32
GRID = (4, 8, 8)  # frames, rows and columns of the map of a cluster
SCRIPT = "training/condense.py --method vqtoken"
LEAST, MOST = 12, 32  # clusters that the elbow chooses between


@torch.no_grad()
def kmeans(
    x: Tensor, start: Tensor, mask: Tensor, there: Tensor, iterations: int = 100, tolerance: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """K-means with cosine assignment and plain means: int64 [I, N] clusters and fp32 [I, K, D] centres.

    A row goes to the centre of largest cosine (the first of equals), a centre becomes the mean of its rows, not brought
    to unit length, and stays where it has none. An item is done once its centres move by less than `tolerance`
    (Frobenius norm); its clusters then belong to the centres before that move, and the centres are those behind it.

    Args:
        x: fp32 [I, N, D], unit rows.
        start: fp32 [I, K, D].
        mask: bool [I, N], which rows count; others get -1.
        there: bool [I, K], which centres there are.
    """
    count = start.shape[1]
    own = torch.arange(count, device=x.device).expand(len(x), -1)
    # The centres' places in front weigh nothing: a cluster's mean is that of its rows alone.
    rows = torch.cat([torch.zeros_like(start), x], 1)
    weight = torch.cat([torch.zeros_like(there), mask], 1).float()
    centres, done = start, torch.zeros(len(x), 1, dtype=torch.bool, device=x.device)
    into = torch.full(x.shape[:2], -1, device=x.device)
    for _ in range(iterations):
        found = nearest(x, centres, there).masked_fill(~mask, -1)
        into = torch.where(done, into, found)
        means, size = merge_tokens(rows, own, torch.cat([own, into], 1), weight=weight)
        moved = torch.where((size > 0)[..., None] & ~done[..., None], means, centres)
        change = (moved - centres).flatten(1).norm(dim=1, keepdim=True)
        centres, done = moved, done | (change < tolerance)
        # Only where looking costs nothing; elsewhere what is done no longer changes.
        if done.device.type == "cpu" and bool(done.all()):
            break
    return into, centres


@torch.no_grad()
def nearest(x: Tensor, centres: Tensor, there: Tensor) -> Tensor:
    """int64 [I, N]: the centre [I, K, D] of largest cosine, of those open (bool [I, K]); the first of equals."""
    step = max(1, BLOCK // (len(x) * centres.shape[1]))
    parts = []
    for some in x.split(step, 1):
        distance = (1 - pairwise_cosine(some, centres, y_mask=there)).masked_fill_(~there[:, None], torch.inf)
        parts.append(distance.argmin(2))
    return torch.cat(parts, 1)


def distortion(x: Tensor, into: Tensor, centres: Tensor) -> Tensor:
    """fp32 [I]: sum over rows of their squared distance to their centre."""
    gap = x - centres.gather(1, into.clamp(min=0)[..., None].expand_as(x))
    return gap.square().sum(2).masked_fill(into < 0, 0).sum(1)


def elbow(distortions: Tensor) -> int:
    """The place, counted from 1, where a curve [M] bends most: largest second difference, the first of equals.

    Raises:
        ValueError: fewer than three points.
    """
    if len(distortions) < 3:
        raise ValueError(f"an elbow takes at least three points, got {len(distortions)}")
    return int(distortions.diff(n=2).argmax()) + 2


@torch.no_grad()
def medoids(x: Tensor, into: Tensor, centres: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """The row most like each cluster's centre, int64 [I, K], -1 where none is open, and clusters [I, N] without a gap.

    A cluster without a row takes over one: of the rows that are no medoids, those least like their centres, one each.
    """
    count = centres.shape[1]
    likeness = _likeness(x, centres, into)
    place = torch.arange(x.shape[1], device=x.device).expand_as(into)
    slot = torch.where(into < 0, count, into)
    best = likeness.new_full((len(x), count + 1), -torch.inf).scatter_reduce(1, slot, likeness, "amax")
    first = torch.where(likeness == best.gather(1, slot), place, x.shape[1])
    medoid = torch.full_like(best, x.shape[1], dtype=torch.int64).scatter_reduce(1, slot, first, "amin")[:, :count]
    empty = there & (medoid == x.shape[1])
    taken = torch.zeros(len(x), x.shape[1] + 1, dtype=torch.bool, device=x.device)
    taken = taken.scatter(1, medoid, True)[:, :-1] | (into < 0)
    spare = likeness.masked_fill(taken, torch.inf).argsort(dim=1, stable=True)
    number = (empty.cumsum(1) - 1).clamp(min=0)
    medoid = torch.where(empty, spare.gather(1, number.clamp(max=x.shape[1] - 1)), medoid)
    medoid = medoid.masked_fill(~there, -1)
    own = torch.arange(count, device=x.device).expand_as(medoid)
    wide = torch.cat([into, into.new_empty(len(x), 1)], 1)
    return medoid, wide.scatter(1, torch.where(medoid < 0, x.shape[1], medoid), own)[:, :-1]


def _likeness(x: Tensor, centres: Tensor, into: Tensor) -> Tensor:
    """fp32 [I, N]: cosine of each row and its centre."""
    own = centres.gather(1, into.clamp(min=0)[..., None].expand_as(x))
    return cosine_similarity(x, own, dim=-1)


class _Clustered(Pruner):
    """What both forms share: clusters, how many, and where their rows stand."""

    elbow: bool
    least: int
    most: int
    iterations: int
    tolerance: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.least >= 1 and self.least + 2 <= self.most):
            raise ValueError(f"{self.name} needs least >= 1 and most >= least + 2, got {self.least!r}, {self.most!r}")
        if self.iterations < 1 or not self.tolerance >= 0:
            raise ValueError(
                f"{self.name} needs at least one iteration and a tolerance of at least 0, got {self.iterations!r} and "
                f"{self.tolerance!r}"
            )

    def finish(self, tokens: VisualTokens, rows: Tensor, into: Tensor) -> Tensor:
        """[I, K, D]: the rows of the clusters, of their means; `into` int64 [I, N] says who is in which."""
        return rows

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 1) -> Sequence[int | None]:
        plain = super().budget(counts, layer, depth)
        if not self.elbow:
            return plain
        return [count if keep == count or count <= self.least else None for keep, count in zip(plain, counts)]

    def selection_flops(self, sizes: Sizes) -> int:
        """With as many iterations as there may be, and as many clusters where their number is sought."""
        n, width = sizes.tokens, sizes.width
        most = min(self.most, n) if self.elbow else sizes.keep
        tried = sum(range(self.least, most + 1)) if self.elbow else 0
        picks = (1 + self.elbow) * max_min_flops(n, most, width)
        return picks + 2 * n * width * self.iterations * (tried + most) + self.finish_flops(most)

    def finish_flops(self, clusters: int) -> int:
        """Products of `finish`."""
        return 0

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        x, mask = normalize(tokens.features.detach().float(), dim=-1), placed(tokens)
        counts = self._bends(tokens, x, mask) if self.elbow else budget
        into, medoid = self._clusters(tokens, x, mask, counts)
        rows, size = merge_tokens(tokens.features, medoid, into)
        rows = self.finish(tokens, rows, into)
        index = medoid if self.elbow else fill_up(medoid, tokens, budget)
        plain = tokens.features.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, rows.shape[2]))
        return Selection(index, torch.where((medoid < 0)[..., None], plain, rows), size > 1)

    def _clusters(self, tokens: VisualTokens, x: Tensor, mask: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [I, N], the cluster of each token, and [I, K], where each stands; `counts` int64 [I], on the CPU."""
        first = max_min_select(x, counts, mask=mask, max_k=int(counts.max()))
        start = x.gather(1, first.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
        into, centres = kmeans(x, start, mask, first >= 0, self.iterations, self.tolerance)
        medoid, into = medoids(x, into, centres, first >= 0)
        return into, medoid

    def _bends(self, tokens: VisualTokens, x: Tensor, mask: Tensor) -> Tensor:
        """int64 [I], on the CPU: how many clusters each item asks for. Waits for a GPU."""
        found = []
        for rows, real in zip(x[:, None], mask[:, None]):
            places = int(real.sum())
            sizes = range(self.least, min(self.most, places) + 1)
            if len(sizes) < 3:
                found.append(min(self.least, places))
                continue
            picks = max_min_select(rows, sizes[-1], mask=real)
            curve = []
            for number in sizes:
                start = rows.gather(1, picks[:, :number, None].expand(-1, -1, rows.shape[2]))
                there = torch.ones(1, number, dtype=torch.bool, device=x.device)
                curve.append(distortion(rows, *kmeans(rows, start, real, there, self.iterations, self.tolerance)))
            found.append(sizes[elbow(torch.cat(curve)) - 1])
        return torch.tensor(found, device="cpu")


@register_pruner
@dataclass(kw_only=True)
class KMeansTokens(_Clustered):
    """Cluster all visual tokens of an item and keep the mean of each cluster.

    VQToken's codebook (arXiv 2503.16980, NeurIPS 2025) without its training: not the published model, a stand-in for
    `vqtoken`. Blind to the question. K-means on unit rows with cosine assignment (`kmeans`); the row of a cluster is
    the mean of its tokens, not of their unit rows as published, which loses their size, and stands at the member most
    like the centre. Their order is that of the picture (published: arbitrary), positions as published compact.

    The first centres are those of greedy max-min diversity, `DivPrune`'s picks, not random: the same input gives the
    same clusters. A cluster that ends up empty takes over the token least like its own centre, so that `keep` is exact.
    Line breaks join no cluster, and stay only where `keep` has room for them after all places.

    Attributes:
        elbow: choose the number of clusters from `least` to `most` by the bend of the distortion over it; a `keep` of
            less than all then has no further say. The official code forgets that its curve starts at 12 and adds 2
            twice, which gives 12 most of the time; here the bend is where it is. Runs K-means for every number.
        iterations, tolerance: of K-means.
    """

    keep: Keep = MOST
    positions: Positions = "compact"
    elbow: bool = False
    least: int = LEAST
    most: int = MOST
    iterations: int = 100
    tolerance: float = 1e-4

    name: ClassVar[str] = "kmeans_tokens"
    paper: ClassVar[str] = "after arXiv 2503.16980, without its training"


class VQAttention(nn.Module):
    """The trained part of VQToken: what a cluster says of where and when its tokens are.

    Args:
        hidden: D, width of the language model.
        width: of the attention, a multiple of `heads`.
        grid: frames, rows and columns of the map that a cluster's tokens are counted on.
    """

    def __init__(self, hidden: int, width: int = 64, heads: int = 4, grid: Sequence[int] = GRID) -> None:
        super().__init__()
        self.hidden, self.width, self.heads, self.grid = hidden, width, heads, tuple(grid)
        self.codes = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, width))
        self.hash = nn.Sequential(nn.Linear(math.prod(self.grid), 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.out = nn.Linear(width, hidden)
        self.mix = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden)
        )
        # At first a cluster's row is its mean.
        for last in (self.out, self.mix[3]):
            nn.init.zeros_(last.weight)  # type: ignore[arg-type]
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def forward(self, codebook: Tensor, maps: Tensor, there: Tensor) -> Tensor:
        """fp32 [I, K, D]: b + attention with Q = K = codebook and V = MLP(map), then a residual MLP.

        Args:
            codebook: [I, K, D].
            maps: fp32 [I, K, cells], `occupancy`.
            there: bool [I, K], which clusters there are; at least one an item.
        """
        rows = codebook.float()
        codes = self.codes(rows)
        found = self.attention(codes, codes, self.hash(maps), key_padding_mask=~there, need_weights=False)[0]
        rows = rows + self.out(found)
        return rows + self.mix(rows)

    def save(self, folder: str | Path, **notes: Any) -> None:
        """Write `model.safetensors` (fp16) and `config.json`; `notes` go into the latter."""
        shape = {"hidden": self.hidden, "width": self.width, "heads": self.heads, "grid": list(self.grid)}
        save_module(self, folder, torch.float16, method="vqtoken", **shape, **notes)

    @classmethod
    def load(cls, folder: str | Path) -> VQAttention:
        """Read what `save` wrote, on the CPU, in fp32.

        Raises:
            ValueError: no such folder, or weights that do not fit its config.
        """
        names = ("hidden", "width", "heads", "grid")
        return load_module(folder, "vqtoken", SCRIPT, lambda config: cls(*(config[name] for name in names)))


def cells(geometry: Geometry, grid: Sequence[int]) -> Tensor:
    """int64 [N] on the CPU: the cell of a frames x rows x columns grid over the item that each token lies in, or -1."""
    sizes = torch.tensor(geometry.grids, device="cpu")[geometry.plane]
    where = (geometry.plane, geometry.row, geometry.col)
    extents = (torch.full_like(geometry.plane, len(geometry.grids)), sizes[:, 0], sizes[:, 1])
    place = torch.zeros_like(geometry.plane)
    for at, extent, parts in zip(where, extents, grid):
        place = place * parts + at.clamp(min=0) * parts // extent
    return place.masked_fill(geometry.placeless, -1)


def occupancy(into: Tensor, cell: Tensor, clusters: int, size: int) -> Tensor:
    """fp32 [I, K, size]: the share of each cluster's tokens that lie in each cell; the index map, cluster by cluster.

    Args:
        into: int64 [I, N], the cluster of each token, -1 for none.
        cell: int64 [I, N], -1 for none.
    """
    # Counts are whole numbers: their sum does not depend on its order.
    slot = torch.where((into < 0) | (cell < 0), clusters * size, into * size + cell)
    counts = torch.zeros(len(into), clusters * size + 1, device=into.device)
    counts = counts.scatter_add(1, slot, torch.ones_like(slot, dtype=counts.dtype))[:, :-1].view(-1, clusters, size)
    return counts / counts.sum(2, keepdim=True).clamp(min=1)


@register_pruner
@dataclass(kw_only=True)
class VQToken(_Clustered):
    """Cluster all visual tokens of an item, and let each cluster's row tell where and when its tokens are.

    "Neural Discrete Token Representation Learning for Extreme Token Reduction in Video Large Language Models", NeurIPS
    2025, arXiv 2503.16980. Trained, blind to the question. The codebook is that of `kmeans_tokens`, the token hash is
    the map of which token is in which cluster, and VQ-Attention puts the second into the first: Q = K = codebook,
    V = MLP(map), as in the paper (`VQAttention`).

    The released weights belong to a LLaVA-OneVision 0.5B fine-tuned with them, vision tower included, and make no sense
    in another language model: they are not read here. `weights` is a folder written by `training/condense.py`, for one
    language model, which stays as it is; without weights there is `kmeans_tokens`. The released code attends the other
    way round (rows of the map, one per frame, ask the codebook, the smaller set repeated to the size of the larger) and
    at its last state does not run this module at all. Decided here: the map of a cluster is the share of its tokens in
    each cell of a `grid` over frames, rows and columns, so that any number of frames and tokens fits; the codebook
    holds plain means, which keep their size; a residual MLP follows, and no norm, since the language model is not
    trained along.

    Attributes:
        weights: the folder, or the module itself.
        elbow, least, most, iterations, tolerance: as in `kmeans_tokens`.
    """

    keep: Keep = MOST
    positions: Positions = "compact"
    weights: str | Path | VQAttention | None = None
    elbow: bool = False
    least: int = LEAST
    most: int = MOST
    iterations: int = 100
    tolerance: float = 1e-4

    name: ClassVar[str] = "vqtoken"
    paper: ClassVar[str] = "arXiv 2503.16980"
    trained: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._module = trained_module(self.name, VQAttention, self.weights, f"{SCRIPT} wrote", "kmeans_tokens")

    def check_model(self, config: Any) -> None:
        check_made_for(self.name, SCRIPT, self._module, config)

    def finish_flops(self, clusters: int) -> int:
        return clusters * products(self._module) + 4 * clusters**2 * self._module.width

    def finish(self, tokens: VisualTokens, rows: Tensor, into: Tensor) -> Tensor:
        check_width(self.name, SCRIPT, self._module.hidden, tokens)
        module, clusters = self._module.to(rows.device), rows.shape[1]
        cell = remaining(tokens, [cells(shape, module.grid) + 1 for shape in tokens.shapes]) - 1
        maps = occupancy(into, cell, clusters, math.prod(module.grid))
        there = maps.sum(2) > 0
        first = torch.arange(clusters, device=rows.device) == 0
        return module(rows, maps, there | first).to(rows.dtype)
