"""Triton kernel of `merge_tokens`: each slot adds up its own members, so no atomics and one fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["n", "d", "slots"])
def _slot_sums_kernel(
    x, weight, members, starts, out, size, n, d, slots, stride_xb, stride_xn, stride_xd, BLOCK: tl.constexpr
):
    """out[b, s] and size[b, s] from members[b, starts[b, s] : starts[b, s + 1]], ascending."""
    s = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    column = tl.program_id(2).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = column < d
    total = tl.zeros((BLOCK,), tl.float32)
    heavy = tl.full((), 0.0, tl.float32)
    starts += b * (slots + 1) + s
    for at in range(tl.load(starts), tl.load(starts + 1)):
        token = tl.load(members + b * n + at)
        w = tl.load(weight + b * n + token)
        row = tl.load(x + b * stride_xb + token * stride_xn + column * stride_xd, mask=live, other=0.0)
        total += w * row.to(tl.float32)
        heavy += w
    tl.store(out + (b * slots + s) * d + column, total, mask=live)
    if tl.program_id(2) == 0:
        tl.store(size + b * slots + s, heavy)


def slot_sums(x: Tensor, weight: Tensor, into: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    batch, n, d = x.shape
    slot, members = into.sort(dim=1, stable=True)
    starts = torch.searchsorted(slot, torch.arange(slots + 1, device=x.device).expand(batch, -1).contiguous())
    out = torch.empty(batch, slots, d, dtype=torch.float32, device=x.device)
    size = torch.empty(batch, slots, dtype=torch.float32, device=x.device)
    block = min(1024, triton.next_power_of_2(d))
    _slot_sums_kernel[(slots, batch, triton.cdiv(d, block))](
        x, weight.contiguous(), members, starts, out, size, n, d, slots, *x.stride(), BLOCK=block
    )
    return out, size
