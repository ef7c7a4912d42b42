"""YOPO's layer cut."""

from __future__ import annotations

import pytest
import torch
from cases import BATCHES
from families import FAMILIES
from test_laws import model_of

import vlmprune


def test_published_layer() -> None:
    assert vlmprune.YOPO().layers(32) == (20,)
    assert vlmprune.YOPO(keep=1 / 32).layers(32) == (1,)
    assert vlmprune.YOPO(keep=0.99).layers(32) == (31,)


def test_later_layers_see_text_alone_and_keep_is_the_average() -> None:
    family = FAMILIES["llava-clip-llama"]
    model, inputs = model_of(family), family.inputs(BATCHES["one"])
    for keep, layers in ((1 / 3, 1), (2 / 3, 2)):
        with torch.no_grad(), vlmprune.prune(model, "yopo", keep=keep) as session:
            model(**inputs)
        assert session.last.layer_visual_tokens == [25] * layers + [0] * (3 - layers)
        assert session.last.average_keep == pytest.approx(keep)


def test_keep_is_a_ratio() -> None:
    for keep in (20, "flops:0.5"):
        with pytest.raises(ValueError, match="keep of yopo is a ratio"):
            vlmprune.YOPO(keep=keep)


def test_less_than_the_first_layer_alone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"yopo cannot keep 0.01 on average.*alone averages 0\.0312"):
        vlmprune.YOPO(keep=0.01).layers(32)
    with pytest.raises(ValueError, match=r"cannot keep 0.3 on average.*averages 0\.333; use a larger keep"):
        vlmprune.prune(model_of(FAMILIES["llava-clip-llama"]), "yopo", keep=0.3)
