"""Token merging: who merges into whom (bipartite matching, nearest target), and the merge itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ._common import Count, check_mask, check_tokens, operation, resolve_backend, row_counts
from .cosine import pairwise_cosine

Reduce = Literal["mean", "sum", "target_plus_mean"]
SlotSums = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
_REDUCE = ("mean", "sum", "target_plus_mean")


class Matching(NamedTuple):
    """Pairs of tokens, best first: int64 `[B, R]` each, padded by -1, and their fp32 similarity, padded by -inf."""

    source: Tensor
    destination: Tensor
    score: Tensor


class MergePlan(NamedTuple):
    """Survivors `keep` `[B, K]`, ascending and padded by -1, and for every token its slot in them, `into` `[B, N]`."""

    keep: Tensor
    into: Tensor


def bipartite_match(
    metric: Tensor,
    r: Count,
    *,
    order: Tensor | None = None,
    protected: Tensor | None = None,
    mask: Tensor | None = None,
    max_r: int | None = None,
    backend: str = "auto",
) -> Matching:
    """Soft bipartite matching: every other token proposes to its most similar counterpart; the best `r` pairs merge.

    ToMe, arXiv 2210.09461, section 3 (tokens in sequence order); PiToMe, arXiv 2405.16148, with the mergeable tokens
    in `order` of descending energy. Even places of the order propose, odd places accept, several at a time if need be.
    Equal scores go to the lower place.

    Args:
        metric: `[B, N, C]` floating: what similarity is measured on (mean keys, for instance).
        r: pairs per item: an int, one int per row, or an integer tensor `[B]`; at most the proposals there are.
        order: `[B, M]` int64 token indices, padded by -1 at the end; by default the valid tokens, ascending.
        protected: `[B, N]` bool, True for tokens that neither merge nor are merged into (CLS); they keep their place.
        mask: `[B, N]` bool, True where a row is a token; not together with `order`.
        max_r: the largest value in a tensor `r`, known on the host; without it a CUDA `r` costs a synchronisation.
        backend: "auto" (Triton on a GPU, torch elsewhere), "torch" or "triton".

    Raises:
        ValueError: on wrong shapes or counts, and on NaN or inf in a valid row of a CPU tensor.
    """
    check_tokens("metric", metric, mask)
    batch, n, _ = metric.shape
    check_mask(protected, (batch, n), metric.device)
    if order is None:
        order = torch.arange(n, device=metric.device).expand(batch, n)
        if mask is not None:
            first_valid = (~mask).long().argsort(dim=1, stable=True)
            order = torch.where(order < mask.sum(1, keepdim=True), first_valid, -1)
    elif mask is not None:
        raise ValueError("give either order or mask")
    proposing, accepting = order[:, 0::2], order[:, 1::2]
    counts, width = row_counts(r, max_r, proposing)
    if not accepting.shape[1]:
        width = 0
    if not width:
        empty = order.new_empty(batch, 0)
        return Matching(empty, empty, metric.new_empty(batch, 0, dtype=torch.float32))
    free_a, free_b = proposing >= 0, accepting >= 0
    if protected is not None:
        free_a = free_a & ~protected.gather(1, proposing.clamp_min(0))
        free_b = free_b & ~protected.gather(1, accepting.clamp_min(0))
    similarity = pairwise_cosine(
        _rows(metric, proposing), _rows(metric, accepting), mask=free_a, y_mask=free_b, backend=backend
    ).masked_fill_(~(free_a[..., None] & free_b[:, None]), -torch.inf)
    partner = similarity.argmax(2)
    score = similarity.gather(2, partner[..., None])[..., 0]
    rank = score.argsort(dim=1, descending=True, stable=True)[:, :width]
    score = score.gather(1, rank)
    paired = (torch.arange(width, device=metric.device) < counts[:, None]) & (score > -torch.inf)
    return Matching(
        torch.where(paired, proposing.gather(1, rank), -1),
        torch.where(paired, accepting.gather(1, partner.gather(1, rank)), -1),
        score.masked_fill_(~paired, -torch.inf),
    )


def bipartite_flops(n: int, width: int) -> int:
    """Products of `bipartite_match` for one item of `n` rows in its order, 2 FLOPs a multiply-add."""
    return 2 * (n // 2) * (n - n // 2) * width


def merge_plan(matching: Matching, n: int, width: int, *, mask: Tensor | None = None) -> MergePlan:
    """Who survives a matching over `n` tokens, in sequence order, and where everyone goes.

    `width` is the number of survivors to make room for (N - R where every item merges R pairs); `mask` `[B, N]` says
    which rows are tokens.
    """
    source, destination, _ = matching
    batch = source.shape[0]
    place = torch.arange(n, device=source.device).expand(batch, n)
    pad = place.new_full((batch, 1), n)
    target = torch.cat([place, pad], 1)
    target = target.scatter(1, torch.where(source < 0, n, source), torch.where(source < 0, n, destination))[:, :n]
    alive = target == place if mask is None else (target == place) & mask
    slot = torch.where(alive, alive.cumsum(1) - 1, -1)
    keep = (~alive).long().argsort(dim=1, stable=True)[:, :width]
    keep = torch.where(place[:, : keep.shape[1]] < alive.sum(1, keepdim=True), keep, -1)
    return MergePlan(keep, slot.gather(1, target))


def nearest_target(
    metric: Tensor, keep: Tensor, *, mask: Tensor | None = None, candidates: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """For every token the slot in `keep` of its most similar target: int64 `[B, N]`, -1 for rows that are no tokens.

    VisionZip (arXiv 2412.04467) and VisionDrop (arXiv 2506.22283) assign the tokens they drop to contextual ones so.

    Args:
        metric: `[B, N, C]` floating.
        keep: `[B, K]` int64 target tokens, padded by -1. A target is assigned to itself.
        mask: `[B, N]` bool, True where a row is a token.
        candidates: `[B, K]` bool, True for targets others may join; by default all of them.
        backend: "auto" (Triton on a GPU, torch elsewhere), "torch" or "triton".
    """
    check_tokens("metric", metric, mask)
    batch, n, _ = metric.shape
    if not keep.shape[1]:
        return keep.new_full((batch, n), -1)
    open_slots = keep >= 0 if candidates is None else (keep >= 0) & candidates
    similarity = pairwise_cosine(metric, _rows(metric, keep), mask=mask, y_mask=open_slots, backend=backend)
    into = similarity.masked_fill_(~open_slots[:, None], -torch.inf).argmax(2)
    into = torch.where(open_slots.any(1, keepdim=True), into, -1)
    return _own_slot(into if mask is None else torch.where(mask, into, -1), keep)


def merge_tokens(
    x: Tensor,
    keep: Tensor,
    into: Tensor,
    *,
    weight: Tensor | None = None,
    reduce: Reduce = "mean",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Merge every token into the survivor of its slot, in fp32, in a fixed order.

    "mean" is the weighted mean over the members of a slot, the survivor among them (ToMe's size-weighted average);
    "sum" their weighted sum; "target_plus_mean" the survivor plus the weighted mean of the others (VisionZip).

    Args:
        x: `[B, N, D]` floating.
        keep: `[B, K]` int64 survivors, each at most once, padded by -1.
        into: `[B, N]` int64 slots in `keep`, -1 for tokens that leave without a trace. A survivor's own entry is not
            read: it is a member of its slot.
        weight: `[B, N]` floating, >= 0: what each token stands for, or None for 1.
        reduce: "mean", "sum" or "target_plus_mean".
        backend: "auto" (Triton on a GPU, torch elsewhere), "torch" or "triton".

    Returns:
        The merged tokens `[B, K, D]` in the dtype of `x`, and the total weight of each slot, fp32 `[B, K]`; zeros
        where `keep` is -1. Gradients pass to `x`.

    Raises:
        ValueError: on wrong shapes, and on indices out of range in CPU tensors.
        RuntimeError: `backend="triton"` on a CPU tensor outside Triton's interpreter.
    """
    check_tokens("x", x)
    if reduce not in _REDUCE:
        raise ValueError(f"unknown reduce {reduce!r}; choose one of {_REDUCE}")
    batch, n, _ = x.shape
    if keep.dim() != 2 or keep.shape[0] != batch or keep.dtype != torch.int64:
        raise ValueError(f"keep must be int64 [{batch}, K], got {keep.dtype} {list(keep.shape)}")
    if into.shape != (batch, n) or into.dtype != torch.int64:
        raise ValueError(f"into must be int64 [{batch}, {n}], got {into.dtype} {list(into.shape)}")
    if weight is not None and (weight.shape != (batch, n) or not weight.is_floating_point()):
        raise ValueError(f"weight must be floating [{batch}, {n}], got {weight.dtype} {list(weight.shape)}")
    return _merge_tokens(x, keep, into, weight, reduce, resolve_backend(backend, x))


