"""Softmax attention reduced to what a pruner reads, in memory linear in the sequence length."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ._common import check_mask, operation, resolve_backend

_CHUNK = 1 << 23


def attention_scores(
    q: Tensor,
    k: Tensor,
    *,
    reduce: Literal["sum", "rows"] = "sum",
    per_head: bool = False,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = False,
    query_index: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention weights softmax(q k^T * scale) over the keys, as column sums over query rows or as the rows themselves.

    Serves FastV (arXiv 2403.06764: the row of the last token), VisionZip and ToDRE (the row of CLS), VisionDrop (arXiv
    2506.22283: column means over image queries, causal, over the whole context) and their kin, whatever attention
    implementation the model runs. Statistics are in fp32; the S x S map never exists.

    Args:
        q: `[B, H, Q, D]` queries, rotated where the model rotates them. Pass only the rows you need.
        k: `[B, G, S, D]` keys, G dividing H; query head h reads key head h // (H / G).
        reduce: "sum" adds the counted query rows up, "rows" returns them one by one.
        per_head: keep the heads apart instead of averaging them.
        mask: `[B, S]` bool, True where a key is a token; other keys take no part in the softmax and score 0.
        query_mask: `[B, Q]` bool, True where a query row counts; other rows score 0.
        causal: a query sees only keys up to its own place in the sequence.
        query_index: `[B, Q]` integer places of the query rows among the keys, for `causal`; by default the queries are
            the last Q tokens.
        scale: the factor on the logits, by default D ** -0.5.
        backend: "auto" (Triton on a GPU, torch elsewhere), "torch" or "triton".

    Returns:
        fp32 `[B, S]` for "sum" and `[B, Q, S]` for "rows"; with `per_head`, `[B, H, S]` and `[B, H, Q, S]`. A counted
        row sums to 1 over the keys, or to 0 if it sees none.

    Raises:
        ValueError: on wrong shapes, and on NaN or inf in what the softmax reads from CPU tensors. On a GPU values
            are not inspected.
        RuntimeError: `backend="triton"` on a CPU tensor outside Triton's interpreter.
    """
    if q.dim() != 4 or k.dim() != 4 or not q.is_floating_point() or q.dtype != k.dtype or q.device != k.device:
        raise ValueError(
            f"q and k must be floating [B, H, Q, D] and [B, G, S, D] of one dtype and device, "
            f"got {q.dtype} {list(q.shape)} and {k.dtype} {list(k.shape)}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} must share B and D, and k's heads divide q's")
    if reduce not in ("sum", "rows"):
        raise ValueError(f"unknown reduce {reduce!r}; choose 'sum' or 'rows'")
    check_mask(mask, (k.shape[0], k.shape[2]), k.device)
    check_mask(query_mask, (q.shape[0], q.shape[2]), q.device)
    if query_index is not None and not causal:
        raise ValueError("query_index needs causal=True")
    if query_index is not None and (query_index.shape != (q.shape[0], q.shape[2]) or query_index.is_floating_point()):
        raise ValueError(f"query_index must be an integer tensor {[q.shape[0], q.shape[2]]}")
    if causal and query_index is None:
        query_index = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device).expand(q.shape[0], -1)
    if query_index is not None:
        query_index = query_index.to(q.device, torch.int64, non_blocking=True)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return _attention_scores(
        q, k, mask, query_mask, query_index, scale, reduce == "rows", per_head, resolve_backend(backend, q)
    )


@operation(
    "attention_scores",
    schema=(
        "(Tensor q, Tensor k, Tensor? mask, Tensor? query_mask, Tensor? query_index, float scale, bool rows, "
        "bool per_head, str backend) -> Tensor"
    ),
)
def _attention_scores(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    query_mask: Tensor | None,
    query_index: Tensor | None,
    scale: float,
    rows: bool,
    per_head: bool,
    backend: str,
) -> Tensor:
    if not q.numel() or not k.numel():
        return q.new_zeros(_shape(q, k, rows, per_head), dtype=torch.float32)
    if backend == "triton":
        from . import triton_attention

        return triton_attention.attention_scores(q, k, mask, query_mask, query_index, scale, rows, per_head)
    out = attention_reference(q, k, mask, query_mask, query_index, scale, rows, per_head)
    if out.device.type == "cpu" and not torch.isfinite(out).all():
        raise ValueError("q or k holds NaN or inf in a row that counts")
    return out


@_attention_scores.register_fake
def _(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    query_mask: Tensor | None,
    query_index: Tensor | None,
    scale: float,
    rows: bool,
    per_head: bool,
    backend: str,
) -> Tensor:
    return q.new_empty(_shape(q, k, rows, per_head), dtype=torch.float32)


def _shape(q: Tensor, k: Tensor, rows: bool, per_head: bool) -> list[int]:
    return [q.shape[0], *([q.shape[1]] if per_head else []), *([q.shape[2]] if rows else []), k.shape[2]]


def attention_reference(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    query_mask: Tensor | None,
    query_index: Tensor | None,
    scale: float,
    rows: bool,
    per_head: bool,
) -> Tensor:
    """Any device: a few query rows at a time, so that the logits in memory stay below a constant or one row."""
    batch, heads, queries, _ = q.shape
    groups, keys = k.shape[1:3]
    out = q.new_zeros(_shape(q, k, rows, per_head), dtype=torch.float32)
    columns = k.float().mT
    place = torch.arange(keys, device=k.device)
    step = max(1, _CHUNK // (batch * heads * keys))
    for i in range(0, queries, step):
        part = slice(i, min(i + step, queries))
        size = part.stop - part.start
        query = (q[:, :, part].float() * scale).reshape(batch, groups, heads // groups * size, -1)
        logits = torch.matmul(query, columns).view(batch, heads, size, keys)
        if mask is not None:
            logits.masked_fill_(~mask[:, None, None], -torch.inf)
        if query_index is not None:
            logits.masked_fill_(place > query_index[:, None, part, None], -torch.inf)
        weights = torch.softmax(logits, -1)
        if mask is not None or query_index is not None:  # a row that sees nothing is NaN now
            weights.masked_fill_((logits == -torch.inf).all(-1, keepdim=True), 0.0)
        if query_mask is not None:
            weights.masked_fill_(~query_mask[:, None, part, None], 0.0)
        if not per_head:
            weights = weights.mean(1)
        if rows:
            out[..., part, :] = weights
        else:
            out += weights.sum(-2)
    return out
