"""Triton kernels of `pairwise_cosine`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import bf16_needs_upcast


@triton.jit(do_not_specialize=["n", "d"])
def _inverse_norm_kernel(
    x, mask, out, n, d, eps, stride_xb, stride_xn, stride_xd,
    HAS_MASK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out[b, i] = 1 / max(|x[b, i]|, eps), and 0 for a masked or non-finite row."""
    b = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < n
    acc = tl.zeros((ROWS,), tl.float32)
    for start in range(0, d, COLS):
        cols = start + tl.arange(0, COLS).to(tl.int64)
        at = x + b * stride_xb + rows[:, None] * stride_xn + cols[None, :] * stride_xd
        v = tl.load(at, mask=live[:, None] & (cols < d)[None, :], other=0.0).to(tl.float32)
        acc += tl.sum(v * v, axis=1)
    inverse = 1.0 / tl.maximum(tl.sqrt(acc), eps)
    good = acc < float("inf")  # false for NaN too
    if HAS_MASK:
        good &= tl.load(mask + b * n + rows, mask=live, other=0) != 0
    tl.store(out + b * n + rows, tl.where(good, inverse, 0.0), mask=live)


@triton.jit(do_not_specialize=["n", "m", "d"])
def _cosine_kernel(
    x, y, x_inverse, y_inverse, out, n, m, d,
    stride_xb, stride_xn, stride_xd, stride_yb, stride_yn, stride_yd,
    SYMMETRIC: tl.constexpr, UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of out[b] = (x y^T) / (|x| |y|); in the symmetric case only tiles on and right of the diagonal work."""
    tile_m = tl.program_id(0).to(tl.int64)
    tile_n = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    if SYMMETRIC and tile_m > tile_n:
        return
    rows = tile_m * BM + tl.arange(0, BM)
    cols = tile_n * BN + tl.arange(0, BN)
    row_live = rows < n
    col_live = cols < m
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, d, BK):
        depth = start + tl.arange(0, BK).to(tl.int64)
        deep = depth < d
        left = tl.load(
            x + b * stride_xb + rows[:, None] * stride_xn + depth[None, :] * stride_xd,
            mask=row_live[:, None] & deep[None, :],
            other=0.0,
        )
        right = tl.load(
            y + b * stride_yb + cols[None, :] * stride_yn + depth[:, None] * stride_yd,
            mask=col_live[None, :] & deep[:, None],
            other=0.0,
        )
        if UPCAST:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    row_scale = tl.load(x_inverse + b * n + rows, mask=row_live, other=0.0)
    col_scale = tl.load(y_inverse + b * m + cols, mask=col_live, other=0.0)
    good = (row_scale > 0.0)[:, None] & (col_scale > 0.0)[None, :]
    acc = tl.where(good, acc * row_scale[:, None] * col_scale[None, :], 0.0)  # a plain product would keep 0 * NaN
    live = row_live[:, None] & col_live[None, :]
    base = out + b * n * m
    if SYMMETRIC:
        if tile_m == tile_n:
            upper = live & (rows[:, None] <= cols[None, :])
            tl.store(base + rows[:, None] * m + cols[None, :], acc, mask=upper)
            tl.store(base + cols[None, :] * m + rows[:, None], acc, mask=upper)
        else:
            tl.store(base + rows[:, None] * m + cols[None, :], acc, mask=live)
            tl.store(base + cols[None, :] * m + rows[:, None], acc, mask=live)
    else:
        tl.store(base + rows[:, None] * m + cols[None, :], acc, mask=live)


def inverse_norms(x: Tensor, mask: Tensor | None, eps: float) -> Tensor:
    """fp32 `[B, N]` of 1 / max(|row|, eps); 0 for masked and for non-finite rows."""
    batch, n, d = x.shape
    out = torch.empty(batch, n, dtype=torch.float32, device=x.device)
    if out.numel():
        mask = None if mask is None else mask.contiguous().view(torch.uint8)
        rows, cols = 8, 512
        _inverse_norm_kernel[(triton.cdiv(n, rows), batch)](
            x, mask, out, n, d, eps, *x.stride(), HAS_MASK=mask is not None, ROWS=rows, COLS=cols
        )
    return out


def pairwise_cosine(x: Tensor, y: Tensor | None, mask: Tensor | None, y_mask: Tensor | None, eps: float) -> Tensor:
    symmetric = y is None
    x_inverse = inverse_norms(x, mask, eps)
    y_inverse = x_inverse if y is None else inverse_norms(y, y_mask, eps)
    y = x if y is None else y
    batch, n, d = x.shape
    m = y.shape[1]
    out = torch.empty(batch, n, m, dtype=torch.float32, device=x.device)
    if out.numel():
        bm, bn, bk = (64, 64, 32) if x.dtype == torch.float32 else (128, 128, 64)
        _cosine_kernel[(triton.cdiv(n, bm), triton.cdiv(m, bn), batch)](
            x, y, x_inverse, y_inverse, out, n, m, d, *x.stride(), *y.stride(),
            SYMMETRIC=symmetric, UPCAST=bf16_needs_upcast(x), BM=bm, BN=bn, BK=bk,
        )  # fmt: skip
    return out
