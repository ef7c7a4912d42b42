"""Fixed budgets are selected without waiting for the GPU: on meta tensors, where looking at a value raises."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import random_weights
import torch
from test_globalcom2 import packed

import vlmprune
from vlmprune.contract import Geometry, VisualTokens
from vlmprune.pruners.hicom import HIComModules
from vlmprune.pruners.vqtoken import VQAttention

SHAPES = [packed(4, (2, 2), (600, 500)), Geometry.grid(5, 5), Geometry.grid(2, 3, planes=3, suffix=1, kind="video")]


def tokens_on_meta(layer: int) -> VisualTokens:
    counts = tuple(map(len, SHAPES))
    items, n, pictures = len(SHAPES), max(counts), max(len(shape.pictures) for shape in SHAPES)
    wide = {"projector_inputs": 8, "encoder_features": 8, "encoder_keys": 4, "next_keys": 4}
    flat = (
        "cls_attention",
        "received_attention",
        "cls_attention_last",
        "cls_logits_last",
        "next_visual_attention",
        "last_attention",
    )
    signals = {
        "cls_features": torch.empty(items, pictures, 8, device="meta"),
        **{name: torch.empty(items, n, width, device="meta") for name, width in wide.items()},
        **{name: torch.empty(items, n, device="meta") for name in flat},
        "instruction": torch.empty(items, 5, 6, device="meta"),
        "instruction_mask": torch.empty(items, 5, dtype=torch.bool, device="meta"),
        "instruction_queries": torch.empty(items, 5, 2, 3, device="meta"),
        "instruction_keys": torch.empty(items, n, 1, 3, device="meta"),
    }
    return VisualTokens(
        features=torch.empty(items, n, 6, device="meta"),
        counts=counts,
        index=tuple(torch.arange(count, device="meta") for count in counts),
        shapes=tuple(SHAPES),
        layer=layer,
        depth=32,
        signal=lambda need: signals[need.rstrip("?").split("|")[0]],
        project=lambda rows: rows[..., :6],
    )


WRAPPED = {
    "merge": lambda **fields: vlmprune.Merge(vlmprune.MMTok(**fields)),
    "per_tile": lambda **fields: vlmprune.PerTile(vlmprune.Merge(vlmprune.CDPruner(**fields))),
    "per_frame": lambda **fields: vlmprune.PerFrame(vlmprune.ToDRE(**fields)),
}


@pytest.mark.parametrize(
    ("name", "fields", "layer"),
    [
        ("visionzip", {}, 0),
        ("visionzip", {"keep_cls": False, "contextual": 0}, 0),
        ("visiondrop", {}, 0),
        ("visiondrop", {"merge": "average"}, 8),
        ("globalcom2", {}, 0),
        ("globalcom2", {"score": "cosine"}, 0),
        ("fopru", {}, 0),
        ("mmtok", {}, 0),
        ("cdpruner", {}, 0),
        ("cdpruner", {"relevance_norm": "per_crop", "theta": 0.5}, 0),
        ("todre", {}, 0),
        ("todre", {"objective": "kcenter"}, 0),
        ("fastvid", {}, 0),
        ("flashvid", {}, 0),
        ("flashvid", {}, 23),
        ("holitom", {}, 0),
        ("holitom", {}, 21),
        ("hicom_local", {}, 0),
        ("hicom_local", {"scale": 2.0}, 0),
        ("kmeans_tokens", {}, 0),
        ("hicom", {"weights": HIComModules(6, width=8, heads=2)}, 0),
        ("vqtoken", {"weights": VQAttention(6, width=8, heads=2)}, 0),
        ("qtsplus", {"weights": random_weights.qtsplus(6, 2, 32)}, 0),
        ("qtsplus-training-free", {}, 0),
        ("merge", {}, 0),
        ("per_tile", {}, 0),
        ("per_frame", {}, 0),
    ],
)
def test_select_on_meta_tensors(name: str, fields: dict[str, Any], layer: int) -> None:
    make = WRAPPED.get(name) or functools.partial(vlmprune.create_pruner, name)
    pruner, tokens = make(keep=0.4, **fields), tokens_on_meta(layer)
    budget = pruner.budget(tokens.counts, layer, 32)
    selection = pruner.select(tokens, torch.tensor(budget))
    assert selection.index.shape == (len(SHAPES), max(budget))
    assert selection.features is None or selection.features.shape == (*selection.index.shape, 6)
