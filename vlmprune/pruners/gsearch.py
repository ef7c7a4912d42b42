from __future__ import annotations

import functools
import json
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from vlmprune.contract import Keep, Positions, Pruner, Selection, Sizes, VisualTokens
from vlmprune.pruners._schedule import stage_counts, truncate
from vlmprune.pruners._top import top_indices
from vlmprune.registry import register_pruner

Query = Literal["text", "last"]


@dataclass(frozen=True)
class Schedule:
    """The share of an item's visual tokens that each decoder layer sees, as a small JSON file.

    Attributes:
        ratios: one for each layer, the first 1, none above the one before.
        meta: where it comes from: model, method, quality, samples, seed, whatever JSON can hold.

    Raises:
        ValueError: ratios that are not so.
    """

    ratios: tuple[float, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ratios = tuple(map(float, self.ratios))
        object.__setattr__(self, "ratios", ratios)
        if not ratios or ratios[0] != 1 or list(ratios) != sorted(ratios, reverse=True) or not ratios[-1] >= 0:
            raise ValueError(
                f"a schedule holds one ratio for each decoder layer, the first 1, none above the one before, none "
                f"negative, got {list(ratios)}"
            )

    @property
    def average(self) -> float:
        """Mean over the layers: the `keep` that it stands for."""
        return sum(self.ratios) / len(self.ratios)

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        text = json.dumps({"ratios": self.ratios, "meta": self.meta}, indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Read what `save` wrote.

        Raises:
            ValueError: no such file, or no schedule in it.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(tuple(data["ratios"]), dict(data.get("meta", {})))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{str(path)!r} holds no schedule that Schedule.save wrote: {error}") from error


@dataclass(kw_only=True)
class _PerLayer(Pruner):
    """At any decoder layer, keep the tokens with the most attention in the layer before.

    Attributes:
        query: whose attention: "text", mean over the text behind the image, or "last", the prompt's last token.
        allow_zero: whether a layer may see no visual token; else one stays at least.
    """

    query: Query = "text"
    allow_zero: bool = False

    stage: ClassVar[str] = "decoder"
    paper: ClassVar[str] = "arXiv 2412.00556"
    query_aware: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.query not in get_args(Query):
            raise ValueError(f'{self.name}\'s query is "text" or "last", got {self.query!r}')

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({f"{self.query}_attention"})

    def _least(self, count: int, left: int) -> int:
        return left if self.allow_zero else max(left, min(1, count))

    def selection_flops(self, sizes: Sizes) -> int:
        return 0

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        score = tokens.signal(f"{self.query}_attention")
        score = score.sum(1) if self.query == "text" else score
        return Selection(top_indices(score.masked_fill(~tokens.valid, -1), budget))


@register_pruner
@dataclass(kw_only=True)
class GSearch(_PerLayer):
    """Keep in every decoder layer the share of tokens that a search found it to need, by the text's attention.

    Zhao et al., "Accelerating Multimodal Large Language Models by Searching Optimal Vision Token Reduction", CVPR 2025,
    arXiv 2412.00556, scenario I. No official code; the runtime is a reading of the abstract and of digests. No weights
    are trained, but `schedule` comes from an offline search on samples, `vlmprune.search.greedy_search`, and holds for
    the model it was made on. `examples/search_schedule.py` makes one.

    Where the schedule falls, tokens are ranked by the attention of the text behind the image in the layer before, mean
    over rows and heads; counts round down, to at least one. Positions original. `keep` is the schedule's own average
    unless given; any other raises its ratios to a common power.

    Args:
        schedule: a `Schedule`, or the path of one saved.
    """

    keep: Keep = None  # type: ignore[assignment]  # of the schedule
    positions: Positions = "original"
    schedule: Schedule | str | Path | None = None

    name: ClassVar[str] = "gsearch"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule is None:
            raise ValueError(
                "gsearch needs a schedule: search one for your model with examples/search_schedule.py and give "
                "schedule= its file, or use psigmoid, which works without"
            )
        if not isinstance(self.schedule, Schedule):
            self.schedule = Schedule.load(self.schedule)
        if self.keep is None:
            self.keep = self.schedule.average

    def layers(self, depth: int) -> tuple[int, ...]:
        ratios = self._ratios(depth)
        falls = tuple(layer for layer in range(1, depth) if ratios[layer] < ratios[layer - 1])
        return falls or (depth - 1,)

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 32) -> list[int]:
        ratios, layers = self._ratios(depth), self.layers(depth)
        stage = sum(each <= layer for each in layers)
        shares = tuple(ratios[each] for each in layers)
        left = ((count, *stage_counts(count, self.keep, layers, shares, depth))[stage] for count in counts)
        return [self._least(count, each) for count, each in zip(counts, left)]

    def _ratios(self, depth: int) -> tuple[float, ...]:
        assert isinstance(self.schedule, Schedule)
        if len(self.schedule.ratios) != depth:
            raise ValueError(
                f"this schedule is for a language model of {len(self.schedule.ratios)} layers, this one has {depth}: "
                "search one for it with examples/search_schedule.py"
            )
        return self.schedule.ratios


@register_pruner
@dataclass(kw_only=True)
class PSigmoid(_PerLayer):
    """Keep in every decoder layer a share of tokens that falls along a sigmoid, by the text's attention.

    Zhao et al., "Accelerating Multimodal Large Language Models by Searching Optimal Vision Token Reduction", CVPR 2025,
    arXiv 2412.00556, scenario II. No official code, and the paper's parameters are not known to us: the form here is
    r_l = floor + (1 - floor) sigmoid(-kappa (l - c) / L) from layer `start` on, 1 before, with c so that the mean over
    the L layers is `keep` (`sigmoid_ratios`). `vlmprune.search.tune_sigmoid` tunes kappa and floor on samples, as the
    authors do by Bayesian optimisation; the defaults are for use without. Tokens are ranked as in `GSearch`. Positions
    original.

    Args:
        kappa: steepness; large: all at once, small: an equal share in every layer.
        floor: share that the deepest layers tend to.
        start: first layer to see fewer tokens.
    """

    keep: Keep = 0.5
    positions: Positions = "original"
    kappa: float = 20.0
    floor: float = 0.02
    start: int = 2

    name: ClassVar[str] = "psigmoid"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.kappa) and self.kappa > 0 and 0 <= self.floor <= 1 and self.start >= 1):
            raise ValueError(
                f"psigmoid needs kappa > 0, floor in [0, 1] and start >= 1, got kappa={self.kappa}, "
                f"floor={self.floor}, start={self.start}"
            )

    def layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(min(self.start, depth - 1), depth)) if depth > 1 else ()

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 32) -> list[int]:
        start = min(self.start, depth - 1)
        return [self._left(count, layer, depth) if layer >= start else count for count in counts]

    def _left(self, count: int, layer: int, depth: int) -> int:
        share = self.keep / max(count, 1) if isinstance(self.keep, numbers.Integral) else float(self.keep)
        if share >= 1:
            return count
        start = min(self.start, depth - 1)
        ratio = sigmoid_ratios(depth, share, kappa=self.kappa, floor=self.floor, start=start)[layer]
        return self._least(count, truncate(count * ratio))


