"""The one table of cases: every family and every pruner, through which the generic tests go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import random_weights
import torch
from families import FamilyCase, Part

import vlmprune
from vlmprune.contract import SIGNALS
from vlmprune.pruners.gsearch import Schedule
from vlmprune.signals import resolve


@dataclass(kw_only=True)
class Staged(vlmprune.Pruner):
    """Keeps the longest rows, a share of the item's original tokens behind each stage: tests the stages themselves."""

    keep: vlmprune.Keep = 0.3
    schedule: tuple[tuple[int, float], ...] = ((1, 0.5), (2, 0.2))

    name: ClassVar[str] = "staged"

    def layers(self, depth: int) -> tuple[int, ...]:
        return tuple(layer for layer, _ in self.schedule)

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 1) -> list[int]:
        return counts if self.keep == 1.0 else [round(dict(self.schedule)[layer] * count) for count in counts]

    def select(self, tokens: vlmprune.VisualTokens, budget: torch.Tensor) -> vlmprune.Selection:
        score = tokens.features.float().norm(dim=-1).masked_fill(~tokens.valid, -1)
        index = score.sort(dim=1, descending=True, stable=True).indices[:, : int(budget.max())]
        return vlmprune.Selection(
            index.masked_fill(torch.arange(index.shape[1], device=budget.device) >= budget[:, None], -1)
        )


def composed(first: str = "divprune", keep: vlmprune.Keep = 0.6, positions: Any = "original") -> vlmprune.Compose:
    """The boundary by one method, two decoder layers by another."""
    return vlmprune.Compose(
        vlmprune.create_pruner(first, keep=keep, positions=positions),
        Staged(keep=1.0 if keep == 1.0 else 0.3, positions=positions),
    )


def wrapped(kind: Callable[[vlmprune.Pruner], vlmprune.Pruner]) -> Callable[..., vlmprune.Pruner]:
    """A wrapper around a method by name."""

    def make(method: str = "divprune", keep: vlmprune.Keep = 0.3, **fields: Any) -> vlmprune.Pruner:
        return kind(vlmprune.create_pruner(method, keep=keep, **{"positions": "original", **fields}))

    return make


def searched(**fields: Any) -> vlmprune.GSearch:
    """A schedule for the three layers of the tiny models."""
    return vlmprune.GSearch(schedule=Schedule((1.0, 0.5, 0.25)), **fields)


@dataclass
class PrunerCase:
    """A pruner and two settings of it, easy and hard, each with `keep` well below 1."""

    name: str
    settings: tuple[dict[str, Any], ...] = field(default=({"keep": 0.3}, {"keep": 4}))
    cls: Callable[..., vlmprune.Pruner] | None = None

    def make(self, hard: bool = False, **changes: Any) -> vlmprune.Pruner:
        fields = {**self.settings[hard], **changes}
        return self.cls(**fields) if self.cls else vlmprune.create_pruner(self.name, **fields)


