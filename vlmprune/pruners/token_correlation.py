from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmprune.contract import Keep, Pruner, Selection, Sizes, VisualTokens, budget
from vlmprune.kernels import pairwise_cosine
from vlmprune.pruners._pictures import Pictures
from vlmprune.pruners._places import overview
from vlmprune.registry import register_pruner

Sampling = Literal["top", "multinomial"]
_ATTENTION = "cls_attention|received_attention"


@register_pruner
@dataclass(kw_only=True)
class TokenCorrelation(Pruner):
    """Keep as many tokens of each tile as its patches differ: few of an empty one, many of one full of text.

    Experimental. After Zhang et al., "Token-level Correlation-guided Compression for Efficient Multimodal Document
    Understanding", arXiv 2407.14439, which names neither thresholds nor layers and has no published code: alpha, beta,
    the outlier factor and the limits are choices of this package. Training-free, blind to the question.

    Of each picture: a token is redundant if more than `alpha` similar to at least a share `beta` of the others; as many
    tokens as are not redundant stay, those with the most CLS attention ("local" tokens, `density_budget`), and with
    them all whose attention is an outlier ("global" tokens, `iqr_outliers`). Encoders without CLS: the attention
    received. An image's thumbnail, where it has tiles, stays whole.

    The paper takes correlations and local attention from a shallow layer of the encoder. Those are no signals here:
    both come from the layer that makes the features, which is also the one of the global tokens, and its keys are
    means over heads.

    Args:
        keep: no more than this stays of an item, shared out by the pictures' sizes; how much less, the picture says.
            Where it binds, outliers stay first.
        min_keep: no fewer stay of a picture (a blank page is all redundant).
        sampling: local tokens are those with the most attention, or drawn by it ("multinomial", as the paper's figure
            suggests; by `seed` and the picture's size alone, so that a picture keeps the same in any batch).
    """

    keep: Keep = 0.9
    alpha: float = 0.9
    beta: float = 0.05
    factor: float = 1.5
    min_keep: int = 8
    sampling: Sampling = "top"
    seed: int = 0

    name: ClassVar[str] = "token-correlation"
    paper: ClassVar[str] = "arXiv 2407.14439"
    needs: ClassVar[frozenset[str]] = frozenset({"encoder_keys", _ATTENTION})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise ValueError(f"token-correlation needs beta between 0 and 1, got {self.beta!r}")
        if self.min_keep < 0:
            raise ValueError(f"token-correlation needs min_keep >= 0, got {self.min_keep!r}")
        if self.sampling not in get_args(Sampling):
            raise ValueError(f'token-correlation\'s sampling is "top" or "multinomial", got {self.sampling!r}')

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 1) -> Sequence[int | None]:
        limits = [budget(count, self.keep) for count in counts]
        return [None if 0 < limit < count else limit for limit, count in zip(limits, counts)]

    def selection_flops(self, sizes: Sizes) -> int:
        return sum(2 * tokens**2 * sizes.encoder_key for tokens in sizes.parts)

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        limits = torch.tensor([self._limit(count) for count in tokens.counts], device="cpu")
        pictures = Pictures(tokens, limits)
        device = tokens.features.device
        whole = pad_sequence([overview(shape) for shape in tokens.geometry], batch_first=True).to(device)
        tiled = torch.tensor(
            [len(shape.pictures) > 1 and shape.kind == "image" for shape in tokens.shapes], device="cpu"
        ).to(device)
        wanted = correlation_select(
            pictures.rows(tokens.signal("encoder_keys")),
            pictures.rows(tokens.signal(_ATTENTION)),
            pictures.placed,
            limit=pictures.budget.to(device),
            spared=pictures.rows(whole & tiled[:, None]),
            alpha=self.alpha,
            beta=self.beta,
            factor=self.factor,
            min_keep=self.min_keep,
            seed=self.seed if self.sampling == "multinomial" else None,
        )
        kept = pictures.back(wanted, tokens.valid.shape[1])
        index = torch.arange(kept.shape[1], device=device).expand_as(kept).masked_fill(~kept, -1)
        return Selection(index.sort(dim=1, descending=True).values)

    def _limit(self, count: int) -> int:
        return budget(count, self.keep)