@functools.lru_cache(maxsize=1024)
def sigmoid_ratios(
    depth: int, keep: float, *, kappa: float = 20.0, floor: float = 0.02, start: int = 2
) -> tuple[float, ...]:
    """Shares of the visual tokens in each of `depth` layers, on a sigmoid that averages `keep` over all of them.

    See `PSigmoid`. A floor above what `keep` leaves for the layers from `start` on is lowered to it.

    Raises:
        ValueError: the layers before `start` alone exceed `keep`.
    """
    left = (keep * depth - start) / (depth - start)  # mean share from `start` on
    if left < -1e-9:
        raise ValueError(
            f"keep {keep:.3g} is out of reach: the first {start} of {depth} layers see every token, which alone "
            f"averages {start / depth:.3g}; use a larger keep"
        )
    left = max(left, 0.0)
    if left >= 1 or left <= floor:
        return (1.0,) * start + (min(left, 1.0),) * (depth - start)

    def shares(centre: float) -> list[float]:
        return [
            floor + (1 - floor) * (0.5 - 0.5 * math.tanh(0.5 * kappa * (layer - centre) / depth))
            for layer in range(start, depth)
        ]

    reach = 80 * depth / kappa
    low, high = start - reach, depth + reach
    for _ in range(200):
        centre = (low + high) / 2
        low, high = (centre, high) if sum(shares(centre)) < left * (depth - start) else (low, centre)
    return (1.0,) * start + tuple(min(1.0, share) for share in shares(high))
