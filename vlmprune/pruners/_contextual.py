"""Dominant and contextual tokens: what VisionZip and VisionDrop share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from vlmprune.contract import Selection, Sizes, VisualTokens
from vlmprune.kernels import merge_tokens, nearest_target
from vlmprune.pruners._pictures import Pictures
from vlmprune.pruners._top import top_indices

Query: TypeAlias = Literal["auto", "cls", "all"]
"""Whose attention ranks the patches: the CLS token's, that of all patches, or the first that the tower has."""

Merge: TypeAlias = Literal["sum", "average"]
"""A contextual token is its target plus the mean of those that join it, or the mean of them all."""

_SCORES = {"auto": "cls_attention|received_attention", "cls": "cls_attention", "all": "received_attention"}


def check_choices(query: str, merge: str) -> None:
    """Raise ValueError, with one sentence, on an unknown choice."""
    if query not in _SCORES:
        raise ValueError(f"query must be one of {', '.join(map(repr, _SCORES))}, got {query!r}")
    if merge not in ("sum", "average"):
        raise ValueError(f'merge must be "sum" or "average", got {merge!r}')


def encoder_needs(query: str, keep_cls: bool) -> frozenset[str]:
    """Signals that `encoder_stage` asks for."""
    needs = {_SCORES[query], "projector_inputs", "encoder_keys"}
    return frozenset(needs | {"cls_features?"} if keep_cls else needs)


def contextual_count(kept: int, contextual: int) -> int:
    """Contextual among `kept` tokens: `contextual`, but at least one beside a dominant one."""
    return min(max(contextual, 1), kept - 1) if kept else 0


