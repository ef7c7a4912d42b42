"""The rows of a sweep, in order: every model's unpruned run, then method x setting x positions x keep x seed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmprune.ask import parse_keep
from vlmprune.contract import Keep, Pruner
from vlmprune.registry import create_frame_selector, create_pruner, frame_selectors, pruner_class
from vlmprune.sweep.config import MethodConfig, SweepConfig

if TYPE_CHECKING:
    from vlmprune.pruners._before_tower import FrameSelector

UNPRUNED = "unpruned"


@dataclass(frozen=True)
class Setting:
    """One row to be: what is pruned how. `method` is "unpruned" for the model as it is."""

    model: str
    method: str
    settings: dict[str, Any]
    keep: Keep | str
    positions: str
    seed: int | None

    @property
    def key(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def id(self) -> str:
        """Short, unique, fit for a file name."""
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:8]
        parts = [self.model, self.method] + ([] if self.method == UNPRUNED else [str(self.keep), self.positions])
        return re.sub(r"[^\w.-]+", "-", "_".join(parts)) + f"_{digest}"

    @property
    def label(self) -> str:
        """For people: the method with its own settings."""
        inner = ", ".join(f"{key}={value}" for key, value in self.settings.items())
        return f"{self.method} ({inner})" if inner else self.method

    @property
    def selector(self) -> FrameSelector | None:
        """What chooses frames before the model sees any, if that is the method; `clip` names its scorer.

        Raises:
            ValueError: the method does not take this keep.
        """
        if self.method not in frame_selectors():
            return None
        own = {key: value for key, value in self.settings.items() if key != "clip"}
        return create_frame_selector(self.method, keep=self.keep, **own)

    def pruner(self, batch: int = 0) -> Pruner:
        """The method as batch number `batch` gets it: one with a seed draws anew for every batch.

        Raises:
            ValueError: the method does not take this keep.
        """
        if self.method == UNPRUNED or self.selector:
            return create_pruner("uniform", keep=1.0)
        seed = {} if self.seed is None else {"seed": self.seed * 1_000_003 + batch}
        return create_pruner(self.method, keep=self.keep, positions=self.positions, **self.settings, **seed)


def settings_of(config: SweepConfig) -> list[Setting]:
    """All rows of a sweep, without repetition."""
    rows: dict[str, Setting] = {}
    for model in config.models:
        first = Setting(model.name, UNPRUNED, {}, 1.0, "original", None)
        for setting in [first, *(row for method in config.methods for row in _rows(model.name, method, config))]:
            rows[setting.id] = setting
    return list(rows.values())


def _rows(model: str, method: MethodConfig, config: SweepConfig) -> list[Setting]:
    if method.name in frame_selectors():
        return [Setting(model, method.name, method.settings, _keep(keep), "original", None) for keep in config.keeps]
    fields = {field.name: field for field in dataclasses.fields(pruner_class(method.name))}
    own = str(fields["positions"].default)
    seeds = config.seeds if "seed" in fields else [None]
    return [
        Setting(model, method.name, method.settings, keep, positions, seed)
        for positions in dict.fromkeys(own if wanted == "own" else wanted for wanted in config.positions)
        for keep in map(_keep, config.keeps)
        for seed in seeds
    ]


def _keep(value: Any) -> Any:
    """A number where text holds one; budgets such as "flops:0.3" stay text."""
    try:
        return parse_keep(value) if isinstance(value, str) else value
    except ValueError:
        return value
