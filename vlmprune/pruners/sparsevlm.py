from __future__ import annotations

import functools
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmprune.contract import Keep, Positions, Presets, Pruner, Selection, Sizes, VisualTokens
from vlmprune.kernels import merge_tokens
from vlmprune.pruners._schedule import (
    StagedPruner,
    check_reach,
    layer_average,
    nearest_power,
    stage_ratios,
    truncate,
)
from vlmprune.registry import register_pruner

# Official names of the budgets, and the tokens of 576 kept before clusters are added (v1.5) or the factor and offset on
# the rank (v1.0); what v1.5 comes to, clusters included, on average over 32 layers.
KEPT = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
AVERAGE = {192: 206.5, 128: 145.40625, 96: 114.09375, 64: 82.25}
RANKED = {192: (13.5, 0.0), 128: (9.0, 6.0), 64: (0.8, 0.0)}


@register_pruner
@dataclass(kw_only=True)
class SparseVLM(StagedPruner):
    """Keep what the text tokens closest to the image attend to, and merge some of the rest into a few clusters.

    Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025,
    arXiv 2410.04417. Training-free. As in the official code, v1.5:

    Raters are the text tokens behind the image whose share of softmax_text(e_v e_t^T), mean over visual tokens, exceeds
    the mean (section 3.2, `find_raters`). Before each layer of `layer_list` the visual tokens are ranked by the raters'
    attention in the layer before, mean over raters and heads (section 3.3). Of those that go, the best 30 % are
    recycled (section 3.4): clustered around density peaks, one cluster for ten tokens, each cluster's mean (the paper
    says sum, the code averages) put in place of its centre.

    Published for 32 layers: layers 2, 6 and 15 of the paper, which act before 3, 7 and 16; 300, 200 and 110 of 576
    tokens and 9, 4 and 3 clusters, called 192 and in truth 206.5 on average over the layers, which is the default keep;
    positions compact. The presets have the other budgets, by their official names. Any other keep raises the ratios to
    a common power.

    v1.0 (`rank_scale`, or the preset "llava-1.5, v1.0") keeps rank(P) * rank_scale + rank_bias tokens, P the raters'
    attention, mean over heads: what that gives cannot be told beforehand, and `keep` below 1.0 has no further say. v2
    ranks by chosen heads, which the signals here, means over heads, do not tell apart: it is not offered.

    Unlike the official code: fp32 and no random noise; a merged row stands at the place of its cluster's centre and not
    behind the kept ones; if no text token exceeds the mean, all are raters.

    Args:
        recycle: merge part of what goes into clusters; False: only drop.
        rank_scale: tokens kept per unit of rank (v1.0); None: by `ratios` (v1.5).
        rank_bias: tokens kept beyond (v1.0).
    """

    keep: Keep = AVERAGE[192] / 576
    positions: Positions = "compact"
    layer_list: tuple[int, ...] = (3, 7, 16)
    ratios: tuple[float, ...] = (300 / 576, 200 / 576, 110 / 576)
    recycle: bool = True
    rank_scale: float | None = None
    rank_bias: float = 0.0

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = "arXiv 2410.04417"
    stage: ClassVar[str] = "decoder"
    needs: ClassVar[frozenset[str]] = frozenset({"text_attention", "prompt_features", "text_features", "text_mask"})
    query_aware: ClassVar[bool] = True
    presets: ClassVar[Presets] = {
        "llava-1.5": {
            tokens: {"keep": AVERAGE[tokens] / 576, "ratios": tuple(each / 576 for each in kept)}
            for tokens, kept in KEPT.items()
        },
        "llava-1.5, v1.0": {
            tokens: {
                "keep": tokens / 576,
                "layer_list": (3, 7, 16, 20),
                "ratios": (1.0,) * 4,
                "rank_scale": scale,
                "rank_bias": bias,
            }
            for tokens, (scale, bias) in RANKED.items()
        },
    }

    @classmethod
    def preset(cls, name: str, average_tokens: float | None = None, **fields: Any) -> Pruner:
        pruner = super().preset(name, average_tokens, **fields)
        if not isinstance(pruner, SparseVLM) or pruner.recycle or pruner.rank_scale is not None or "keep" in fields:
            return pruner
        # Without clusters the published counts come to less.
        counts = _counts(576, pruner.ratios, False, 1.0)
        return replace(pruner, keep=layer_average(576, counts, pruner.layer_list, pruner.model_depth) / 576)

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 32) -> Sequence[int | None]:
        if self.rank_scale is not None:
            return self._undecided(counts, layer, depth)
        layers, ratios = self.layers(depth), stage_ratios(self.layer_list, self.ratios, depth, self.model_depth)
        stage = self._stage(layer, depth)
        return [(count, *_schedule(count, self.keep, layers, ratios, depth, self.recycle))[stage] for count in counts]

    def selection_flops(self, sizes: Sizes) -> int:
        raters = 2 * sizes.originally * sizes.words * sizes.width
        kept, clusters = split(sizes.tokens, sizes.keep) if self.recycle else (sizes.keep, 0)
        pool = recycled(sizes.tokens - kept) if clusters else 0
        return raters + 2 * pool**2 * sizes.width

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        attention = tokens.signal("text_attention")
        raters = find_raters(
            tokens.signal("prompt_features"),
            _filled(list(map(len, tokens.shapes)), tokens.features.device),
            tokens.signal("text_features"),
            tokens.signal("text_mask"),
        )
        score = rate(attention, raters)
        picks, rows, merged = [], [], []
        for item, (count, left) in enumerate(zip(tokens.counts, budget.tolist())):
            if self.rank_scale is None:
                kept, clusters = split(count, left) if self.recycle else (left, 0)
            else:
                kept = rank_count(attention[item, raters[item], :count], self.rank_scale, self.rank_bias)
                clusters = clusters_of(count - kept) if self.recycle and kept < count else 0
            index, made = sparsify(tokens.features[item, :count], score[item, :count], kept, clusters)
            picks.append(index)
            rows.append(torch.cat([tokens.features[item, index[:kept]], made]))
            merged.append(_filled([kept], index.device, len(index))[0].logical_not())
        index = pad_sequence(picks, batch_first=True, padding_value=-1)
        if not self.recycle:
            return Selection(index)
        return Selection(index, pad_sequence(rows, batch_first=True), pad_sequence(merged, batch_first=True))


