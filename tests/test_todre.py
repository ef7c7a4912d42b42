"""The properties that ToDRE's specification asks for (golden vectors: tests/kernels/test_methods.py)."""

from __future__ import annotations

import pytest
import torch
from cases import BATCHES
from fakes import picks, rows, tokens_of
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws import model_of

import vlmprune
from vlmprune.pruners.todre import todre_select, visual_mass

shapes = st.tuples(st.integers(2, 20), st.integers(0, 2**16))


def order_of(features: torch.Tensor, saliency: torch.Tensor, k: int, objective: str = "maxsum") -> list[int]:
    order = todre_select(features[None], saliency[None], torch.tensor([k]), objective=objective)  # type: ignore
    return order[0].tolist()


@settings(max_examples=40, deadline=None)
@given(shapes, st.sampled_from(["maxsum", "kcenter"]))
def test_greedy_by_its_definition(shape, objective) -> None:
    """k different tokens from the pivot on, each with the smallest sum (or maximum) of cosines; shorter is a prefix."""
    n, seed = shape
    features, saliency = rows(n, 16, seed=seed), rows(n, seed=seed + 1)
    order = order_of(features, saliency, n, objective)
    assert sorted(order) == list(range(n))
    assert order[0] == int(saliency.argmax())
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    cosine = unit @ unit.T
    for step in range(1, n):
        left = [j for j in range(n) if j not in order[:step]]
        close = cosine[:, order[:step]]
        close = close.sum(1) if objective == "maxsum" else close.amax(1)
        assert close[order[step]] <= close[left].min() + 1e-5
    assert order_of(features, saliency, n // 2 + 1, objective) == order[: n // 2 + 1]


def test_scaling_rotation_permutation() -> None:
    features, saliency = rows(40, 16), rows(40, seed=1)
    order = order_of(features, saliency, 12)
    assert order_of(features * rows(40, 1, seed=2).abs().add(0.1), saliency, 12) == order
    rotation, _ = torch.linalg.qr(rows(16, 16, seed=3))
    assert order_of(features @ rotation, saliency, 12) == order
    shuffle = torch.randperm(40, generator=torch.Generator().manual_seed(4))
    assert [int(shuffle[i]) for i in order_of(features[shuffle], saliency[shuffle], 12)] == order


def test_a_copy_of_a_pick_waits_for_all_less_similar_ones() -> None:
    features = torch.cat([torch.eye(8), torch.eye(8)[:1]])
    saliency = torch.arange(9) == 0
    assert order_of(features, saliency.float(), 9)[-1] == 8


def test_the_pivot_is_of_the_thumbnail_or_of_any_frame() -> None:
    """Tiled image: the thumbnail (first among tiles, last among planes); video: any frame; no attention: eccentric."""
    features, attention = rows(12, 8), torch.arange(12.0)[None] + 1
    image = vlmprune.Geometry.grid(2, 3, planes=2)
    tiled = vlmprune.Geometry(**{**vars(image), "tile": image.plane})
    video = vlmprune.Geometry.grid(2, 3, planes=2, kind="video")
    pruner = vlmprune.ToDRE()
    for shape, best in ((image, 11), (tiled, 5), (video, 11)):
        tokens = tokens_of(features, shapes=[shape], cls_attention_last=attention)
        assert int(pruner.select(tokens, torch.tensor([4])).index[0, 0]) == best
    falling = tokens_of(features, shapes=[image], cls_attention_last=attention.flip(1))
    assert int(pruner.select(falling, torch.tensor([4])).index[0, 0]) == 6
    blind = tokens_of(features, shapes=[image], cls_attention_last=None)
    mean = torch.nn.functional.normalize(features, dim=1).mean(0)
    assert int(pruner.select(blind, torch.tensor([4])).index[0, 0]) == int(
        torch.cosine_similarity(features, mean[None]).argmin()
    )


def test_line_breaks_stay_only_when_all_else_does() -> None:
    shape = vlmprune.Geometry.grid(2, 4, suffix=2)
    tokens = tokens_of(rows(10, 8), shapes=[shape], cls_attention_last=torch.arange(10.0)[None])
    assert max(picks(vlmprune.ToDRE().select(tokens, torch.tensor([7])))[0]) < 8
    assert picks(vlmprune.ToDRE().select(tokens, torch.tensor([9])))[0] == [*range(9)]


def test_budgets_and_stages() -> None:
    pruner = vlmprune.ToDRE(keep=0.1)
    assert pruner.layers(32) == (0, 28)
    assert pruner.layers(1) == (0,)
    assert pruner.budget([2880, 5, 0]) == [288, 1, 0]
    assert pruner.budget([2880], 28, 32) == [None]
    assert vlmprune.ToDRE(keep=1.0).budget([100], 28, 32) == [100]
    assert vlmprune.ToDRE(keep=200).budget([100, 300], 28, 32) == [100, None]
    without = vlmprune.ToDRE(tau=0.0)
    assert without.layers(32) == (0,)
    assert "text_attention" not in without.needs
    for fields in ({"tau": -0.1}, {"objective": "sum"}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            vlmprune.ToDRE(**fields)


def test_gate() -> None:
    """alpha_tv is the mean over text rows of their visual mass; below tau all go, else none; without text none."""
    attention = torch.zeros(3, 2, 4)
    attention[0], attention[1, 0] = 0.05, 0.025  # masses 0.2 and 0.2; 0.1 of a single row; none to judge by
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    torch.testing.assert_close(visual_mass(attention, mask), torch.tensor([0.2, 0.1, 1.0]))
    tokens = tokens_of(*(rows(n, 8) for n in (4, 3, 4)), layer=3, depth=4, text_attention=attention, text_mask=mask)
    budget = torch.tensor([4, 3, 4])
    assert picks(vlmprune.ToDRE(tau=0.15).select(tokens, budget)) == [[0, 1, 2, 3], [], [0, 1, 2, 3]]
    assert picks(vlmprune.ToDRE(tau=0.3).select(tokens, budget)) == [[], [], [0, 1, 2, 3]]


def test_gate_in_a_model() -> None:
    """The mass is what eager attention gives; above it the late layers cache text alone, below it nothing changes."""
    family = FAMILIES["llava-clip-llama"]
    model, inputs = model_of(family, "eager"), family.inputs(BATCHES["one"])
    with torch.no_grad(), vlmprune.prune(model, "todre", keep=0.4, tau=0.0) as session:
        maps = model(**inputs, output_attentions=True).attentions
    assert [stage.layer for stage in session.last.items[0].stages] == [0]
    start, kept = session.last.items[0].start, session.last.items[0].tokens_after
    mass = float(maps[1][0].mean(0)[start + kept :, start : start + kept].sum(1).mean())
    for tau, left in ((mass * 1.001, 0), (mass * 0.999, kept)):
        with torch.no_grad(), vlmprune.prune(model, "todre", keep=0.4, tau=tau) as session:
            cache = model(**inputs).past_key_values
        assert session.last.layer_visual_tokens == [10, 10, left]
        assert [layer.keys.shape[2] for layer in cache.layers] == [15, 15, 5 + left]
