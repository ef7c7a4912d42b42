"""Scenes of a video and clusters within its frames: what FastVID, FlashVID and HoliTom share.

Nothing here waits for a GPU: scenes, counts and clusters stay on the device as masks and numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels import merge_tokens
from vlmprune.pruners._video import cosine

ATTENTION = "cls_attention_last|received_attention_last"
"""The signal by which vision encoders rank their tokens."""

BLOCK = 1 << 26  # entries of pairwise tables held at a time, 256 MiB in fp32


@torch.no_grad()
def scenes(frames: Tensor, threshold: float, least: int) -> Tensor:
    """int64 [T]: number of the scene of each frame, ascending from 0.

    A new one begins where the cosine of neighbouring frames' means is below `threshold`, and in any case where it is
    smallest, so that there are `least` scenes (as many as frames, if these are fewer).

    Args:
        frames: [T, n, D].
    """
    likeness = cosine(*_neighbours(frames.float().mean(dim=1)))
    smallest = likeness.argsort(stable=True).argsort(stable=True) < least - 1
    return torch.cat([likeness.new_zeros(1), (smallest | (likeness < threshold)).cumsum(0)]).long()


def _neighbours(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows[1:], rows[:-1]


def total_of(values: Tensor, group: Tensor) -> Tensor:
    """[T]: for each entry the sum of `values` [T] over its group, int64 [T] below T."""
    return torch.zeros_like(values).index_add(0, group, values)[group]


def rank_in(values: Tensor, group: Tensor) -> Tensor:
    """int64 [T]: how many of its group (int64 [T] below T) come before an entry, the largest first, then the first."""
    order = values.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    sizes = torch.zeros_like(group).index_add(0, group, torch.ones_like(group))
    begin = (sizes.cumsum(0) - sizes)[group[order]]
    place = torch.arange(len(group), device=group.device) - begin
    return torch.zeros_like(group).scatter(0, order, place)


def apportion(sizes: Tensor, total: Tensor, group: Tensor) -> Tensor:
    """int64 [T]: split each group's `total` over its members in proportion to their sizes.

    Largest remainders, then the first. Nobody gets more than its size; everybody with a size gets at least one where
    there are enough.

    Args:
        sizes: int64 [T].
        total: int64 [T], the group's total at each of its members, at most the sum of their sizes.
        group: int64 [T], below T.
    """
    some = (sizes > 0).long()
    reserved = torch.where(total >= total_of(some, group), some, 0)
    sizes, total = sizes - reserved, total - total_of(reserved, group)
    wanted = sizes.double() * total / total_of(sizes, group).clamp(min=1)
    whole = wanted.floor().long()
    extra = rank_in(wanted - whole, group) < total - total_of(whole, group)
    return reserved + whole + extra.long()


@torch.no_grad()
def density(rows: Tensor, mask: Tensor, neighbours: int) -> Tensor:
    """fp32 [B, n]: density-peak score of each row, -1 where it does not count (DPC-KNN).

    rho * delta with d = |x - y| / sqrt(D), rho = exp(-mean of the `neighbours` smallest d^2, its own 0 among them) and
    delta the distance to the nearest denser row, the largest distance there is where none is denser.

    Args:
        rows: [B, n, D].
        mask: bool [B, n], which of them count.
    """
    blocks = max(1, BLOCK // max(1, rows.shape[1] ** 2))
    return torch.cat([_density(x, m, neighbours) for x, m in zip(rows.split(blocks), mask.split(blocks))])


def _density(rows: Tensor, mask: Tensor, neighbours: int) -> Tensor:
    pair = mask[:, :, None] & mask[:, None]
    distance = distances(rows, rows).masked_fill_(~pair, torch.inf)
    nearest = distance.topk(min(neighbours, rows.shape[1]), dim=2, largest=False).values.square()
    near = nearest.isfinite()
    rho = torch.exp(-nearest.masked_fill(~near, 0).sum(2) / near.sum(2).clamp(min=1)).masked_fill(~mask, -1)
    farthest = distance.masked_fill(~pair, -1).amax(dim=(1, 2))
    denser = rho[:, None] > rho[:, :, None]
    delta = distance.masked_fill_(~denser, torch.inf).amin(2)
    delta = torch.where(delta.isfinite(), delta, farthest[:, None])
    return (rho * delta).masked_fill(~mask, -1)


def distances(x: Tensor, y: Tensor) -> Tensor:
    """fp32 [B, n, m]: |x - y| / sqrt(D) of rows [B, n, D] and [B, m, D]."""
    return torch.cdist(x.float(), y.float()) / x.shape[-1] ** 0.5


def distance_flops(size: int, width: int) -> int:
    """Products of `distances` among `size` rows: torch takes them from 26 rows on, with two further columns."""
    return 2 * size**2 * (width + 2) if size > 25 else 0


@torch.no_grad()
def clusters(rows: Tensor, mask: Tensor, counts: Tensor, neighbours: int = 7) -> tuple[Tensor, Tensor]:
    """The `counts` [B] rows of best density-peak score as centres, and everybody's nearest centre.

    Args:
        rows: [B, n, D].
        mask: bool [B, n], which of them count; at least as many as `counts`.

    Returns:
        centres, bool [B, n], and int64 [B, n], the place of the centre each row joins: a centre its own, a row that
        does not count or has no centre its own too.
    """
    score = density(rows, mask, neighbours)
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
    centre = rank < counts[:, None]
    own = torch.arange(rows.shape[1], device=rows.device).expand_as(rank)
    blocks = max(1, BLOCK // max(1, rows.shape[1] ** 2))
    nearest = torch.cat(
        [
            distances(x, x).masked_fill_(~c[:, None], torch.inf).argmin(2)
            for x, c in zip(rows.split(blocks), centre.split(blocks))
        ]
    )
    joins = mask & ~centre & (counts > 0)[:, None]
    return centre, torch.where(joins, nearest, own)


def means(rows: Tensor, into: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """fp32 [B, N, D], `rows` with the weighted mean of those that go there at each target, and fp32 [B, N], its weight.

    Args:
        rows: [B, N, D].
        into: int64 [B, N], the target's place; targets go to their own, -1 leaves.
        weight: fp32 [B, N]; None: 1 each.

    Gradients pass to `rows` alone.
    """
    own = torch.arange(rows.shape[1], device=rows.device)
    target = into == own
    slot = target.cumsum(1) - 1
    keep = (~target).int().sort(dim=1, stable=True).indices
    keep = torch.where(own < target.sum(1, keepdim=True), keep, -1)
    into = torch.where(into < 0, -1, slot.gather(1, into.clamp(min=0)))
    merged, total = merge_tokens(rows.float(), keep, into, weight=None if weight is None else weight.detach())
    slot = slot.clamp(min=0)
    merged = merged.gather(1, slot[..., None].expand_as(merged))
    return torch.where(target[..., None], merged, rows.float()), torch.where(target, total.detach().gather(1, slot), 0)


def top_of_each(score: Tensor, mask: Tensor, counts: Tensor | int) -> Tensor:
    """bool [T, n]: of the rows in `mask` the `counts` ([T], or one) best of each frame, the lowest first in a tie."""
    score = score.float().masked_fill(~mask, -torch.inf)
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
    return (rank < (counts if isinstance(counts, int) else counts[:, None])) & mask


def filled(kept: Tensor, score: Tensor, total: int) -> Tensor:
    """bool [T, n]: `kept`, and of the others those with the best score, so that there are `total`."""
    rank = torch.where(kept.flatten(), torch.inf, score.flatten().float()).argsort(descending=True, stable=True)
    return torch.zeros_like(kept.flatten()).index_fill(0, rank[:total], True).view_as(kept)
