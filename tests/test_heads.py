"""Methods that read the decoder's attention: heads have no order, and shared keys count as if repeated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import BATCHES
from families import FAMILIES
from test_laws import model_of

import vlmprune

LLAVA = FAMILIES["llava-clip-llama"]
METHODS: dict[str, dict[str, Any]] = {
    "fastv": {"keep": 0.5, "layer": 1},
    "pyramiddrop": {"keep": 0.5},
    "sparsevlm": {"keep": 0.5},
    "transprune": {"keep": 0.5},
    "visiondrop": {"keep": 0.3},
    "first_layer_attention": {"keep": 0.3},
    "atp-calibrated": {"keep": 0.5},
    "psigmoid": {"keep": 0.8},
}


def kept(model: Any, name: str) -> list[list[int]]:
    with torch.no_grad(), vlmprune.prune(model, name, **METHODS[name]) as session:
        model(**LLAVA.inputs(BATCHES["unequal"]))
    return [stage.kept.tolist() for item in session.last.items for stage in item.stages]


@pytest.fixture(scope="module")
def expanded() -> Any:
    """The same model with a key head for every query head."""
    model = copy.deepcopy(model_of(LLAVA))
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        groups, size = attention.num_key_value_groups, attention.head_dim
        assert groups > 1
        for projection in (attention.k_proj, attention.v_proj):
            weight = projection.weight.data.view(-1, size, projection.in_features)
            projection.weight.data = weight.repeat_interleave(groups, 0).flatten(0, 1)
        attention.num_key_value_groups = 1
    text = model.config.get_text_config()
    text.num_key_value_heads = text.num_attention_heads
    return model


@pytest.fixture(scope="module")
def shuffled(expanded: Any) -> Any:
    """That with its heads in another order."""
    model = copy.deepcopy(expanded)
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        size = attention.head_dim
        order = torch.randperm(attention.q_proj.out_features // size, generator=torch.Generator().manual_seed(1))
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            weight = projection.weight.data.view(-1, size, projection.in_features)
            projection.weight.data = weight[order].flatten(0, 1)
        out = attention.o_proj
        out.weight.data = out.weight.data.view(out.out_features, -1, size)[:, order].flatten(1)
    return model


@pytest.mark.parametrize("name", METHODS)
def test_repeated_keys_and_the_order_of_heads_change_nothing(name: str, expanded: Any, shuffled: Any) -> None:
    plain = kept(model_of(LLAVA), name)
    assert kept(expanded, name) == plain
    assert kept(shuffled, name) == plain
