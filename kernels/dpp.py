"""Greedy MAP inference of a determinantal point process: keep the tokens that span the largest volume."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import Count, check_mask, check_tokens, operation, resolve_backend, row_counts


def dpp_select(
    similarity: Tensor,
    k: Count,
    *,
    quality: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-6,
    max_k: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Greedily pick `k` rows per item that maximise log det of diag(q) S diag(q) restricted to them.

    Each step takes the row with the largest Schur complement and updates an incremental Cholesky factor (Chen et al.,
    arXiv 1709.05135, Algorithm 1; CDPruner, arXiv 2506.10967, sections 3.2-3.3). Once the largest complement is no
    more than `eps` times the largest diagonal entry, the chosen rows span the item: the remaining picks go to the
    rows of highest quality not yet taken. Everything is in fp32; ties go to the lowest index.

    Args:
        similarity: `[B, N, N]` floating, symmetric positive semi-definite (`pairwise_cosine` of the features).
        k: picks per item: an int, one int per row, or an integer tensor `[B]`. A row with fewer valid tokens than its
            `k` yields all of them.
        quality: `[B, N]` floating, >= 0, or None for 1 everywhere.
        mask: `[B, N]` bool, True where a row is a token.
        eps: the share of the largest diagonal entry under which a Schur complement counts as zero.
        max_k: the largest value in a tensor `k`, known on the host; without it a CUDA `k` costs a synchronisation.
        backend: "auto" (Triton on a GPU, torch elsewhere), "torch" or "triton".

    Returns:
        int64 `[B, K]` in the order of selection, K = min(largest k, N); rows with fewer picks are padded by -1.

    Raises:
        ValueError: on wrong shapes or counts, and on NaN or inf among the valid entries of CPU tensors. On a GPU
            values are not inspected; NaN there counts as 0.
        RuntimeError: `backend="triton"` on a CPU tensor outside Triton's interpreter.
    """
    check_tokens("similarity", similarity)
    batch, n, columns = similarity.shape
    if n != columns:
        raise ValueError(f"similarity must be square, got {list(similarity.shape)}")
    check_mask(mask, (batch, n), similarity.device)
    if quality is not None and (
        not quality.is_floating_point() or quality.shape != (batch, n) or quality.device != similarity.device
    ):
        raise ValueError(f"quality must be a floating tensor [{batch}, {n}], got {quality.dtype} {list(quality.shape)}")
    counts, width = row_counts(k, max_k, similarity)
    return _dpp_select(similarity, quality, counts, width, mask, eps, resolve_backend(backend, similarity))


def dpp_flops(n: int, k: int) -> int:
    """Products of `dpp_select` for one item, 2 FLOPs a multiply-add: each pick against the factor's rows so far."""
    return n * k * (k - 1)


@operation(
    "dpp_select",
    schema=(
        "(Tensor similarity, Tensor? quality, Tensor counts, int width, Tensor? mask, float eps, str backend) -> Tensor"
    ),
)
def _dpp_select(
    similarity: Tensor,
    quality: Tensor | None,
    counts: Tensor,
    width: int,
    mask: Tensor | None,
    eps: float,
    backend: str,
) -> Tensor:
    if not similarity.shape[0] * width:
        return counts.new_empty(similarity.shape[0], width)
    diagonal = similarity.diagonal(dim1=1, dim2=2).float()
    if quality is not None:
        quality = quality.float() if mask is None else quality.float().masked_fill(~mask, 0.0)
        diagonal = quality.square() * diagonal
    if mask is not None:
        diagonal = diagonal.masked_fill(~mask, 0.0)
        counts = torch.minimum(counts, mask.sum(1))
    if similarity.device.type == "cpu":
        _check_finite(similarity, quality, mask)
    diagonal = diagonal.nan_to_num(0.0).clamp_min_(0.0)
    floor = eps * diagonal.amax(1)
    if mask is not None:
        diagonal.masked_fill_(~mask, -torch.inf)
    if backend == "triton":
        from .triton_dpp import dpp_select as select
    else:
        select = dpp_reference
    picks = select(similarity, quality, diagonal, floor, counts, width)
    return _fill(picks, counts, torch.ones_like(diagonal) if quality is None else quality, mask)


@_dpp_select.register_fake
def _(
    similarity: Tensor,
    quality: Tensor | None,
    counts: Tensor,
    width: int,
    mask: Tensor | None,
    eps: float,
    backend: str,
) -> Tensor:
    return similarity.new_empty(similarity.shape[0], width, dtype=torch.int64)


def _check_finite(similarity: Tensor, quality: Tensor | None, mask: Tensor | None) -> None:
    pairs = similarity if mask is None else similarity.masked_fill(~(mask[:, None] & mask[..., None]), 0.0)
    if not torch.isfinite(pairs.sum()) or (quality is not None and not torch.isfinite(quality.sum())):
        raise ValueError("similarity or quality holds NaN or inf in a valid row")


def _fill(picks: Tensor, counts: Tensor, quality: Tensor, valid: Tensor | None) -> Tensor:
    """Give the picks that a spanned item left open (-1) to the best rows not yet taken."""
    batch, n = quality.shape
    taken = torch.zeros(batch, n + 1, dtype=torch.bool, device=picks.device)
    taken = taken.scatter_(1, torch.where(picks < 0, n, picks), True)[:, :n]
    if valid is not None:
        taken = taken | ~valid
    best = quality.masked_fill(taken, -torch.inf).argsort(dim=1, descending=True, stable=True)
    done = (picks >= 0).sum(1, keepdim=True)
    step = torch.arange(picks.shape[1], device=picks.device)
    rest = best.gather(1, (step - done).clamp(0, n - 1))
    return torch.where((step >= done) & (step < counts[:, None]), rest, picks)


def dpp_reference(
    similarity: Tensor, quality: Tensor | None, diagonal: Tensor, floor: Tensor, counts: Tensor, width: int
) -> Tensor:
    """The greedy loop, any device, without a host synchronisation; -1 from where the picks span the item.

    `gain` holds the Schur complements, -inf for rows that are picked or no tokens, and `factor` the rows of the
    Cholesky factor found so far. A step reads all of these, which is the whole cost, so this is also the CPU path.
    """
    batch, n = diagonal.shape
    items = torch.arange(batch, device=diagonal.device)
    gain, factor = diagonal.clone(), diagonal.new_empty(batch, width, n)
    chosen, gains = [], []
    for t in range(width):
        best, current = gain.max(1)
        chosen.append(current)
        gains.append(best)
        row = similarity[items, current].float()
        if quality is not None:
            row *= quality * quality[items, current, None]
        if t:
            row -= torch.bmm(factor[items, None, :t, current], factor[:, :t])[:, 0]
        row.mul_(best.clamp_min(1e-30).rsqrt_()[:, None]).nan_to_num_(0.0)
        factor[:, t] = row
        gain.addcmul_(row, row, value=-1.0).scatter_(1, current[:, None], -torch.inf)
    step = torch.arange(width, device=diagonal.device)
    alive = (torch.stack(gains, 1) > floor[:, None]) & (step < counts[:, None])
    return torch.where(alive.cumprod(1).bool(), torch.stack(chosen, 1), -1)