@torch.no_grad()
def correlation_select(
    keys: Tensor,
    attention: Tensor,
    mask: Tensor,
    *,
    limit: Tensor,
    spared: Tensor | None = None,
    alpha: float = 0.9,
    beta: float = 0.05,
    factor: float = 1.5,
    min_keep: int = 8,
    seed: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """bool [R, n]: which tokens of each picture stay.

    Args:
        keys: [R, n, d], what similarity is measured on.
        attention: fp32 [R, n], >= 0.
        mask: bool [R, n], which rows are tokens.
        limit: int64 [R], no more than these stay.
        spared: bool [R, n], tokens that all stay, within the limit.
        alpha, beta, factor, min_keep: as in `TokenCorrelation`.
        seed: draw the local tokens with it; None: take those with the most attention.
        backend: of the kernel.
    """
    mask = mask.bool()
    local = attention.float().masked_fill(~mask, 0.0)
    if seed is not None:
        # The largest of log p plus Gumbel noise are a draw without replacement.
        noise = torch.rand(local.shape[1], generator=torch.Generator().manual_seed(seed), device="cpu").clamp(
            1e-12, 1 - 1e-7
        )
        local = local.clamp(min=1e-30).log() - (-noise.log()).log().to(local.device)
    always = iqr_outliers(attention, mask, factor)
    if spared is not None:
        always = always | (spared & mask)
    by_attention = _rank(attention.float(), mask)
    by_local = _rank(local, mask)
    stay = mask & (always | (by_local < density_budget(keys, mask, alpha, beta, backend)[:, None]))
    # Outliers by attention, then the rest as drawn.
    n = mask.shape[1]
    order = torch.where(always, by_attention - n, by_local).masked_fill(~mask, n)
    place = order.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    count = torch.maximum(stay.sum(1), mask.sum(1).clamp(max=min_keep))
    return mask & (place < torch.minimum(count, limit)[:, None])


@torch.no_grad()
def density_budget(
    keys: Tensor, mask: Tensor, alpha: float = 0.9, beta: float = 0.05, backend: str = "auto", block: int = 1024
) -> Tensor:
    """int64 [R]: how many tokens of each picture are not redundant, its density times its size.

    Redundant: a cosine above `alpha` with at least `beta` N of the N - 1 others.

    Args:
        keys: [R, n, d].
        mask: bool [R, n], which rows are the N tokens.
        block: rows of the n x n similarities held at a time.
    """
    size = mask.sum(1)
    close = []
    for start in range(0, keys.shape[1], block):
        some = slice(start, start + block)
        cosine = pairwise_cosine(keys[:, some], keys, mask=mask[:, some], y_mask=mask, backend=backend)
        cosine.diagonal(start, 1, 2).fill_(-1.0)
        near = (cosine > alpha) & mask[:, None] & mask[:, some, None]
        close.append(near.sum(2))
    redundant = mask & (torch.cat(close, 1) >= beta * size[:, None])
    return size - redundant.sum(1)


@torch.no_grad()
def iqr_outliers(scores: Tensor, mask: Tensor, factor: float = 1.5) -> Tensor:
    """bool [R, n]: scores above the third quartile by more than `factor` interquartile ranges, quartiles linear."""
    real = scores.float().masked_fill(~mask, torch.nan)
    low, high = torch.nanquantile(real, torch.tensor([0.25, 0.75], device=real.device), dim=1, keepdim=True)
    return mask & (real > high + factor * (high - low))


def _rank(scores: Tensor, mask: Tensor) -> Tensor:
    """int64 [R, n]: place of each token in descending order, the lower index first in a tie; others behind."""
    order = scores.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1, stable=True)
