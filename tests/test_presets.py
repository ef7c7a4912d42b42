"""Published settings: every method's table, by one way of asking."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlmprune
from vlmprune.registry import pruner_classes

PRESETS = [
    (name, model, tokens)
    for name, cls in pruner_classes().items()
    for model, budgets in cls.presets.items()
    for tokens in budgets
]
LLAVA = {"llava-1.5": (576, 32), "high": (576, 32), "low": (576, 32), "textvqa": (576, 32), "vizwiz": (576, 32)}
# Named after what an official script counts, or adaptive.
OTHERWISE_CALLED = {"sparsevlm", "mustdrop", "pitome"}


def built(name: str, model: str, tokens: float | None = None, **fields: Any) -> vlmprune.Pruner:
    if name == "cdpruner":
        fields["relevance"] = torch.zeros(1, 576)
    return pruner_classes()[name].preset(model, tokens, **fields)


@pytest.mark.parametrize(("name", "model", "tokens"), PRESETS)
def test_every_preset_is_a_setting_of_the_method(name: str, model: str, tokens: float) -> None:
    pruner = built(name, model, tokens)
    inner = getattr(pruner, "pruner", pruner)
    assert type(inner) is pruner_classes()[name]
    if model in LLAVA and name not in OTHERWISE_CALLED:
        count, depth = LLAVA[model]
        layers = pruner.layers(depth)
        left, total = count, 0
        for layer in range(depth):
            if layer in layers:
                left = pruner.budget([count], layer, depth)[0]
            total += left
        assert abs(total / depth - tokens) < 1, "tokens on average over the layers"


def test_the_first_is_the_default_and_fields_change_it() -> None:
    assert vlmprune.MMTok.preset("llava-1.5") == vlmprune.MMTok(keep=64)
    assert vlmprune.VisionDrop.preset("llava-1.5", average_tokens=32, merge="average").merge == "average"
    assert vlmprune.PyramidDrop.preset("llava-1.5") == vlmprune.PyramidDrop()
    assert vlmprune.FastV.preset("llava-1.5") == vlmprune.FastV()


def test_what_is_not_published_is_an_error_that_says_what_is() -> None:
    with pytest.raises(ValueError, match=r"fastv publishes 'llava-1\.5' with 306, 171, 90, 315: for others use keep="):
        vlmprune.FastV.preset("llava-1.5", average_tokens=100)
    with pytest.raises(ValueError, match="uniform publishes no settings: for others use keep="):
        vlmprune.Uniform.preset("llava-1.5")