def find_raters(visual: Tensor, visual_mask: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
    """bool [I, T]: text tokens whose `rater_scores` exceed the mean over the text, 1 / T; all where none does.

    Args:
        visual: [I, N0, D] input embeddings of the visual tokens, all original ones.
        visual_mask: bool [I, N0], which of these rows are real.
        text: [I, T, D] those of the text behind the image.
        text_mask: bool [I, T].
    """
    share = rater_scores(visual, visual_mask, text, text_mask)
    chosen = (share * text_mask.sum(1, keepdim=True) > 1 + 1e-6) & text_mask
    return torch.where(chosen.any(1, keepdim=True), chosen, text_mask)


def rater_scores(visual: Tensor, visual_mask: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
    """fp32 [I, T]: softmax over the text of e_v e_t^T, unscaled, mean over visual tokens; 0 for padding."""
    logits = visual.float() @ text.float().mT
    share = logits.masked_fill(~text_mask[:, None], -torch.inf).softmax(2).nan_to_num(0.0)  # a row without text
    return (share * visual_mask[..., None]).sum(1) / visual_mask.sum(1, keepdim=True)


def rate(attention: Tensor, raters: Tensor) -> Tensor:
    """fp32 [I, N]: attention [I, T, N] of text rows, mean over the raters (bool [I, T])."""
    return (attention * raters[..., None]).sum(1) / raters.sum(1, keepdim=True).clamp(min=1)


def rank_count(attention: Tensor, scale: float, bias: float) -> int:
    """Tokens that v1.0 keeps of n, from the raters' attention [R, n]: all if its rank is n, else by its rank.

    All too where there is no rater to judge by. The rank is torch's, at its default tolerance.
    """
    raters, count = attention.shape
    rank = int(torch.linalg.matrix_rank(attention.float())) if raters else count
    return count if rank == count else max(0, min(truncate(rank * scale + bias), count - 1))


def recycled(dropped: int) -> int:
    """Tokens of those dropped that take part in clusters."""
    return min(dropped, truncate(0.3 * dropped) + 1)


def clusters_of(dropped: int) -> int:
    """Clusters that replace the recycled ones of `dropped` > 0 tokens."""
    return recycled(dropped) // 10 + 1


def split(count: int, left: int) -> tuple[int, int]:
    """Tokens kept and clusters added, so that `left` of `count` rows remain."""
    for kept in range(left - 1, -1, -1):
        if kept + clusters_of(count - kept) == left:
            return kept, left - kept
    return left, 0  # fewer than there would be clusters


def sparsify(features: Tensor, score: Tensor, kept: int, clusters: int) -> tuple[Tensor, Tensor]:
    """Keep the best tokens of one item and cluster the best of the rest.

    Args:
        features: [n, D] hidden states.
        score: fp32 [n]; the lower index wins a tie.

    Returns:
        int64 [kept + clusters], the kept tokens ascending, then the centre of each cluster, densest and most remote
        first; and the clusters' means [clusters, D] in the dtype of `features`.
    """
    order = score.sort(descending=True, stable=True).indices
    index = order[:kept].sort().values
    if not clusters:
        return index, features[:0]
    pool = order[kept : kept + recycled(len(order) - kept)]
    centres, label = density_peaks(features[pool], clusters)
    means, _ = merge_tokens(features[pool][None], centres[None], label[None])
    return torch.cat([index, pool[centres]]), means[0]


def density_peaks(x: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """DPC-kNN (Du et al., 2016) with as many neighbours as clusters.

    d_ij = |x_i - x_j| / sqrt(D); density rho_i = exp(-mean of the smallest d_ij^2, the token's own 0 among them);
    delta_i = distance to the nearest denser token, the largest of all distances for the densest. Centres have the
    largest rho delta, compared as logarithms, which do not underflow; every token joins its nearest centre. Ties go to
    the lower index.

    Args:
        x: [M, D] floating, M >= clusters; squared distances take [M, M] in fp32.

    Returns:
        int64 [clusters], the centres, best first, and int64 [M], the cluster of each token.
    """
    x = x.float() / x.shape[1] ** 0.5
    x = x - x.mean(0)
    square = x.square().sum(1)
    apart = (square[:, None] + square - 2 * x @ x.T).clamp_(min=0).fill_diagonal_(0)
    # A product is symmetric only up to rounding, and two that are each other's nearest must tie in density.
    apart = torch.minimum(apart, apart.T)
    log_density = -apart.topk(clusters, largest=False).values.mean(1)
    higher = apart.masked_fill(log_density <= log_density[:, None], torch.inf).amin(1).clamp(max=apart.amax())
    centres = (log_density + 0.5 * higher.log()).sort(descending=True, stable=True).indices[:clusters]
    own = torch.arange(clusters, device=x.device)
    return centres, apart[:, centres].argmin(1).scatter(0, centres, own)


def _counts(count: int, ratios: Sequence[float], recycle: bool, power: float) -> tuple[int, ...]:
    """Rows behind each stage: a share of the original tokens, and the clusters made of what went there."""
    left, out = count, []
    for ratio in ratios:
        kept = min(truncate(count * ratio**power), left - recycle)  # v1.5 drops one at least
        left = kept + clusters_of(left - kept) if recycle else kept
        out.append(left)
    return tuple(out)


@functools.lru_cache(maxsize=4096, typed=True)
def _schedule(
    count: int, keep: Keep, layers: tuple[int, ...], ratios: tuple[float, ...], depth: int, recycle: bool
) -> tuple[int, ...]:
    target = float(keep) if isinstance(keep, numbers.Integral) else keep * count
    if target >= count or not layers:
        return (count,) * len(layers)
    check_reach(count, keep, layer_average(count, [count * (ratio == 1) for ratio in ratios], layers, depth), depth)
    return nearest_power(
        lambda power: _counts(count, ratios, recycle, power),
        lambda left: layer_average(count, left, layers, depth),
        target,
    )


def _filled(lengths: Sequence[int], device: torch.device, width: int | None = None) -> Tensor:
    """bool [I, width]: the first so many of each row."""
    place = torch.arange(max(lengths) if width is None else width, device="cpu")
    return (place < torch.tensor(lengths, device="cpu")[:, None]).to(device, non_blocking=True)
