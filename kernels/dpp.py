"""Greedy MAP inference of a determinantal point process: keep the tokens that span the largest volume."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import Count, check_mask, check_tokens, resolve_backend, row_counts


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


@torch.library.custom_op(
    "vlmprune::dpp_select",
    mutates_args=(),
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
    batch = similarity.shape[0]
    picks = torch.full((batch, width), -1, dtype=torch.int64, device=similarity.device)
    if not picks.numel():
        return picks
    diagonal = similarity.diagonal(dim1=1, dim2=2).float()
    weight = torch.ones_like(diagonal) if quality is None else quality.float()
    if mask is not None:
        weight = weight.masked_fill(~mask, 0.0)
        diagonal = diagonal.masked_fill(~mask, 0.0)
        counts = torch.minimum(counts, mask.sum(1))
    diagonal = weight * weight * diagonal
    if similarity.device.type == "cpu":
        _check_finite(similarity, weight, mask)
    diagonal = diagonal.nan_to_num(0.0).clamp_min_(0.0)
    floor = eps * diagonal.amax(1)
    if mask is not None:
        diagonal = diagonal.masked_fill(~mask, -1.0)
    if backend == "triton":
        from . import triton_dpp

        triton_dpp.dpp_select(similarity, weight, diagonal, floor, counts, picks)
    elif similarity.device.type == "cpu":
        _select_cpu(similarity, weight, diagonal, floor, counts, picks)
    else:
        dpp_reference(similarity, weight, diagonal, floor, counts, picks)
    return _fill(picks, weight, counts, mask)


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


def _check_finite(similarity: Tensor, weight: Tensor, mask: Tensor | None) -> None:
    pairs = similarity if mask is None else similarity.masked_fill(~(mask[:, None] & mask[..., None]), 0.0)
    if not torch.isfinite(pairs).all() or not torch.isfinite(weight).all():
        raise ValueError("similarity or quality holds NaN or inf in a valid row")


def _fill(picks: Tensor, weight: Tensor, counts: Tensor, mask: Tensor | None) -> Tensor:
    """Give the picks that a spanned item left open (-1) to the best rows not yet taken."""
    batch, n = weight.shape
    taken = torch.zeros(batch, n + 1, dtype=torch.bool, device=picks.device)
    taken.scatter_(1, torch.where(picks < 0, n, picks), True)
    out = taken[:, :n] if mask is None else taken[:, :n] | ~mask
    best = weight.masked_fill(out, -torch.inf).argsort(dim=1, descending=True, stable=True)
    done = (picks >= 0).sum(1, keepdim=True)
    step = torch.arange(picks.shape[1], device=picks.device)
    refill = best.gather(1, (step - done).clamp(0, n - 1))
    return torch.where((step >= done) & (step < counts[:, None]), refill, picks)


def dpp_reference(
    similarity: Tensor, weight: Tensor, diagonal: Tensor, floor: Tensor, counts: Tensor, picks: Tensor
) -> None:
    """The greedy loop, any device, without a host synchronisation; leaves -1 in `picks` once an item is spanned.

    `gain` holds the Schur complements, `factor` the rows of the Cholesky factor found so far.
    """
    items = torch.arange(similarity.shape[0], device=similarity.device)
    gain, factor = diagonal.clone(), similarity.new_zeros(*picks.shape, similarity.shape[1], dtype=torch.float32)
    alive = torch.ones_like(counts, dtype=torch.bool)
    for t in range(picks.shape[1]):
        best, current = gain.max(1)
        alive = alive & (best > floor) & (t < counts)
        picks[:, t] = torch.where(alive, current, -1)
        row = similarity[items, current].float() * weight * weight[items, current, None]
        known = torch.einsum("bt,btn->bn", factor[items, :t, current], factor[:, :t])
        factor[:, t] = (row - known).nan_to_num(0.0) / best.clamp_min(1e-30).sqrt()[:, None]
        gain = torch.where(gain < 0, gain, (gain - factor[:, t].square()).clamp_min(0.0))
        gain[items, current] = -1.0


def _select_cpu(
    similarity: Tensor, weight: Tensor, diagonal: Tensor, floor: Tensor, counts: Tensor, picks: Tensor
) -> None:
    """The same, item by item and in place."""
    factor = similarity.new_empty(picks.shape[1], similarity.shape[1], dtype=torch.float32)
    for item, out in enumerate(picks):
        gain, w, table, least = diagonal[item].clone(), weight[item], similarity[item], float(floor[item])
        barred = gain < 0
        for t in range(int(counts[item])):
            current = int(gain.argmax())
            best = float(gain[current])
            if best <= least:
                break
            out[t] = current
            row = torch.mul(table[current], w * w[current], out=factor[t])
            if t:
                row.addmv_(factor[:t].T, factor[:t, current].contiguous(), alpha=-1.0)
            row /= best**0.5
            gain.addcmul_(row, row, value=-1.0).clamp_min_(0.0)
            barred[current] = True
            gain.masked_fill_(barred, -1.0)
