"""What wrappers of one pruner share: they act where and on as much as the pruner inside does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlmprune.contract import Keep, Patches, Positions, Pruner, Reduced, Selection, VisualTokens


@dataclass(init=False)
class Wrapper(Pruner):
    """A pruner around another. `keep` and `positions`, where given, go to the one inside."""

    pruner: Pruner

    def __init__(self, pruner: Pruner, *, keep: Keep | None = None, positions: Positions | None = None) -> None:
        kind = type(self).__name__
        if not isinstance(pruner, Pruner):
            raise ValueError(f"{kind} takes a pruner, such as {kind}(DivPrune(keep=0.3)), got {pruner!r}")
        given: dict[str, Any] = {"keep": keep, "positions": positions}
        changed = {key: value for key, value in given.items() if value not in (None, getattr(pruner, key))}
        self.pruner = replace(pruner, **changed) if changed else pruner
        self.keep, self.positions = self.pruner.keep, self.pruner.positions
        self.stage, self.needs = pruner.stage, pruner.needs  # type: ignore[misc]
        self.query_aware, self.trained = pruner.query_aware, pruner.trained  # type: ignore[misc]
        self.otherwise = pruner.otherwise  # type: ignore[misc]

    @property
    def published_positions(self) -> Positions:
        return self.pruner.published_positions

    def with_positions(self, positions: Positions) -> Pruner:
        return replace(self, pruner=self.pruner.with_positions(positions), positions=positions)

    def layers(self, depth: int) -> tuple[int, ...]:
        return self.pruner.layers(depth)

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 1) -> Sequence[int | None]:
        return self.pruner.budget(counts, layer, depth)

    def encoder_layers(self, depth: int) -> tuple[int, ...]:
        return self.pruner.encoder_layers(depth)

    def encoder_rows(self, count: int, layer: int, depth: int) -> int | None:
        return self.pruner.encoder_rows(count, layer, depth)

    @property
    def proportional(self) -> bool:
        return self.pruner.proportional

    def reduce(self, patches: Patches) -> Reduced | None:
        return self.pruner.reduce(patches)

    def cache_layers(self, depth: int) -> tuple[int, ...]:
        return self.pruner.cache_layers(depth)

    def cache_budget(self, count: int, left: int, layer: int, depth: int) -> int:
        return self.pruner.cache_budget(count, left, layer, depth)

    def cache_due(self, step: int) -> bool:
        return self.pruner.cache_due(step)

    def select_cache(self, tokens: VisualTokens) -> Selection:
        return self.pruner.select_cache(tokens)

    def reads(self, layer: int, depth: int) -> frozenset[str]:
        return self.pruner.reads(layer, depth)

    def check_model(self, config: Any) -> None:
        self.pruner.check_model(config)

    def accumulate(self, depth: int) -> tuple[int, ...]:
        return self.pruner.accumulate(depth)
