"""Triton kernels of `attention_scores`: the log-sum-exp of every query row, then column sums or rows from it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import bf16_needs_upcast


@triton.jit
def _logits(
    q, k, mask, rows, cols, depth, index, queries, keys, d, scale, stride_qn, stride_qd, stride_kn, stride_kd,
    HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of logits, -inf where a query may not look. Pointers are those of one item and head."""
    deep = depth < d
    left = tl.load(
        q + rows[:, None] * stride_qn + depth[None, :] * stride_qd,
        mask=(rows < queries)[:, None] & deep[None, :],
        other=0.0,
    )
    right = tl.load(
        k + cols[None, :] * stride_kn + depth[:, None] * stride_kd,
        mask=(cols < keys)[None, :] & deep[:, None],
        other=0.0,
    )
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    logits = tl.dot(left, right, input_precision="ieee") * scale
    visible = cols < keys
    if HAS_MASK:
        visible &= tl.load(mask + cols, mask=visible, other=0) != 0
    seen = (rows < queries)[:, None] & visible[None, :]
    if CAUSAL:
        seen &= cols[None, :] <= index[:, None]
    return tl.where(seen, logits, float("-inf"))


@triton.jit(do_not_specialize=["heads", "share", "queries", "keys", "d"])
def _lse_kernel(
    q, k, mask, query_index, lse, heads, share, queries, keys, d, scale,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """lse[b, h, i] = log sum_j exp(logit_ij) over the keys that row i sees."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    depth = tl.arange(0, BD).to(tl.int64)
    q += b * stride_qb + h * stride_qh
    k += b * stride_kb + (h // share) * stride_kh
    index = tl.zeros((BM,), tl.int64)
    end = keys.to(tl.int64)
    if CAUSAL:
        index = tl.load(query_index + b * queries + rows, mask=rows < queries, other=-1)
        end = tl.minimum(end, tl.max(index, axis=0) + 1)
    high = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for start in range(0, end, BN):
        cols = start + tl.arange(0, BN).to(tl.int64)
        logits = _logits(
            q, k, mask + b * keys if HAS_MASK else mask, rows, cols, depth, index, queries, keys, d, scale,
            stride_qn, stride_qd, stride_kn, stride_kd, HAS_MASK, CAUSAL, UPCAST,
        )  # fmt: skip
        new = tl.maximum(high, tl.max(logits, axis=1))
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(high - base) + tl.sum(tl.exp(logits - base[:, None]), axis=1)
        high = new
    tl.store(lse + (b * heads + h) * queries + rows, high + tl.log(tl.maximum(total, 1e-30)), mask=rows < queries)


@triton.jit(do_not_specialize=["heads", "share", "queries", "keys", "d"])
def _sum_kernel(
    q, k, mask, query_mask, query_index, lse, out, heads, share, queries, keys, d, scale,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    HAS_MASK: tl.constexpr, HAS_QUERY_MASK: tl.constexpr, CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out[b, h, j] = sum over counted rows i of exp(logit_ij - lse_i), in a fixed order."""
    cols = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    depth = tl.arange(0, BD).to(tl.int64)
    q += b * stride_qb + h * stride_qh
    k += b * stride_kb + (h // share) * stride_kh
    total = tl.zeros((BN,), tl.float32)
    for start in range(0, queries, BM):
        rows = start + tl.arange(0, BM).to(tl.int64)
        index = tl.zeros((BM,), tl.int64)
        if CAUSAL:
            index = tl.load(query_index + b * queries + rows, mask=rows < queries, other=-1)
        if not CAUSAL or tl.max(index, axis=0) >= tl.program_id(0) * BN:
            logits = _logits(
                q, k, mask + b * keys if HAS_MASK else mask, rows, cols, depth, index, queries, keys, d, scale,
                stride_qn, stride_qd, stride_kn, stride_kd, HAS_MASK, CAUSAL, UPCAST,
            )  # fmt: skip
            base = tl.load(lse + (b * heads + h) * queries + rows, mask=rows < queries, other=0.0)
            weights = tl.exp(logits - tl.where(base > float("-inf"), base, 0.0)[:, None])
            if HAS_QUERY_MASK:
                counted = tl.load(query_mask + b * queries + rows, mask=rows < queries, other=0) != 0
                weights = tl.where(counted[:, None], weights, 0.0)
            total += tl.sum(weights, axis=0)
    tl.store(out + (b * heads + h) * keys + cols, total, mask=cols < keys)


@triton.jit(do_not_specialize=["heads", "share", "queries", "keys", "d", "out_heads", "span"])
def _rows_kernel(
    q, k, mask, query_mask, query_index, lse, out, heads, share, queries, keys, d, scale, out_heads, span,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    HAS_MASK: tl.constexpr, HAS_QUERY_MASK: tl.constexpr, CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out[b, o, i, j] = mean over the `span` heads of output head o of exp(logit_ij - lse_i)."""
    cols = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    rows = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    o = (tl.program_id(2) % out_heads).to(tl.int64)
    b = (tl.program_id(2) // out_heads).to(tl.int64)
    depth = tl.arange(0, BD).to(tl.int64)
    live = rows < queries
    index = tl.zeros((BM,), tl.int64)
    if CAUSAL:
        index = tl.load(query_index + b * queries + rows, mask=live, other=-1)
    total = tl.zeros((BM, BN), tl.float32)
    for h in range(o * span, (o + 1) * span):
        logits = _logits(
            q + b * stride_qb + h * stride_qh, k + b * stride_kb + (h // share) * stride_kh,
            mask + b * keys if HAS_MASK else mask, rows, cols, depth, index, queries, keys, d, scale,
            stride_qn, stride_qd, stride_kn, stride_kd, HAS_MASK, CAUSAL, UPCAST,
        )  # fmt: skip
        base = tl.load(lse + (b * heads + h) * queries + rows, mask=live, other=0.0)
        total += tl.exp(logits - tl.where(base > float("-inf"), base, 0.0)[:, None])
    if HAS_QUERY_MASK:
        counted = tl.load(query_mask + b * queries + rows, mask=live, other=0) != 0
        total = tl.where(counted[:, None], total, 0.0)
    at = out + ((b * out_heads + o) * queries + rows[:, None]) * keys + cols[None, :]
    tl.store(at, total / span, mask=live[:, None] & (cols < keys)[None, :])


def attention_scores(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    query_mask: Tensor | None,
    query_index: Tensor | None,
    scale: float,
    rows: bool,
    per_head: bool,
) -> Tensor:
    batch, heads, queries, d = q.shape
    groups, keys = k.shape[1:3]
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    query_mask = None if query_mask is None else query_mask.contiguous().view(torch.uint8)
    query_index = None if query_index is None else query_index.contiguous()
    bd = max(16, triton.next_power_of_2(d))
    bn = 32 if bd > 128 or q.dtype == torch.float32 else 64
    bm = 16 if queries <= 16 else bn
    tile = {"BM": bm, "BN": bn, "BD": bd, "CAUSAL": query_index is not None, "UPCAST": bf16_needs_upcast(q)}
    seen = {"HAS_MASK": mask is not None, **tile}
    counted = {"HAS_QUERY_MASK": query_mask is not None, **seen}
    sizes = (heads, heads // groups, queries, keys, d, scale)
    strides = (*q.stride(), *k.stride())
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    _lse_kernel[(triton.cdiv(queries, bm), heads, batch)](q, k, mask, query_index, lse, *sizes, *strides, **seen)
    inputs = (q, k, mask, query_mask, query_index, lse)
    if rows:
        out_heads = heads if per_head else 1
        out = torch.empty(batch, out_heads, queries, keys, dtype=torch.float32, device=q.device)
        _rows_kernel[(triton.cdiv(keys, bn), triton.cdiv(queries, bm), batch * out_heads)](
            *inputs, out, *sizes, out_heads, heads // out_heads, *strides, **counted
        )
        return out if per_head else out[:, 0]
    out = torch.empty(batch, heads, keys, dtype=torch.float32, device=q.device)
    _sum_kernel[(triton.cdiv(keys, bn), heads, batch)](*inputs, out, *sizes, *strides, **counted)
    return out if per_head else out.mean(1)