PRUNERS = {
    case.name: case
    for case in (
        PrunerCase("divprune", ({"keep": 0.3}, {"keep": 4, "features": "encoder"})),
        PrunerCase("fastv", ({"keep": 0.5, "layer": 1}, {"keep": 20, "layer": 1, "query": "all"})),
        PrunerCase("pool"),
        PrunerCase("random", ({"keep": 0.3, "seed": 3}, {"keep": 4})),
        PrunerCase("uniform"),
        PrunerCase("pyramiddrop", ({"keep": 0.5}, {"keep": 0.7})),
        PrunerCase("transprune", ({"keep": 0.5}, {"keep": 0.7, "alpha": 0.9, "formula": "paper"})),
        PrunerCase("mmtok"),
        PrunerCase("cdpruner", ({"keep": 0.3}, {"keep": 4, "theta": 0.5})),
        # The second stage keeps all, then none.
        PrunerCase("todre", ({"keep": 0.3, "tau": 1e-6}, {"keep": 4, "tau": 2.0})),
        PrunerCase("token-correlation", ({"keep": 0.5, "min_keep": 2}, {"keep": 4, "sampling": "multinomial"})),
        # At the boundary; behind a decoder layer, or merging inside a scope.
        PrunerCase("merge", ({}, {"method": "fastv", "keep": 0.6, "layer": 1}), wrapped(vlmprune.Merge)),
        PrunerCase("per_tile", ({"method": "mmtok"}, {"method": "pool"}), wrapped(vlmprune.PerTile)),
        PrunerCase("sparsevlm", ({"keep": 0.5}, {"keep": 0.9, "rank_scale": 2.0})),
        # Inside the tower; once behind the projector.
        PrunerCase("tome", ({"keep": 0.3}, {"keep": 4, "where": "boundary"})),
        PrunerCase("pitome", ({"keep": 0.3}, {"keep": 4, "where": "boundary"})),
        PrunerCase("visionzip", ({"keep": 0.3}, {"keep": 4, "query": "all", "merge": "average", "keep_cls": False})),
        PrunerCase("visiondrop", ({"keep": 0.3}, {"keep": 4, "renormalise": True, "rotated": False})),
        PrunerCase("globalcom2", ({"keep": 0.3}, {"keep": 4, "exact_budget": False})),
        PrunerCase("fopru", ({"keep": 0.3}, {"keep": 0.5, "mode": "row", "score": "logits"})),
        # Counts that only the scores tell.
        PrunerCase("atp", tuple({"keep": keep, "weights": random_weights.atp()} for keep in (0.5, 20))),
        PrunerCase("atp-calibrated", ({"keep": 0.5}, {"keep": 0.6, "thresholds": (0.3, 0.5), "grid": False})),
        PrunerCase("explain", tuple({"keep": keep, "weights": random_weights.explain()} for keep in (0.3, 4))),
        PrunerCase("first_layer_attention", ({"keep": 0.3}, {"keep": 4, "smooth": 5})),
        # By a ratio; by the predicted budget, where counts differ.
        PrunerCase("qtsplus", tuple({"keep": keep, "weights": random_weights.qtsplus()} for keep in (0.3, None))),
        PrunerCase("qtsplus-training-free"),
        # The cache stage has laws of its own: tests/test_mustdrop.py.
        PrunerCase(
            "mustdrop", ({"keep": 0.5, "output_aware_cache": False}, {"level": 200.0, "output_aware_cache": False})
        ),
        PrunerCase("yopo", ({"keep": 0.5}, {"keep": 0.4})),
        PrunerCase("corematching", ({"keep": 0.5}, {"elbow": True, "match": "core"})),
        PrunerCase("gsearch", ({"keep": 0.5}, {"query": "last"}), searched),
        PrunerCase("psigmoid", ({"keep": 0.5, "start": 1}, {"keep": 0.8})),
        # They compare frames; what every fourth frame alone would exceed, DyCoke refuses.
        PrunerCase("evs"),
        PrunerCase("vidcom2"),
        PrunerCase("dycoke", ({"keep": 0.6, "drop": 0.0}, {"keep": 0.8, "drop": 0.0})),
        PrunerCase("fastvid"),
        PrunerCase("flashvid", ({"keep": 0.3}, {"keep": 4, "events": False})),
        PrunerCase("holitom"),
        # Windows and clusters; the hard settings' counts follow from the grid and from the bend of a curve.
        PrunerCase("hicom_local", ({"keep": 0.3}, {"kernel": (2, 2), "scale": 1.0})),
        PrunerCase("kmeans_tokens", ({"keep": 0.3}, {"keep": 4, "elbow": True, "least": 3, "most": 6})),
        PrunerCase(
            "hicom",
            (
                {"keep": 0.4, "weights": random_weights.hicom()},
                {"kernel": (2, 3), "weights": random_weights.hicom()},
            ),
        ),
        PrunerCase("vqtoken", tuple({"keep": keep, "weights": random_weights.vqtoken()} for keep in (0.3, 4))),
        PrunerCase("framefusion", ({"keep": 0.5}, {"keep": 0.8, "similarity": 0.0, "start": 2})),
        # Two stages inside the decoder; the boundary and a stage that removes every visual token.
        PrunerCase("staged", ({}, {"schedule": ((0, 0.5), (1, 0.25), (2, 0.0))}), Staged),
        PrunerCase("compose", ({}, {"first": "pool"}), composed),
    )
}

# Batches of prompts: unequal lengths, no image, one, several, neighbours, image first and last.
BATCHES: dict[str, list[list[Part]]] = {
    "one": [[1, 2, ("image", 0), 3, 4, 5]],
    "three": [[1, ("image", 0), 2, ("image", 1), ("image", 2), 3]],
    "text": [[1, 2, 3, 4]],
    "unequal": [
        [1, 2, ("image", 0), 3, 4, 5],
        [7, 8, 9],
        [("image", 1), 5, ("image", 2), 6, ("image", 0)],
        [4, ("image", 2), 3, 3],
    ],
    "video": [[1, ("video", 0), 2, 3]],
    "image then video": [[1, ("image", 1), 2, ("video", 0), 3]],
    "video then image": [[4, 4, ("video", 1), 2, ("image", 0), 5]],
    "mixed": [
        [("video", 0), 2, ("image", 1), ("image", 2), 3],
        [7, 8, 9],
        [1, ("image", 0), 2, 3, ("video", 1), 5, ("video", 0), 6],
        [4, 4, 4, ("image", 1), 3],
    ],
}


def batches_of(family: FamilyCase) -> dict[str, list[list[Part]]]:
    """The batches that a family can be asked."""
    if family.video_tokens:
        return BATCHES
    return {name: rows for name, rows in BATCHES.items() if name != "mixed" and "video" not in name}


KINDS = ("divprune", "staged", "compose")
"""Boundary, two decoder layers, both: what goes through every family, batch and attention backend."""

CENTRAL = "llava-clip-llama"
"""The family on which every pruner goes through everything."""


_settings: dict[tuple[str, str], list[bool]] = {}


def pruners_of(family: FamilyCase) -> list[str]:
    """The pruners that a family can have."""
    return [name for name in PRUNERS if settings_of(family, name)]


def settings_of(family: FamilyCase, name: str) -> list[bool]:
    """Which settings of a pruner (False easy, True hard) a family gives the signals and the stages for."""
    if (family.name, name) in _settings:
        return _settings[family.name, name]
    usable = _settings[family.name, name] = []
    for hard in (False, True):
        pruner = PRUNERS[name].make(hard)
        _, missing = resolve(pruner.needs, frozenset(SIGNALS) - family.lacks)
        if not missing and all(layer == 0 or layer >= family.earliest for layer in pruner.layers(3)):
            usable.append(hard)
    return usable


def central(family: FamilyCase, name: str) -> bool:
    """Whether a pruner goes through all batches and settings on a family; one of each elsewhere."""
    return family.name == CENTRAL or name in KINDS


def widest(family: FamilyCase) -> str:
    """The batch that has everything in it."""
    return "mixed" if family.video_tokens else "unequal"
