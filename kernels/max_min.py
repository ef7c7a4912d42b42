"""Greedy max-min diversity (k-center): keep the tokens that lie farthest apart under cosine distance."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ._common import Count, Directions, check_tokens, directions, operation, resolve_backend, row_counts
from .cosine import cosine_reference, gram, gram_flops

First = Literal["isolated", "eccentric"] | int | Tensor
Objective = Literal["max_min", "max_sum"]

_GRAM_BYTES = 4 << 30


def max_min_select(
    x: Tensor,
    k: Count,
    *,
    mask: Tensor | None = None,
    first: First = "isolated",
    objective: Objective = "max_min",
    max_k: int | None = None,
    backend: str = "auto",
    eps: float = 1e-8,
) -> Tensor:
    """Pick `k` rows per item, each the farthest (in cosine distance 1 - cos) from those already picked.

    With `objective="max_min"` "farthest" is the distance to the nearest picked row (DivPrune, arXiv 2503.02175,
    Algorithm 1; Gonzalez' k-center greedy); with "max_sum" it is the sum of distances to all picked rows (ToDRE,
    arXiv 2505.18757, Algorithm 1). A picked row is never a candidate again. Ties go to the lowest index.

    Args:
        x: `[B, N, D]`, any floating dtype and strides; distances are computed in fp32 from unit rows.
        k: picks per item: an int, one int per row, or an integer tensor `[B]`. A row with fewer valid tokens than its
            `k` yields all of them.
        mask: `[B, N]` bool, True where a row of `x` is a token.
        first: the first pick. "isolated" is the row with the largest distance to its nearest neighbour (DivPrune);
            "eccentric" the row least similar to the mean of the unit rows (ToDRE's choice without a salient pivot);
            an int or an integer tensor `[B]` is the index itself (ToDRE's pivot).
        max_k: the largest value in a tensor `k`, known on the host; without it a CUDA `k` costs a synchronisation.
        backend: "auto" (Triton on a GPU, torch elsewhere), "torch" or "triton".
        eps: norms below it are raised to it, so a zero row has similarity 0 to everything.

    Returns:
        int64 `[B, K]` in the order of selection, K = min(largest k, N); rows with fewer picks are padded by -1.

    Raises:
        ValueError: on wrong shapes, counts or indices, and on NaN or inf in a valid row of a CPU tensor. On a GPU
            values are not inspected: a row with NaN or inf counts as a zero row, `first` must be a valid token.
        RuntimeError: `backend="triton"` on a CPU tensor outside Triton's interpreter.
    """
    check_tokens("x", x, mask)
    if objective not in ("max_min", "max_sum"):
        raise ValueError(f"unknown objective {objective!r}; choose 'max_min' or 'max_sum'")
    counts, width = row_counts(k, max_k, x)
    index: Tensor | None = None
    if isinstance(first, int):
        if not 0 <= first < max(x.shape[1], 1):
            raise ValueError(f"first must be in [0, {x.shape[1]}), got {first}")
        index = torch.full((x.shape[0],), first, dtype=torch.int64, device=x.device)
        first = "isolated"
    elif isinstance(first, Tensor):
        if first.is_floating_point() or first.shape != (x.shape[0],):
            raise ValueError(f"first must be an integer tensor [{x.shape[0]}], got {first.dtype} {list(first.shape)}")
        index = first.to(x.device, torch.int64, non_blocking=True)
        first = "isolated"
    elif first not in ("isolated", "eccentric"):
        raise ValueError(f"unknown first pick {first!r}; choose 'isolated', 'eccentric' or an index")
    return _max_min_select(
        x, counts, width, mask, index, first == "eccentric", objective == "max_sum", eps, resolve_backend(backend, x)
    )


def max_min_flops(n: int, k: int, width: int) -> int:
    """Products of `max_min_select` on the CPU for one item, 2 FLOPs a multiply-add; "eccentric" takes 4 `n width` more.

    Its loop has none but where the cosines are too many to hold.
    """
    if 4 * n * n <= _GRAM_BYTES:
        return gram_flops(n, width)
    return 2 * n * width * (n + k)


@operation(
    "max_min_select",
    schema=(
        "(Tensor x, Tensor counts, int width, Tensor? mask, Tensor? first, bool eccentric, bool total, float eps, "
        "str backend) -> Tensor"
    ),
)
def _max_min_select(
    x: Tensor,
    counts: Tensor,
    width: int,
    mask: Tensor | None,
    first: Tensor | None,
    eccentric: bool,
    total: bool,
    eps: float,
    backend: str,
) -> Tensor:
    batch, n, _ = x.shape
    if not batch * width:
        return counts.new_empty(batch, width)
    if first is not None:
        first = _check_first(first, counts, mask, n)
    stored = 4 * batch * n * n <= _GRAM_BYTES
    if backend == "triton":
        from . import triton_max_min

        if first is None and (eccentric or not stored):
            tokens = directions("x", x, mask, eps)
            first = most_eccentric(tokens, mask) if eccentric else most_isolated(tokens, mask)
        return triton_max_min.max_min_select(x, counts, width, mask, first, total, eps, stored)
    tokens = directions("x", x, mask, eps)
    counts = counts if mask is None else torch.minimum(counts, mask.sum(1))
    if first is None and eccentric:
        first = most_eccentric(tokens, mask)
    return max_min_reference(tokens, counts, width, mask, first, total, stored)


@_max_min_select.register_fake
def _(
    x: Tensor,
    counts: Tensor,
    width: int,
    mask: Tensor | None,
    first: Tensor | None,
    eccentric: bool,
    total: bool,
    eps: float,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape[0], width, dtype=torch.int64)


def _check_first(first: Tensor, counts: Tensor, mask: Tensor | None, n: int) -> Tensor:
    inside = first.clamp(0, n - 1)
    if first.device.type == "cpu":
        good = first == inside if mask is None else (first == inside) & mask.gather(1, inside[:, None])[:, 0]
        if not (good | (counts == 0)).all():
            raise ValueError(f"first must name a valid token of every row with k > 0, got {first.tolist()}")
    return inside


def most_eccentric(x: Directions, mask: Tensor | None) -> Tensor:
    """Per item, the valid row least similar to the mean of the unit rows: int64 `[B]`."""
    mean = torch.bmm(x.inverse[:, None], x.rows)
    similarity = torch.bmm(x.rows, mean.mT)[..., 0].mul_(x.inverse)
    return (similarity if mask is None else similarity.masked_fill_(~mask, torch.inf)).argmin(1)


def most_isolated(x: Directions, mask: Tensor | None, block: int = 1024) -> Tensor:
    """Per item, the valid row whose nearest valid neighbour is farthest: int64 `[B]`, `block` rows at a time."""
    parts = []
    for i in range(0, x.rows.shape[1], block):
        some = Directions(x.rows[:, i : i + block], x.inverse[:, i : i + block])
        parts.append(nearest_(cosine_reference(some, x), i, mask))
    return torch.cat(parts, 1).argmin(1)


def nearest_(similarity: Tensor, start: int, mask: Tensor | None) -> Tensor:
    """Similarity of rows `start..start + R` to their nearest valid neighbour, +inf for an invalid row.

    Overwrites the entries of `similarity` `[B, R, N]` that are no neighbours with -inf. Given all the rows it looks
    both ways, so that mutual nearest neighbours tie even where a product is symmetric only up to rounding.
    """
    rows, n = similarity.shape[1:]
    similarity.diagonal(start, 1, 2).fill_(-torch.inf)
    if mask is not None:
        valid = mask[:, start : start + rows]
        similarity.masked_fill_(~(valid[..., None] & mask[:, None]), -torch.inf)
    nearest = similarity.amax(2)
    if rows == n:
        nearest = torch.maximum(nearest, similarity.amax(1))
    return nearest if mask is None else nearest.masked_fill_(~valid, torch.inf)


def max_min_reference(
    x: Directions, counts: Tensor, width: int, mask: Tensor | None, first: Tensor | None, total: bool, stored: bool
) -> Tensor:
    """The selection, any device, without a host synchronisation.

    `closeness` is the similarity to the nearest picked row (or the sum over picked rows); +inf bars a row, as does the
    +inf that a picked row has to itself. On the CPU this is also the fast path: its cost is that of `gram`.
    """
    batch, n = x.inverse.shape
    items = torch.arange(batch, device=x.inverse.device)
    if stored:
        similarity = gram(x)
        table, offset = similarity.view(batch * n, n), items * n
        if first is None:
            first = nearest_(similarity, 0, mask).argmin(1)
        similarity.diagonal(0, 1, 2).fill_(torch.inf)
    elif first is None:
        first = most_isolated(x, mask)
    current = first
    closeness = x.inverse.new_full(x.inverse.shape, 0.0 if total else -torch.inf)
    if mask is not None:
        closeness.masked_fill_(~mask, torch.inf)
    chosen = []
    for _ in range(width):
        chosen.append(current)
        if stored:
            row = table.index_select(0, current + offset if batch > 1 else current)
        else:
            pivot = Directions(x.rows[items, current, None], x.inverse[items, current, None])
            row = cosine_reference(pivot, x)[:, 0].scatter_(1, current[:, None], torch.inf)
        if not total:
            torch.maximum(closeness, row, out=closeness)
        elif mask is None:
            closeness += row
        else:
            closeness += row.masked_fill_(~mask, 0.0)
        current = closeness.argmin(1)
    step = torch.arange(width, device=x.inverse.device)
    return torch.stack(chosen, 1).masked_fill_(step >= counts[:, None], -1)
