from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmprune.contract import Pruner, Selection, VisualTokens


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
        self.pruners = pruners
        self.keep = pruners[-1].keep
        self.positions = pruners[0].positions
        self.needs = frozenset().union(*(pruner.needs for pruner in pruners))  # type: ignore[misc]

    def layers(self, depth: int) -> tuple[int, ...]:
        stages = tuple(layer for pruner in self.pruners for layer in pruner.layers(depth))
        if list(stages) != sorted(set(stages)):
            raise ValueError(f"composed pruners must act one behind the other, but their stages are {list(stages)}")
        self._owners = {layer: n for n, pruner in enumerate(self.pruners) for layer in pruner.layers(depth)}
        self._last = [pruner.layers(depth)[-1] for pruner in self.pruners]
        return stages

    def budget(self, counts: Sequence[int], layer: int = 0) -> list[int]:
        for pruner, last in zip(self.pruners[: self._owners[layer]], self._last):
            counts = pruner.budget(counts, last)
        return self.pruners[self._owners[layer]].budget(counts, layer)

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        return self.pruners[self._owners[tokens.layer]].select(tokens, budget)
