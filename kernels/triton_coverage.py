"""Triton kernel of `coverage_select`: the whole lazy greedy loop in one launch, several programs to an item."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import barrier, cooperative_grid, pack, unpack_index


@triton.jit(do_not_specialize=["n", "rows", "width"])
def _coverage_kernel(
    columns, mask, counts, picks, slots, arrived, n, rows, width,
    PROGRAMS: tl.constexpr, HAS_MASK: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program p of an item owns the columns p, p + PROGRAMS, ... and keeps what is covered so far in registers.

    Its candidates' stale gains are upper bounds. A step evaluates them best first while a bound beats the best gain
    known to any program, publishes by an atomic maximum on the step's slot, and waits for the others.
    """
    p = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    columns += b * n * rows
    lane = tl.arange(0, OWN).to(tl.int64) * PROGRAMS + p
    mine = lane < n
    if HAS_MASK:
        mine &= tl.load(mask + b * n + lane, mask=mine, other=0) != 0
    keys = tl.where(mine, pack(tl.full((OWN,), float("inf"), tl.float32), lane), -1)
    row = tl.arange(0, BLOCK).to(tl.int64)
    live = row < rows
    covered = tl.zeros((BLOCK,), tl.float32)
    for t in range(0, tl.load(counts + b)):
        slot = slots + b * width + t
        stale = keys
        top = tl.max(stale, axis=0)
        best = tl.full((), -1, tl.int64)
        while top > best:
            candidate = unpack_index(top)
            value = tl.maximum(tl.load(columns + candidate * rows + row, mask=live, other=0.0), covered)
            gain = tl.sum((value - covered).to(tl.float64), axis=0).to(tl.float32)
            fresh = pack(gain, candidate)
            keys = tl.where(lane == candidate, fresh, keys)
            stale = tl.where(lane == candidate, -1, stale)
            best = tl.maximum(tl.maximum(best, fresh), tl.atomic_max(slot, fresh))
            top = tl.max(stale, axis=0)
        if PROGRAMS > 1:
            barrier(arrived + b, (t + 1) * PROGRAMS)
        winner = unpack_index(tl.atomic_max(slot, -1))
        if p == 0:
            tl.store(picks + b * width + t, winner)
        keys = tl.where(lane == winner, -1, keys)
        covered = tl.maximum(tl.load(columns + winner * rows + row, mask=live, other=0.0), covered)


def coverage_select(columns: Tensor, counts: Tensor, picks: Tensor, mask: Tensor | None) -> Tensor:
    """Fill `picks` from fp32 `[B, N, R]` columns; `counts` must not exceed the valid columns of an item."""
    batch, n, rows = columns.shape
    width = picks.shape[1]
    valid = None if mask is None else mask.contiguous().view(torch.uint8)
    slots = torch.full((batch, width), -1, dtype=torch.int64, device=columns.device)
    arrived = torch.zeros(batch, dtype=torch.int32, device=columns.device)
    programs, options = cooperative_grid(columns.device, batch, n)
    block = max(16, triton.next_power_of_2(rows))
    _coverage_kernel[(programs, batch)](
        columns, valid, counts.contiguous(), picks, slots, arrived, n, rows, width,
        PROGRAMS=programs, HAS_MASK=valid is not None, OWN=max(16, triton.next_power_of_2(triton.cdiv(n, programs))),
        BLOCK=block, num_warps=min(32, max(4, block // 512)), **options,
    )  # fmt: skip
    return picks
