"""Triton kernels of `max_min_select`: one launch for the whole greedy loop, one program per item."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import pack, unpack_index
from .triton_cosine import inverse_norms, pairwise_cosine


@triton.jit(do_not_specialize=["n"])
def _nearest_kernel(similarity, mask, out, n, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """out[b, i] = largest similarity of valid row i to another valid row; +inf for an invalid row."""
    row = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, n, BLOCK):
        cols = start + tl.arange(0, BLOCK).to(tl.int64)
        live = (cols < n) & (cols != row)
        if HAS_MASK:
            live &= tl.load(mask + b * n + cols, mask=live, other=0) != 0
        best = tl.maximum(best, tl.load(similarity + (b * n + row) * n + cols, mask=live, other=float("-inf")))
    nearest = tl.max(best, axis=0)
    if HAS_MASK:
        nearest = tl.where(tl.load(mask + b * n + row) != 0, nearest, float("inf"))
    tl.store(out + b * n + row, nearest)


@triton.jit(do_not_specialize=["n", "width"])
def _greedy_kernel(
    similarity, mask, first, counts, picks, n, width, HAS_MASK: tl.constexpr, TOTAL: tl.constexpr, BLOCK: tl.constexpr
):
    """The loop of one item. `closeness` stays in registers; a step reads one row of the similarities."""
    b = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK).to(tl.int64)
    valid = index < n
    if HAS_MASK:
        valid &= tl.load(mask + b * n + index, mask=valid, other=0) != 0
    count = tl.minimum(tl.load(counts + b), tl.sum(valid.to(tl.int64), axis=0))
    closeness = tl.where(valid, 0.0 if TOTAL else float("-inf"), float("inf"))
    current = tl.load(first + b)
    for t in range(0, count):
        tl.store(picks + b * width + t, current)
        row = tl.load(similarity + (b * n + current) * n + index, mask=valid, other=0.0)
        closeness = closeness + row if TOTAL else tl.maximum(closeness, row)
        closeness = tl.where(index == current, float("inf"), closeness)
        current = unpack_index(tl.max(pack(-closeness, index), axis=0))


@triton.jit(do_not_specialize=["n", "d", "width", "t"])
def _step_kernel(
    x, inverse, closeness, counts, picks, slots, n, d, width, t, stride_xb, stride_xn, stride_xd,
    TOTAL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Step t without stored similarities: a block of rows against the current pick, the winner by an atomic maximum."""
    b = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < n
    current = unpack_index(tl.load(slots + b * (width + 1) + t))
    if t < tl.load(counts + b):
        acc = tl.zeros((ROWS,), tl.float32)
        for start in range(0, d, COLS):
            cols = start + tl.arange(0, COLS).to(tl.int64)
            deep = cols < d
            pivot = tl.load(x + b * stride_xb + current * stride_xn + cols * stride_xd, mask=deep, other=0.0)
            tile = tl.load(
                x + b * stride_xb + rows[:, None] * stride_xn + cols[None, :] * stride_xd,
                mask=live[:, None] & deep[None, :],
                other=0.0,
            )
            acc += tl.sum(tile.to(tl.float32) * pivot.to(tl.float32)[None, :], axis=1)
        scale = tl.load(inverse + b * n + rows, mask=live, other=0.0)
        pivot_scale = tl.load(inverse + b * n + current)
        row = tl.where(tl.minimum(scale, pivot_scale) > 0.0, acc * scale * pivot_scale, 0.0)
        old = tl.load(closeness + b * n + rows, mask=live, other=float("inf"))
        new = old + row if TOTAL else tl.maximum(old, row)
        new = tl.where(rows == current, float("inf"), new)
        tl.store(closeness + b * n + rows, new, mask=live)
        packed = tl.where(live, pack(-new, rows), -0x7FFFFFFFFFFFFFFF)
        tl.atomic_max(slots + b * (width + 1) + t + 1, tl.max(packed, axis=0))
        if tl.program_id(0) == 0:
            tl.store(picks + b * width + t, current)


def max_min_select(
    x: Tensor,
    counts: Tensor,
    width: int,
    mask: Tensor | None,
    first: Tensor | None,
    total: bool,
    eps: float,
    stored: bool,
) -> Tensor:
    """The picks. `stored` keeps the `[B, N, N]` similarities in memory; without it `first` must be given."""
    picks = torch.full((len(x), width), -1, dtype=torch.int64, device=x.device)
    if not stored:
        assert first is not None
        return _select_on_the_fly(x, counts, picks, mask, first, total, eps)
    batch, n, _ = x.shape
    valid = None if mask is None else mask.contiguous().view(torch.uint8)
    similarity = pairwise_cosine(x, None, mask, None, eps)
    block = triton.next_power_of_2(n)
    if first is None:
        nearest = torch.empty(batch, n, dtype=torch.float32, device=x.device)
        _nearest_kernel[(n, batch)](similarity, valid, nearest, n, HAS_MASK=valid is not None, BLOCK=min(1024, block))
        first = nearest.argmin(1)
    _greedy_kernel[(batch,)](
        similarity, valid, first, counts.contiguous(), picks, n, width,
        HAS_MASK=valid is not None, TOTAL=total, BLOCK=block, num_warps=min(32, max(4, block // 256)),
    )  # fmt: skip
    return picks


def _select_on_the_fly(
    x: Tensor, counts: Tensor, picks: Tensor, mask: Tensor | None, first: Tensor, total: bool, eps: float
) -> Tensor:
    batch, n, d = x.shape
    width = picks.shape[1]
    inverse = inverse_norms(x, mask, eps)
    closeness = torch.full((batch, n), 0.0 if total else -torch.inf, dtype=torch.float32, device=x.device)
    if mask is not None:
        closeness.masked_fill_(~mask, torch.inf)
        counts = torch.minimum(counts, mask.sum(1))
    slots = torch.full((batch, width + 1), torch.iinfo(torch.int64).min, dtype=torch.int64, device=x.device)
    slots[:, 0] = 0xFFFFFFFF - first
    rows, cols = 16, 256
    for t in range(width):
        _step_kernel[(triton.cdiv(n, rows), batch)](
            x, inverse, closeness, counts, picks, slots, n, d, width, t, *x.stride(), TOTAL=total, ROWS=rows, COLS=cols
        )
    return picks