@operation(
    "merge_tokens",
    schema="(Tensor x, Tensor keep, Tensor into, Tensor? weight, str reduce, str backend) -> (Tensor, Tensor)",
)
def _merge_tokens(
    x: Tensor, keep: Tensor, into: Tensor, weight: Tensor | None, reduce: str, backend: str
) -> tuple[Tensor, Tensor]:
    batch, n, d = x.shape
    slots = keep.shape[1]
    if x.device.type == "cpu" and (_outside(keep, n) or _outside(into, slots)):
        raise ValueError(f"keep must lie in [-1, {n}) and into in [-1, {slots})")
    if not batch * n * slots:
        return x.new_zeros(batch, slots, d), x.new_zeros(batch, slots, dtype=torch.float32)
    into = _own_slot(into, keep)
    slot_sums: SlotSums = _slot_sums_cpu if x.device.type == "cpu" else slot_sums_reference
    if backend == "triton":
        from .triton_merge import slot_sums
    return _combine(x, keep, into, weight, reduce, slot_sums)


@_merge_tokens.register_fake
def _(x: Tensor, keep: Tensor, into: Tensor, weight: Tensor | None, reduce: str, backend: str) -> tuple[Tensor, Tensor]:
    out = x.new_empty(x.shape[0], keep.shape[1], x.shape[2])
    return out, x.new_empty(out.shape[:2], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, keep, into, weight, ctx.reduce, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(keep, into, x.new_ones(x.shape[:2]) if weight is None else weight, output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    """A token receives what its slot receives, times its share in it."""
    if ctx.needs_input_grad[3]:
        raise RuntimeError("merge_tokens passes gradients to x only: detach weight")
    keep, into, weight, size = ctx.saved_tensors
    into, weight = _own_slot(into, keep), weight.float()
    if ctx.reduce == "target_plus_mean":
        size = size - weight.gather(1, keep.clamp_min(0))
    scale = torch.ones_like(size) if ctx.reduce == "sum" else torch.where(size > 0, 1 / size, 0.0)
    share = (weight * scale.gather(1, into.clamp_min(0))).masked_fill(into < 0, 0.0)
    if ctx.reduce == "target_plus_mean":
        padded = torch.cat([share, share.new_empty(share.shape[0], 1)], 1)
        share = padded.scatter_(1, torch.where(keep < 0, into.shape[1], keep), 1.0)[:, :-1]
    return (_rows(grad.float(), into) * share[..., None]).to(ctx.dtype), None, None, None, None, None


_merge_tokens.register_autograd(_backward, setup_context=_save)


def _outside(index: Tensor, n: int) -> bool:
    return bool(((index < -1) | (index >= n)).any())


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.clamp_min(0)[..., None].expand(-1, -1, x.shape[2]))


def _own_slot(into: Tensor, keep: Tensor) -> Tensor:
    """`into` with every survivor in its own slot."""
    n = into.shape[1]
    slots = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    padded = torch.cat([into, into.new_empty(into.shape[0], 1)], 1)
    return padded.scatter_(1, torch.where(keep < 0, n, keep), slots)[:, :n]


def slot_sums_reference(x: Tensor, weight: Tensor, into: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Weighted sums `[B, K, D]` and total weights `[B, K]` over the members of each slot, as one product."""
    member = (into[:, None] == torch.arange(slots, device=x.device)[:, None]).float() * weight[:, None]
    present = torch.where(into[..., None] < 0, 0.0, x.float())
    return torch.bmm(member, present), member.sum(2)


def _slot_sums_cpu(x: Tensor, weight: Tensor, into: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The same by scattered addition, which is sequential and so deterministic on the CPU."""
    batch, n, d = x.shape
    flat = torch.where(into < 0, batch * slots, into + slots * torch.arange(batch, device="cpu")[:, None]).view(-1)
    sums = x.new_zeros(batch * slots + 1, d, dtype=torch.float32)
    totals = x.new_zeros(batch * slots + 1, dtype=torch.float32)
    sums.index_add_(0, flat, (x.float() * weight[..., None]).reshape(batch * n, d))
    totals.index_add_(0, flat, weight.reshape(-1))
    return sums[:-1].view(batch, slots, d), totals[:-1].view(batch, slots)


def _combine(
    x: Tensor, keep: Tensor, into: Tensor, weight: Tensor | None, reduce: str, slot_sums: SlotSums
) -> tuple[Tensor, Tensor]:
    weight = x.new_ones(x.shape[:2], dtype=torch.float32) if weight is None else weight.float()
    gone = keep < 0
    if reduce != "target_plus_mean":
        out, size = slot_sums(x, weight, into, keep.shape[1])
        if reduce == "mean":
            out = torch.where(size[..., None] > 0, out / size[..., None], 0.0)
    else:
        own = weight.gather(1, keep.clamp_min(0))
        others = torch.cat([weight, weight.new_empty(weight.shape[0], 1)], 1)
        others = others.scatter_(1, torch.where(gone, x.shape[1], keep), 0.0)[:, :-1]
        out, size = slot_sums(x, others, into, keep.shape[1])
        out = _rows(x, keep).float() + torch.where(size[..., None] > 0, out / size[..., None], 0.0)
        size = size + own
    return out.masked_fill(gone[..., None], 0.0).to(x.dtype), size.masked_fill(gone, 0.0)
