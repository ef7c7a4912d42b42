"""Visual token pruning for Hugging Face vision-language models.

with vlmprune.prune(model, DivPrune(keep=0.1)) as session:
        model.generate(**inputs)
    print(session.last)
"""

# ruff: noqa: F403, F405
from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmprune.contract import Geometry, Item, Keep, Positions, Pruner, Selection, VisualTokens
    from vlmprune.flops import estimate_flops
    from vlmprune.pruners import *
    from vlmprune.registry import create_pruner, list_pruners, register_pruner
    from vlmprune.report import ItemReport, PruneReport, StageReport
    from vlmprune.session import Session, prune, session_of
    from vlmprune.streaming import Stream, StreamReport, stream

__version__ = "0.1.0"

# Loaded on first use: `vlmprune --help` answers without waiting for torch. What is not named here is a method.
_home = {
    name: module
    for module, names in {
        "vlmprune.contract": ("Geometry", "Item", "Keep", "Positions", "Pruner", "Selection", "VisualTokens"),
        "vlmprune.flops": ("estimate_flops",),
        "vlmprune.registry": ("create_pruner", "list_pruners", "register_pruner"),
        "vlmprune.report": ("ItemReport", "PruneReport", "StageReport"),
        "vlmprune.session": ("Session", "prune", "session_of"),
        "vlmprune.streaming": ("Stream", "StreamReport", "stream"),
    }.items()
    for name in names
}

__all__ = [
    "ATP",
    "EVS",
    "YOPO",
    "ATPCalibrated",
    "CDPruner",
    "Compose",
    "CoreMatching",
    "DivPrune",
    "DyCoke",
    "Explain",
    "FastV",
    "FastVID",
    "FirstLayerAttention",
    "FlashVID",
    "FoPru",
    "FrameFusion",
    "FreeVideoLLM",
    "GSearch",
    "Geometry",
    "GlobalCom2",
    "HICom",
    "HIComLocal",
    "HoliTom",
    "Item",
    "ItemReport",
    "KMeansTokens",
    "Keep",
    "MMTok",
    "Merge",
    "MustDrop",
    "PSigmoid",
    "PerFrame",
    "PerTile",
    "PiToMe",
    "Pool",
    "Positions",
    "PruneReport",
    "Pruner",
    "PyramidDrop",
    "QTSplus",
    "QTSplusTrainingFree",
    "Random",
    "Selection",
    "Session",
    "SparseVLM",
    "StageReport",
    "Stream",
    "StreamReport",
    "ToDRE",
    "ToMe",
    "TokenCorrelation",
    "TransPrune",
    "Uniform",
    "VQToken",
    "VidCom2",
    "VisionDrop",
    "VisionZip",
    "VisualTokens",
    "create_pruner",
    "estimate_flops",
    "list_pruners",
    "prune",
    "register_pruner",
    "session_of",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(_home.get(name, "vlmprune.pruners")), name)
    raise AttributeError(f"module 'vlmprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
