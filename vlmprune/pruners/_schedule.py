"""Schedules of methods that choose at several decoder layers: published for one depth and one average, used at any."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from vlmprune.contract import Keep, Pruner, is_all

T = TypeVar("T")


def stage_layers(published: Sequence[int], depth: int, of: int = 32) -> tuple[int, ...]:
    """Decoder layers before which to choose in a model of `depth` layers, from those published for `of` layers.

    Scaled by depth / of and rounded half to even, at least 1 and below `depth`, ascending; stages that fall on the same
    layer become one. Empty for a model of one layer.
    """
    return tuple(sorted(_scaled(published, published, depth, of)))


def stage_ratios(published: Sequence[int], ratios: Sequence[float], depth: int, of: int = 32) -> tuple[float, ...]:
    """The published ratio of each of `stage_layers(published, depth, of)`: the last of those that became one stage."""
    stages = _scaled(published, ratios, depth, of)
    return tuple(stages[layer] for layer in sorted(stages))


def stage_counts(count: int, keep: Keep, layers: Sequence[int], ratios: Sequence[float], depth: int) -> list[int]:
    """Tokens of `count` that are left behind each stage, so that the average over all `depth` layers is `keep`.

    The published ratios (of `count`, non-increasing) are raised to the common power whose counts, rounded down, average
    nearest to `keep`: power 1, the published counts, at the published average; power 0, every token, at keep 1.0.

    Args:
        keep: average over the layers, as a ratio or as a count.
        layers: decoder layers before which tokens go, ascending, one for each ratio.

    Raises:
        ValueError: the layers before the first stage alone exceed the average.
    """
    return list(_counts(count, keep, tuple(layers), tuple(ratios), depth))


def outer_and_inner(count: int, keep: Keep, layer: int, inner: float, depth: int) -> tuple[int, int]:
    """Tokens of `count` left at the boundary, and of these, `inner` (rounded up), before `layer`.

    The first is the one whose average over `depth` layers is nearest to `keep`, the fewer in a tie. Where all tokens
    pass the boundary and that is not enough, more than `inner` pass the layer. `layer` 0: there is no second cut.
    """
    target = min(float(keep) if isinstance(keep, numbers.Integral) else keep * count, count)

    def average(left: int) -> float:
        return layer_average(count, (left, math.ceil(left * inner - 1e-6)), (0, layer), depth) if layer else left

    if average(count) < target:
        return count, min(count, round((target * depth - count * layer) / (depth - layer)))
    low, high = 0, count  # average(low) <= target <= average(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if average(middle) <= target else (low, middle)
    outer = high if average(high) - target < target - average(low) else low
    return outer, math.ceil(outer * inner - 1e-6) if layer else outer


@dataclass(kw_only=True)
class StagedPruner(Pruner):
    """A pruner that leaves a share of an item's original tokens behind each of several decoder layers.

    Attributes:
        layer_list: layers before which it chooses, ascending from 1, in a model of `model_depth` layers; scaled to the
            depth of any other (`stage_layers`).
        ratios: share of the original tokens left behind each; raised to a common power where `keep` is not the average
            they give (`stage_counts`).
    """

    layer_list: tuple[int, ...] = ()
    ratios: tuple[float, ...] = ()
    model_depth: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_schedule(self.name, self.layer_list, self.ratios)
        if self.layer_list[-1] >= self.model_depth:
            raise ValueError(
                f"{self.name} has no layer {self.layer_list[-1]} in a model of {self.model_depth} layers: set "
                "model_depth= to the depth of the model that layer_list is meant for"
            )

    def layers(self, depth: int) -> tuple[int, ...]:
        return self.decoder_stages(depth)

    def decoder_stages(self, depth: int) -> tuple[int, ...]:
        """`layer_list` in a model of `depth` layers."""
        return stage_layers(self.layer_list, depth, self.model_depth)

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 32) -> Sequence[int | None]:
        layers, ratios = self.decoder_stages(depth), stage_ratios(self.layer_list, self.ratios, depth, self.model_depth)
        return [
            (count, *stage_counts(count, self.keep, layers, ratios, depth))[self._stage(layer, depth)]
            for count in counts
        ]

    def _undecided(self, counts: Sequence[int], layer: int, depth: int) -> list[int | None]:
        """None, behind a stage, where only `select` can tell how much is left; all of items that `keep` spares."""
        pruned = self._stage(layer, depth) > 0 and not is_all(self.keep)
        whole = isinstance(self.keep, numbers.Integral)
        return [None if pruned and not (whole and self.keep >= count) else count for count in counts]

    def _stage(self, layer: int, depth: int) -> int:
        """Stages at or before `layer`."""
        return sum(each <= layer for each in self.decoder_stages(depth))


def check_schedule(method: str, layers: Sequence[int], ratios: Sequence[float]) -> None:
    """Raise a ValueError unless `layers` are ascending from 1 and each has a ratio in [0, 1] that never grows."""
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 1:
        raise ValueError(f"{method} needs ascending decoder layers, the first at least 1, got {tuple(layers)}")
    if len(ratios) != len(layers) or list(ratios) != sorted(ratios, reverse=True):
        raise ValueError(f"{method} needs one ratio for each of its {len(layers)} layers, none above the one before")
    if not all(0 <= ratio <= 1 for ratio in ratios):
        raise ValueError(f"{method} needs ratios of the original tokens between 0 and 1, got {tuple(ratios)}")


def truncate(value: float) -> int:
    """int(value) without the accidents of binary fractions: 100 * 0.29 is 29."""
    return math.floor(value + 1e-6)


def check_reach(count: int, keep: Keep, least: float, depth: int) -> None:
    """Raise a ValueError if `least` tokens, the smallest average over all layers there can be, are more than `keep`."""
    if least > (float(keep) if isinstance(keep, numbers.Integral) else keep * count) * (1 + 1e-9):
        share = f"{least:.3g} of {count}" if isinstance(keep, numbers.Integral) else f"{least / count:.3g} of the"
        raise ValueError(
            f"keep {keep} is out of reach: the layers that see every token alone average {share} tokens over {depth} "
            "layers; use a larger keep or an earlier first stage"
        )


def nearest_power(
    counts: Callable[[float], tuple[int, ...]], average: Callable[[Sequence[int]], float], target: float
) -> tuple[int, ...]:
    """`counts(power)`, non-increasing in the power >= 0, whose average is nearest to `target`; the fewer in a tie."""
    low, high = 0.0, 1.0
    while average(counts(high)) > target and high < 2**60:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if average(counts(middle)) > target else (low, middle)
    more, fewer = counts(low), counts(high)
    return more if average(more) - target < target - average(fewer) else fewer


def layer_average(count: int, counts: Sequence[float], layers: Sequence[int], depth: int) -> float:
    """Mean over all `depth` layers of the tokens there: `count` before the first of `layers`, then `counts`."""
    stops = (*layers[1:], depth)
    behind = sum((stop - start) * left for start, stop, left in zip(layers, stops, counts, strict=True))
    return (layers[0] * count + behind) / depth


def _scaled(published: Sequence[int], values: Sequence[T], depth: int, of: int) -> dict[int, T]:
    layers = (max(1, min(round(layer * depth / of), depth - 1)) for layer in published)
    return dict(zip(layers, values, strict=True)) if depth > 1 else {}


@functools.lru_cache(maxsize=4096, typed=True)  # typed: keep 1 is a token, keep 1.0 all of them
def _counts(count: int, keep: Keep, layers: tuple[int, ...], ratios: tuple[float, ...], depth: int) -> tuple[int, ...]:
    whole = isinstance(keep, numbers.Integral)
    target = float(keep) if whole else keep * count
    if target >= count or not layers:
        return (count,) * len(layers)
    check_reach(count, keep, layer_average(count, [count * (ratio == 1) for ratio in ratios], layers, depth), depth)

    def counts(power: float) -> tuple[int, ...]:
        return tuple(truncate(count * ratio**power) for ratio in ratios)

    published = layer_average(count, [count * ratio for ratio in ratios], layers, depth)
    if math.isclose(published, target, rel_tol=1e-9):
        return counts(1.0)
    return nearest_power(counts, lambda left: layer_average(count, left, layers, depth), target)
