"""Triton kernel of `dpp_select`: the whole greedy loop in one launch, several programs to an item."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import barrier, cooperative_grid, pack, unpack_index, unpack_value


@triton.jit(do_not_specialize=["n", "width"])
def _dpp_kernel(
    similarity, quality, diagonal, floor, counts, picks, factor, slots, arrived, n, width,
    stride_b, stride_i, stride_j,
    HAS_QUALITY: tl.constexpr, PROGRAMS: tl.constexpr, OWN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Program p of an item owns the columns p * OWN to (p + 1) * OWN, with their Schur complements in registers.

    A step publishes the best of them by an atomic maximum on the step's slot, waits for the others, and appends the
    winner's row of the Cholesky factor, of which each program writes its own columns.
    """
    p = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    column = p * OWN + tl.arange(0, OWN).to(tl.int64)
    mine = column < n
    gain = tl.load(diagonal + b * n + column, mask=mine, other=float("-inf"))
    least = tl.load(floor + b)
    factor += b * width * n
    t = tl.full((), 0, tl.int64)
    end = tl.load(counts + b)
    while t < end:
        slot = slots + b * width + t
        tl.atomic_max(slot, tl.max(tl.where(gain < 0.0, -1, pack(gain, column)), axis=0))
        if PROGRAMS > 1:
            barrier(arrived + b, (t + 1) * PROGRAMS)
        key = tl.atomic_max(slot, -1)
        best = unpack_value(key)
        if best > least:  # no candidate unpacks to NaN
            winner = unpack_index(key)
            if p == 0:
                tl.store(picks + b * width + t, winner)
            entry = similarity + b * stride_b + winner * stride_i + column * stride_j
            row = tl.load(entry, mask=mine, other=0.0).to(tl.float32)
            if HAS_QUALITY:
                own = tl.load(quality + b * n + column, mask=mine, other=0.0)
                row *= own * tl.load(quality + b * n + winner)
            for start in range(0, t, STEPS):
                step = start + tl.arange(0, STEPS).to(tl.int64)
                known = step < t
                at_winner = tl.load(factor + step * n + winner, mask=known, other=0.0, cache_modifier=".cg")
                here = tl.load(
                    factor + step[:, None] * n + column[None, :], mask=known[:, None] & mine[None, :], other=0.0
                )
                row -= tl.sum(at_winner[:, None] * here, axis=0)
            row = tl.where(row == row, row, 0.0) / tl.sqrt(best)
            tl.store(factor + t * n + column, row, mask=mine)
            gain = tl.where(column == winner, float("-inf"), gain - row * row)
            t += 1
        else:
            end = t  # the picks span the item


def dpp_select(
    similarity: Tensor, quality: Tensor | None, diagonal: Tensor, floor: Tensor, counts: Tensor, width: int
) -> Tensor:
    """The picks, -1 from where they span the item. `diagonal` is -inf for rows that are no tokens."""
    batch, n, _ = similarity.shape
    picks, slots = (torch.full((batch, width), -1, dtype=torch.int64, device=similarity.device) for _ in range(2))
    factor = torch.empty(batch, width, n, dtype=torch.float32, device=similarity.device)
    arrived = torch.zeros(batch, dtype=torch.int32, device=similarity.device)
    programs, _ = cooperative_grid(similarity.device, batch, triton.cdiv(n, 32))
    own = max(32, triton.next_power_of_2(triton.cdiv(n, programs)))
    programs, options = cooperative_grid(similarity.device, batch, triton.cdiv(n, own))
    _dpp_kernel[(programs, batch)](
        similarity, None if quality is None else quality.contiguous(), diagonal.contiguous(), floor,
        counts.contiguous(), picks, factor, slots, arrived, n, width, *similarity.stride(),
        HAS_QUALITY=quality is not None, PROGRAMS=programs, OWN=own, STEPS=max(1, 4096 // own),
        num_warps=4 if own <= 1024 else 8, **options,
    )  # fmt: skip
    return picks
