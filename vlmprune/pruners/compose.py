from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vlmprune.contract import Patches, Positions, Pruner, Reduced, Selection, Sizes, VisualTokens


@dataclass(init=False)
class Compose(Pruner):
    """One method after another in one session: `Compose(DivPrune(keep=0.3), other)`.

    Each pruner takes what the one before it leaves: its ratio is of the tokens that reach it. All must use the same
    positions, and each must act behind the one before it.

    Raises:
        ValueError: fewer than two pruners, different positions, or (at `prune()`) stages that do not follow each other.
    """

    pruners: tuple[Pruner, ...]

    name: ClassVar[str] = "compose"
    paper: ClassVar[str] = "wrapper"

    def __init__(self, *pruners: Pruner) -> None:
        if len(pruners) < 2 or not all(isinstance(pruner, Pruner) for pruner in pruners):
            raise ValueError("Compose takes two or more pruners, such as Compose(DivPrune(keep=0.3), other)")
        if len({pruner.positions for pruner in pruners}) > 1:
            each = ", ".join(f"{pruner.name}: {pruner.positions}" for pruner in pruners)
            raise ValueError(f"composed pruners must use the same positions, got {each}; set positions= on one of them")
        for pruner in pruners:
            if isinstance(pruner.keep, str):
                raise ValueError(f"composed pruners take a ratio or a count each, got keep={pruner.keep!r}")
        self.pruners = pruners
        self.keep = pruners[-1].keep
        self.positions = pruners[0].positions
        self.needs = frozenset().union(*(pruner.needs for pruner in pruners))  # type: ignore[misc]

    @property
    def published_positions(self) -> Positions:
        published = {pruner.positions == pruner.published_positions for pruner in self.pruners}
        return self.positions if published == {True} else "original"

    def with_positions(self, positions: Positions) -> Pruner:
        return Compose(*(pruner.with_positions(positions) for pruner in self.pruners))

    def layers(self, depth: int) -> tuple[int, ...]:
        stages = tuple(layer for pruner in self.pruners for layer in pruner.layers(depth))
        if list(stages) != sorted(set(stages)):
            raise ValueError(f"composed pruners must act one behind the other, but their stages are {list(stages)}")
        return stages

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 1) -> Sequence[int | None]:
        owner = self._owner(layer, depth)
        for pruner in self.pruners[: self.pruners.index(owner)]:
            left = pruner.budget(counts, pruner.layers(depth)[-1], depth)
            if None in left:
                raise ValueError(
                    f"{pruner.name} keeps what each image needs, so that nothing can be composed behind it: put it last"
                )
            counts = [count for count in left if count is not None]
        return owner.budget(counts, layer, depth)

    def encoder_layers(self, depth: int) -> tuple[int, ...]:
        return self.pruners[0].encoder_layers(depth)

    def encoder_rows(self, count: int, layer: int, depth: int) -> int | None:
        return self.pruners[0].encoder_rows(count, layer, depth)

    @property
    def proportional(self) -> bool:
        return self.pruners[0].proportional

    def reduce(self, patches: Patches) -> Reduced | None:
        return self.pruners[0].reduce(patches)

    def cache_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(sorted({layer for pruner in self.pruners for layer in pruner.cache_layers(depth)}))

    def cache_budget(self, count: int, left: int, layer: int, depth: int) -> int:
        owner = next((pruner for pruner in self.pruners if layer in pruner.cache_layers(depth)), None)
        return left if owner is None else owner.cache_budget(count, left, layer, depth)

    def cache_due(self, step: int) -> bool:
        return any(pruner.cache_due(step) for pruner in self.pruners)

    def select_cache(self, tokens: VisualTokens) -> Selection:
        owner = next(pruner for pruner in self.pruners if tokens.layer in pruner.cache_layers(tokens.depth))
        return owner.select_cache(tokens)

    def check_model(self, config: Any) -> None:
        for pruner in self.pruners:
            pruner.check_model(config)

    def accumulate(self, depth: int) -> tuple[int, ...]:
        return tuple(sorted({layer for pruner in self.pruners for layer in pruner.accumulate(depth)}))

    def reads(self, layer: int, depth: int) -> frozenset[str]:
        return self._owner(layer, depth).reads(layer, depth)

    def selection_flops(self, sizes: Sizes) -> int | None:
        return self._owner(sizes.layer, sizes.depth).selection_flops(sizes)

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        return self._owner(tokens.layer, tokens.depth).select(tokens, budget)

    def _owner(self, layer: int, depth: int) -> Pruner:
        return next(pruner for pruner in self.pruners if layer in pruner.layers(depth))
