"""Visual token pruning for Hugging Face vision-language models.

with vlmprune.prune(model, DivPrune(keep=0.1)) as session:
        model.generate(**inputs)
    print(session.last)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmprune.contract import Geometry, Item, Keep, Positions, Pruner, Selection, VisualTokens
    from vlmprune.flops import estimate_flops
    from vlmprune.pruners import (
        ATP,
        EVS,
        YOPO,
        ATPCalibrated,
        CDPruner,
        Compose,
        CoreMatching,
        DivPrune,
        DyCoke,
        Explain,
        FastV,
        FastVID,
        FirstLayerAttention,
        FlashVID,
        FoPru,
        FrameFusion,
        FreeVideoLLM,
        GlobalCom2,
        GSearch,
        HICom,
        HIComLocal,
        HoliTom,
        KMeansTokens,
        Merge,
        MMTok,
        MustDrop,
        PerFrame,
        PerTile,
        Pool,
        PSigmoid,
        PyramidDrop,
        Random,
        SparseVLM,
        ToDRE,
        TransPrune,
        Uniform,
        VidCom2,
        VisionDrop,
        VisionZip,
        VQToken,
    )
    from vlmprune.registry import create_pruner, list_pruners, register_pruner
    from vlmprune.report import ItemReport, PruneReport, StageReport
    from vlmprune.session import Session, prune

__version__ = "0.1.0"

# Loaded on first use: `vlmprune --help` answers without waiting for torch.
_lazy = {
    "Geometry": "vlmprune.contract",
    "Item": "vlmprune.contract",
    "Keep": "vlmprune.contract",
    "Positions": "vlmprune.contract",
    "Pruner": "vlmprune.contract",
    "Selection": "vlmprune.contract",
    "VisualTokens": "vlmprune.contract",
    "create_pruner": "vlmprune.registry",
    "list_pruners": "vlmprune.registry",
    "register_pruner": "vlmprune.registry",
    "prune": "vlmprune.session",
    "Session": "vlmprune.session",
    "PruneReport": "vlmprune.report",
    "ItemReport": "vlmprune.report",
    "StageReport": "vlmprune.report",
    "estimate_flops": "vlmprune.flops",
    "ATP": "vlmprune.pruners",
    "ATPCalibrated": "vlmprune.pruners",
    "CDPruner": "vlmprune.pruners",
    "Explain": "vlmprune.pruners",
    "FirstLayerAttention": "vlmprune.pruners",
    "YOPO": "vlmprune.pruners",
    "Compose": "vlmprune.pruners",
    "DivPrune": "vlmprune.pruners",
    "VidCom2": "vlmprune.pruners",
    "EVS": "vlmprune.pruners",
    "DyCoke": "vlmprune.pruners",
    "FastV": "vlmprune.pruners",
    "FastVID": "vlmprune.pruners",
    "FlashVID": "vlmprune.pruners",
    "FoPru": "vlmprune.pruners",
    "FrameFusion": "vlmprune.pruners",
    "FreeVideoLLM": "vlmprune.pruners",
    "GlobalCom2": "vlmprune.pruners",
    "HICom": "vlmprune.pruners",
    "HIComLocal": "vlmprune.pruners",
    "HoliTom": "vlmprune.pruners",
    "KMeansTokens": "vlmprune.pruners",
    "MMTok": "vlmprune.pruners",
    "Merge": "vlmprune.pruners",
    "PerFrame": "vlmprune.pruners",
    "PerTile": "vlmprune.pruners",
    "PiToMe": "vlmprune.pruners",
    "Pool": "vlmprune.pruners",
    "PyramidDrop": "vlmprune.pruners",
    "Random": "vlmprune.pruners",
    "PSigmoid": "vlmprune.pruners",
    "GSearch": "vlmprune.pruners",
    "CoreMatching": "vlmprune.pruners",
    "MustDrop": "vlmprune.pruners",
    "SparseVLM": "vlmprune.pruners",
    "ToDRE": "vlmprune.pruners",
    "ToMe": "vlmprune.pruners",
    "TokenCorrelation": "vlmprune.pruners",
    "TransPrune": "vlmprune.pruners",
    "Uniform": "vlmprune.pruners",
    "VQToken": "vlmprune.pruners",
    "VisionDrop": "vlmprune.pruners",
    "VisionZip": "vlmprune.pruners",
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
    "Random",
    "Selection",
    "Session",
    "SparseVLM",
    "StageReport",
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
]


def __getattr__(name: str) -> Any:
    if name in _lazy:
        return getattr(import_module(_lazy[name]), name)
    raise AttributeError(f"module 'vlmprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_lazy])