def choose(
    scores: Tensor, keys: Tensor, mask: Tensor, sizes: Tensor, dominant: Tensor, contextual: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Dominant tokens, targets, and who joins which target.

    VisionZip (arXiv 2412.04467) and VisionDrop (arXiv 2506.22283): the dominant tokens have the largest scores. Of the
    L others, in order, those at 0, s, 2 s, ... with s = max(1, L // contextual) are targets; each that is neither joins
    the target whose key is most similar (cosine). Equal scores and similarities go to the lower index.

    Args:
        scores: fp32 [B, N].
        keys: [B, N, d].
        mask: bool [B, N], which rows are tokens.
        sizes: int64 [B], on the CPU: how many these are.
        dominant, contextual: int64 [B], on the CPU; the latter is cut to the others there are.

    Returns:
        int64 [B, Kd] dominant tokens by descending score, padded by -1; int64 [B, Kc] targets, ascending, padded by -1;
        int64 [B, N] places in the targets, -1 for dominant tokens and padding.
    """
    n, device = mask.shape[1], mask.device
    top = top_indices(scores.masked_fill(~mask, -torch.inf), dominant)
    taken = torch.zeros(len(mask), n + 1, dtype=torch.bool, device=device)
    rest = mask & ~taken.scatter_(1, torch.where(top < 0, n, top), True)[:, :n]
    others = sizes - dominant
    contextual = torch.minimum(contextual, others)
    step = (others // contextual.clamp(min=1)).clamp(min=1)
    slot = torch.arange(int(contextual.max()), device="cpu")
    place = torch.where(slot < contextual[:, None], slot * step[:, None], -1).to(device, non_blocking=True)
    order = (~rest).long().argsort(dim=1, stable=True)
    targets = order.gather(1, place.clamp(min=0)).masked_fill(place < 0, -1)
    return top, targets, nearest_target(keys, targets, mask=rest)


def join(x: Tensor, targets: Tensor, into: Tensor, merge: Merge) -> Tensor:
    """Contextual tokens [B, Kc, D] of the rows `x` [B, N, D], in the dtype of `x`; zero where `targets` is -1."""
    return merge_tokens(x, targets, into, reduce="target_plus_mean" if merge == "sum" else "mean")[0]


def encoder_stage(
    tokens: VisualTokens,
    budget: Tensor,
    contextual: Callable[[int], int],
    *,
    query: Query,
    merge: Merge,
    keep_cls: bool,
) -> Selection:
    """Reduce what the vision tower gives to `budget` rows, as if before the projector.

    Every picture on its own (`Pictures`); one that keeps all its tokens is left as it is. A picture's CLS row, where
    the tower has one that the projector takes, is one of the dominant tokens, and stands at the lowest index that its
    picture does not otherwise keep.

    Args:
        contextual: how many of so many kept tokens are contextual.
    """
    pictures = Pictures(tokens, budget)
    whole = pictures.budget == pictures.sizes
    cls = tokens.signal("cls_features?") if keep_cls else None
    inputs = tokens.signal("projector_inputs")
    extra = (~whole & (pictures.budget > 0) & (cls is not None)).long()
    late = torch.tensor([contextual(kept) for kept in pictures.budget.tolist()], device="cpu").masked_fill(whole, 0)
    dominant = pictures.budget - late - extra
    top, targets, into = choose(
        pictures.rows(tokens.signal(_SCORES[query])),
        pictures.rows(tokens.signal("encoder_keys")),
        pictures.placed,
        pictures.sizes,
        dominant,
        late,
    )
    new = join(pictures.rows(inputs), targets, into, merge)
    index = torch.cat([top, targets], dim=1)
    used = [_first(dominant, top.shape[1]), _first(late, targets.shape[1])]
    if cls is not None:
        index = torch.cat([index, _lowest_free(index, pictures.inside)], dim=1)
        used.append(extra[:, None].bool())
        new = torch.cat([new, pictures.each(cls)[:, None].to(new.dtype)], dim=1)
    plain = tokens.features
    if not new.shape[1]:
        return Selection(pictures.collect(index, torch.cat(used, dim=1))[0])
    made = (torch.arange(index.shape[1], device=index.device) >= top.shape[1]).expand_as(index)
    rows = tokens.project(new).to(plain.dtype)
    rows = torch.cat([rows.new_zeros(len(rows), top.shape[1], rows.shape[-1]), rows], dim=1)
    index, (rows, made) = pictures.collect(index, torch.cat(used, dim=1), rows, made)
    return Selection(index, torch.where(made[..., None], rows, _take(plain, index)), made)


def encoder_stage_flops(sizes: Sizes, contextual: Callable[[int], int]) -> int:
    """Products of `encoder_stage`: keys against targets, and the projection of what is new."""
    pictures, cls = len(sizes.grids), "cls_features" in sizes.signals
    late = contextual(-(-sizes.keep // pictures))
    alike = 2 * max(sizes.parts) * late * sizes.encoder_key
    return pictures * (alike + (late + cls) * sizes.projection)


def decoder_stage(
    tokens: VisualTokens, scores: Tensor, keys: Tensor, budget: Tensor, contextual: Callable[[int], int], merge: Merge
) -> Selection:
    """Reduce the hidden states of every item to `budget` rows; scores fp32 [I, N], keys [I, N, d]."""
    late = torch.tensor([contextual(kept) for kept in budget.tolist()], device="cpu")
    top, targets, into = choose(
        scores, keys, tokens.valid, torch.tensor(tokens.counts, device="cpu"), budget - late, late
    )
    x = tokens.features
    index = torch.cat([top, targets], dim=1)
    rows = torch.cat([_take(x, top), join(x, targets, into, merge)], dim=1)
    made = (torch.arange(index.shape[1], device=index.device) >= top.shape[1]).expand_as(index)
    # Padding goes to the end; budgets are counts, so the host knows how many are real.
    order = (index < 0).long().argsort(dim=1, stable=True)[:, : int(budget.max())]
    return Selection(index.gather(1, order), _take(rows, order), made.gather(1, order))


def _take(x: Tensor, index: Tensor) -> Tensor:
    """[B, K, D]: rows of `x` [B, N, D] at int64 [B, K], row 0 for -1."""
    return x.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))


def _first(count: Tensor, width: int) -> Tensor:
    """bool [B, width]: the first `count` [B] of each row."""
    return torch.arange(width, device="cpu") < count[:, None]


def _lowest_free(index: Tensor, inside: Tensor) -> Tensor:
    """int64 [B, 1]: of each row of `inside` [B, N], the first True that is not in `index` [B, K]."""
    free = torch.cat([inside, inside.new_ones(len(inside), 1)], dim=1)
    free = free.scatter(1, torch.where(index < 0, inside.shape[1], index), False)
    return free[:, :-1].long().argmax(dim=1, keepdim=True)
