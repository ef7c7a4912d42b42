from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmprune.contract import (
    Keep,
    Patches,
    Positions,
    Presets,
    Reduced,
    Selection,
    Sizes,
    VisualTokens,
    budget,
    check_keep,
    is_all,
)
from vlmprune.kernels import merge_tokens
from vlmprune.pruners._merging import representatives
from vlmprune.pruners._schedule import StagedPruner
from vlmprune.pruners._top import top_indices
from vlmprune.registry import register_pruner

_KEYS = "cls_attention_last|received_attention_last?"


@register_pruner
@dataclass(kw_only=True)
class MustDrop(StagedPruner):
    """Drop what the text attends to neither as a whole nor in any one word, except what the encoder marked as key.

    Liu et al., "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model", arXiv
    2411.10803. Training-free. After the official code; its three stages here:

    - In the vision tower, with `tower_keep`: behind its first layer the most similar windows of `window` x `window`
      patches merge, as many as leave that share or count of a picture's patches. The official code merges all whose
      similarity reaches 0.8, but as few as the batch's most varied picture has; a fixed number keeps pictures apart.
      It takes a tower that can be shortened and a grid that the windows tile. The key set are the ceil(`key_rate` N)
      tokens with the largest CLS attention of the tower's last layer (mean over heads; the attention received, in
      towers without CLS; none where there is neither).
    - In the decoder, the dual attention filter (`dual_filter`): B, the attention of the text behind the image in the
      layer before, mean over heads; token j goes if sum_t B_tj is less than `global_threshold` of the sum over all
      tokens and max_t B_tj less than `individual_threshold`, unless it is key. Published for 32 layers: layers 2, 6, 10
      and 14, which act before 3, 7, 11 and 15; positions compact (M-RoPE families: original).
    - In the cache: `cache_layers`.

    The thresholds were set by hand for each task and budget, and say nothing of the count. By default, therefore,
    `keep` decides: at each stage a share of the original tokens (`ratios`, raised to the power that averages `keep`)
    stays, key tokens first, the others by the strength at which they would pass the filter,
    max(sum_t B_tj / (global_threshold sum_j sum_t B_tj), max_t B_tj / individual_threshold). With `level` set, or by
    `preset`, it is the published filter with both thresholds times `level`: then the counts depend on the image, and
    `keep` below 1.0 has no further say; `vlmprune.search.calibrate` finds the level that averages a budget on samples.

    Each image is judged by itself. Deviation: decoding goes on at the position behind the prompt also where the cache
    was shortened; the official code counts the cache's length, and so gives positions a second time.

    Args:
        tower_keep: what the tower's stage leaves of a picture's patches, a ratio or a count; None: the stage is off.
            `keep` then counts on top, relative to all patches: what it says less than the tower leaves.
        global_threshold: share of the text's attention to the image.
        individual_threshold: attention of one text token.
        level: factor on both thresholds of the published filter; None: as many tokens as `keep` says.
        key_rate: share of the original tokens that always stays.
        output_aware_cache: whether the third stage is on.
    """

    keep: Keep = 1 / 3
    positions: Positions = "compact"
    layer_list: tuple[int, ...] = (3, 7, 11, 15)
    ratios: tuple[float, ...] = (0.5, 0.25, 0.125, 0.0625)
    global_threshold: float = 0.001
    individual_threshold: float = 0.001
    level: float | None = None
    key_rate: float = 0.08
    output_aware_cache: bool = True
    tower_keep: Keep | None = None
    window: int = 3

    name: ClassVar[str] = "mustdrop"
    paper: ClassVar[str] = "arXiv 2411.10803"
    stage: ClassVar[str] = "encoder, decoder, cache"
    query_aware: ClassVar[bool] = True
    otherwise: ClassVar[str] = "set tower_keep=None, for its tower cannot be shortened"
    presets: ClassVar[Presets] = {  # thresholds of the official scripts, by task and of LLaVA-1.5's 576 tokens
        "textvqa": {
            192: {"keep": 192 / 576, "level": 1.0, "global_threshold": 0.001, "individual_threshold": 0.001},
            128: {"keep": 128 / 576, "level": 1.0, "global_threshold": 0.0012, "individual_threshold": 0.001},
            64: {"keep": 64 / 576, "level": 1.0, "global_threshold": 0.011, "individual_threshold": 0.01},
        },
        "vizwiz": {64: {"keep": 64 / 576, "level": 1.0, "global_threshold": 0.005, "individual_threshold": 0.001}},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        thresholds = (self.global_threshold, self.individual_threshold)
        if not min(thresholds) >= 0 or (self.level is None and not min(thresholds) > 0):
            raise ValueError(f"mustdrop's thresholds must be positive, got {thresholds} (0 only with a level)")
        if self.tower_keep is not None:
            check_keep(self.tower_keep)
        if not 0 <= self.key_rate <= 1:
            raise ValueError(f"mustdrop's key_rate must be between 0 and 1, got {self.key_rate!r}")
        if self.level is not None and not self.level >= 0:
            raise ValueError(
                f"mustdrop's level must be at least 0, or None to keep what `keep` says, got {self.level!r}"
            )

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        cache = {"cache_alive"} if self.output_aware_cache else set()
        return frozenset({"text_attention", _KEYS} | cache | ({"encoder_kept"} if self._in_tower else set()))

    @property
    def _in_tower(self) -> bool:
        return self.tower_keep is not None and not is_all(self.keep)

    def layers(self, depth: int) -> tuple[int, ...]:
        return ((0,) if self._in_tower else ()) + self.decoder_stages(depth)

    def encoder_layers(self, depth: int) -> tuple[int, ...]:
        return (0,) if self._in_tower else ()

    def encoder_rows(self, count: int, layer: int, depth: int) -> int:
        return count - self._windows(count) * (self.window**2 - 1)

    def _windows(self, count: int) -> int:
        """Windows of a picture of `count` patches that merge."""
        assert self.tower_keep is not None
        merged = windows_for(count, max(1, budget(count, self.tower_keep)), self.window)
        return min(merged, count // self.window**2)

    def reduce(self, patches: Patches) -> Reduced:
        rows, cols = patches.grid
        similarity = window_similarity(patches.features[:, patches.prefix :], patches.grid, self.window)
        out, _, keep, into = merge_windows(
            patches.features,
            similarity,
            self._windows(rows * cols),
            patches.grid,
            window=self.window,
            prefix=patches.prefix,
            order="raster",
        )
        return Reduced(out, keep, into)

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 32) -> Sequence[int | None]:
        if self._in_tower and layer == 0:
            return [None] * len(counts)
        if self.level is None:
            return super().budget(counts, layer, depth)
        return self._undecided(counts, layer, depth)

    def cache_layers(self, depth: int) -> tuple[int, ...]:
        """Layers, of `depth`, whose cache shrinks behind the prefill to the visual tokens that the last layer has.

        From the layer that the first stage reads to the one that the last stage reads (2 to 14 of 32): those before
        keep all, those behind hold no other.
        """
        layers = self.decoder_stages(depth)
        on = layers and self.output_aware_cache and not is_all(self.keep)
        return tuple(range(layers[0] - 1, layers[-1])) if on else ()

    def cache_budget(self, count: int, left: int, layer: int, depth: int) -> int:
        last = self.budget([count], self.decoder_stages(depth)[-1], depth)[0]
        return left if last is None or layer not in self.cache_layers(depth) else min(left, last)

    def selection_flops(self, sizes: Sizes) -> int:
        return 0

    def select_cache(self, tokens: VisualTokens) -> Selection:
        alive = tokens.signal("cache_alive") & tokens.valid
        return Selection(torch.arange(alive.shape[1], device=alive.device).expand_as(alive).masked_fill(~alive, -1))

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        if tokens.layer == 0:
            return representatives(tokens)
        attention, saliency = tokens.signal("text_attention"), tokens.signal(_KEYS)
        if saliency is None:
            keys = torch.zeros_like(tokens.valid)
        else:
            keys = key_tokens(saliency.masked_fill(~tokens.valid, -1), list(map(len, tokens.shapes)), self.key_rate)
            keys = keys & tokens.valid
        if self.level is None:
            strength = filter_strength(attention, self.global_threshold, self.individual_threshold)
            # Ranks, so that key tokens go before any strength.
            rank = strength.masked_fill(~tokens.valid, -1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            return Selection(top_indices(rank.neg() + keys * rank.shape[1], budget))
        kept = dual_filter(attention, self.level * self.global_threshold, self.level * self.individual_threshold)
        place = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        return Selection(place.masked_fill(~((kept | keys) & tokens.valid), -1))


def dual_filter(attention: Tensor, global_threshold: float, individual_threshold: float) -> Tensor:
    """bool [I, N], tokens that pass the dual attention filter: enough of all attention, or enough from one text token.

    Args:
        attention: fp32 [I, T, N] of text rows, mean over heads; 0 for padding.
        global_threshold: of the row sums' total.
        individual_threshold: of one entry.
    """
    total = attention.sum(1)
    weak = total < global_threshold * total.sum(1, keepdim=True)
    return ~(weak & (_peak(attention) < individual_threshold))


def filter_strength(attention: Tensor, global_threshold: float, individual_threshold: float) -> Tensor:
    """fp32 [I, N]: the factor on both thresholds up to which a token passes `dual_filter`."""
    total = attention.sum(1)
    share = total / total.sum(1, keepdim=True).clamp(min=torch.finfo(total.dtype).tiny)
    return torch.maximum(share / global_threshold, _peak(attention) / individual_threshold)


def _peak(attention: Tensor) -> Tensor:
    return attention.amax(1) if attention.shape[1] else attention.sum(1)


def key_tokens(saliency: Tensor, originals: Sequence[int], rate: float) -> Tensor:
    """bool [I, N]: the ceil(rate * original count) tokens of each item with the largest saliency [I, N]."""
    count = torch.tensor([math.ceil(rate * each - 1e-6) for each in originals], device="cpu")
    index = top_indices(saliency, count)
    chosen = torch.zeros(len(index), saliency.shape[1] + 1, dtype=torch.bool, device=saliency.device)
    return chosen.scatter(1, torch.where(index < 0, saliency.shape[1], index), True)[:, :-1]


def window_similarity(patches: Tensor, grid: tuple[int, int], window: int = 3) -> Tensor:
    """fp32 [P, W]: mean cosine of the pairs of different patches in each window, windows in raster order.

    Args:
        patches: [P, rows * columns, C] of P pictures, in raster order.
        grid: (rows, columns), both multiples of `window`.

    Raises:
        ValueError: a grid that the windows do not tile.
    """
    rows, cols = grid
    if rows % window or cols % window:
        raise ValueError(f"mustdrop merges windows of {window} x {window}, which do not tile a {rows} x {cols} grid")
    unit = torch.nn.functional.normalize(patches.float(), dim=2, eps=1e-8)
    unit = unit.reshape(len(patches), rows // window, window, cols // window, window, -1).transpose(2, 3).flatten(3, 4)
    # Over all pairs, the square of the sum; less each patch with itself.
    pairs = unit.sum(3).square().sum(-1) - unit.square().sum((-2, -1))
    return pairs.flatten(1) / (window**2 * (window**2 - 1))


def windows_for(patches: int, retained: int, window: int = 3) -> int:
    """Windows to merge so that about `retained` of `patches` rows are left, at least as many."""
    return max(0, patches - retained) // (window**2 - 1)


def merge_windows(
    x: Tensor,
    similarity: Tensor,
    merged: int,
    grid: tuple[int, int],
    *,
    window: int = 3,
    prefix: int = 1,
    order: Literal["similarity", "raster"] = "similarity",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Replace the `merged` windows of largest similarity of each picture by the plain mean of their patches.

    Args:
        x: [P, prefix + rows * columns, C], floating.
        similarity: fp32 [P, W], `window_similarity`; the lower window wins a tie.
        merged: windows to merge, 0 to W. Officially the least number, over the batch, of windows at or above 0.8.
        prefix: rows in front that are no patches (CLS).
        order: "similarity" puts merged rows in front, most similar first, as the official code does; "raster" puts
            each at the place of its window's last patch.

    Returns:
        Rows [P, K, C]; how many patches each stands for, fp32 [P, K]; the row of `x` that each takes the place of,
        int64 [P, K], ascending in raster order; and for each row of `x` the row it went into, int64 [P, T].
    """
    pictures, total = x.shape[:2]
    rows, cols = grid
    device = x.device
    place = torch.arange(rows * cols, device=device)
    of_window = place // cols // window * (cols // window) + place % cols // window
    last = prefix + place[place // cols % window + place % cols % window == 2 * (window - 1)]
    ranked = similarity.argsort(dim=1, descending=True, stable=True)
    rank = ranked.argsort(dim=1)[:, of_window]  # [P, patches]: place of its window among all
    gone = rank < merged
    first = torch.arange(prefix, device=device).expand(pictures, -1)
    # Rows that stay, window by window: those merged, at their last patch, and the patches of no merged window.
    heads = last[ranked[:, :merged]]
    alone = prefix + gone.long().argsort(dim=1, stable=True)[:, : rows * cols - merged * window**2]
    keep = torch.cat([first, heads, alone], dim=1)
    if order == "raster":
        keep = keep.sort(dim=1).values
    slot = torch.empty(pictures, total, dtype=torch.int64, device=device)
    slot.scatter_(1, keep, torch.arange(keep.shape[1], device=device).expand_as(keep))
    into = torch.cat([slot[:, :prefix], torch.where(gone, slot[:, last[of_window]], slot[:, prefix:])], dim=1)
    out, size = merge_tokens(x, keep, into)
    return out, size, keep, into
