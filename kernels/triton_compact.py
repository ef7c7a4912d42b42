"""Triton kernel of `compact`: one launch for all tensors, one program for one kept column of one row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compact import planes

_WORD = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 1024


@triton.jit(do_not_specialize=["width"])
def _compact_kernel(keep, sources, outs, sizes, strides, fills, width, BLOCK: tl.constexpr):
    """outs[i][p, b, t] = sources[i][p, b, keep[b, t]]; dtypes are plain words of the right width."""
    t = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    batch = tl.num_programs(1).to(tl.int64)
    column = tl.load(keep + b * width + t)
    for i in tl.static_range(len(sources)):
        stride_p, stride_b, stride_s, stride_i = strides[i]
        count, inner = sizes[i]
        present = tl.where(column >= 0, inner, 0)
        source = sources[i] + b * stride_b + column * stride_s
        out = outs[i] + (b * width + t) * inner
        for _ in range(0, count):
            for start in range(0, inner, BLOCK):
                at = start + tl.arange(0, BLOCK).to(tl.int64)
                value = tl.load(source + at * stride_i, mask=at < present, other=0)
                tl.store(out + at, tl.where(at < present, value, fills[i]), mask=at < inner)
            source += stride_p
            out += batch * width * inner


def compact(keep: Tensor, tensors: list[Tensor], dims: list[int], fill: list[float]) -> list[Tensor]:
    width = keep.shape[1]
    results = [
        torch.empty(*t.shape[:d], width, *t.shape[d + 1 :], dtype=t.dtype, device=t.device)
        for t, d in zip(tensors, dims, strict=True)
    ]
    words = [planes(t, d).view(_WORD[t.element_size()]) for t, d in zip(tensors, dims, strict=True)]
    bits = [
        int(torch.tensor(v, dtype=torch.float64, device="cpu").to(t.dtype).view(_WORD[t.element_size()]))
        for t, v in zip(tensors, fill, strict=True)
    ]
    _compact_kernel[(width, keep.shape[0])](
        keep.contiguous(),
        tuple(words),
        tuple(r.view(_WORD[r.element_size()]) for r in results),
        tuple((w.shape[0], w.shape[3]) for w in words),
        tuple(w.stride() for w in words),
        tuple(bits),
        width,
        BLOCK=min(_BLOCK, triton.next_power_of_2(max(w.shape[3] for w in words))),
    )
    return results
