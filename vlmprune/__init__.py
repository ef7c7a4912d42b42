"""Visual token pruning for Hugging Face vision-language models.

    with vlmprune.prune(model, DivPrune(keep=0.1)) as session:
        model.generate(**inputs)
    print(session.last)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlmprune.contract import Geometry, Item, Keep, Positions, Pruner, Selection, VisualTokens
from vlmprune.registry import create_pruner, list_pruners, register_pruner

if TYPE_CHECKING:
    from vlmprune.flops import estimate_flops
    from vlmprune.pruners import DivPrune, Pool, Random, Uniform
    from vlmprune.report import ItemReport, PruneReport, StageReport
    from vlmprune.session import Session, prune

__version__ = "0.1.0"

# Loaded on first use, so that `import vlmprune` stays light.
_lazy = {
    "prune": "vlmprune.session",
    "Session": "vlmprune.session",
    "PruneReport": "vlmprune.report",
    "ItemReport": "vlmprune.report",
    "StageReport": "vlmprune.report",
    "estimate_flops": "vlmprune.flops",
    "DivPrune": "vlmprune.pruners",
    "Pool": "vlmprune.pruners",
    "Random": "vlmprune.pruners",
    "Uniform": "vlmprune.pruners",
}

__all__ = [
    "DivPrune",
    "Geometry",
    "Item",
    "ItemReport",
    "Keep",
    "Pool",
    "Positions",
    "PruneReport",
    "Pruner",
    "Random",
    "Selection",
    "Session",
    "StageReport",
    "Uniform",
    "VisualTokens",
    "create_pruner",
    "estimate_flops",
    "list_pruners",
    "prune",
    "register_pruner",
]


def __getattr__(name: str) -> Any:
    if name in _lazy:
        return getattr(import_module(_lazy[name]), name)
    raise AttributeError(f"module 'vlmprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_lazy])
