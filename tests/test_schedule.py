"""Schedules over decoder layers: at any depth, for any average, the published ones among them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.pruners._schedule import check_schedule, layer_average, stage_counts, stage_layers, stage_ratios
from vlmprune.pruners._top import top_indices

# PyramidDrop, TransPrune, FastV: layers, ratios, the average of 576 that their authors report.
PUBLISHED = [
    ((8, 16, 24), (0.5, 0.25, 0.125), [288, 144, 72], 270),
    ((7, 9, 12), (0.875, 0.625, 0.125), [504, 360, 72], 236.25),
    ((2,), (0.5,), [288], 306),
]


@pytest.mark.parametrize(("layers", "ratios", "counts", "average"), PUBLISHED)
def test_the_published_average_gives_the_published_counts(layers, ratios, counts, average) -> None:
    assert stage_counts(576, average / 576, layers, ratios, 32) == counts
    assert layer_average(576, counts, layers, 32) == average
    # Truncated at any count, as published, where the nearest average would round some up.
    assert stage_counts(49, average / 576, layers, ratios, 32) == [int(49 * ratio) for ratio in ratios]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 700), st.floats(0.4, 1.0), st.integers(3, 48), st.sampled_from(PUBLISHED))
def test_the_average_is_the_nearest_there_is(count, keep, depth, published) -> None:
    layers = stage_layers(published[0], depth)
    ratios = stage_ratios(published[0], published[1], depth)
    left = stage_counts(count, keep, layers, ratios, depth)
    assert all(count >= a >= b >= 0 for a, b in zip([count, *left], left))
    error = abs(layer_average(count, left, layers, depth) - keep * count)
    # Counts that change together at one power are the limit: a token in every stage at most.
    assert error <= (depth - layers[0]) / depth + 1e-9


@given(st.integers(1, 700), st.floats(0.35, 0.9))
def test_a_larger_keep_never_keeps_fewer(count, keep) -> None:
    layers, ratios = PUBLISHED[1][:2]
    less, more = (stage_counts(count, k, layers, ratios, 32) for k in (keep, keep + 0.1))
    if abs(keep - 236.25 / 576) > 1e-6 and abs(keep + 0.1 - 236.25 / 576) > 1e-6:
        assert all(a <= b for a, b in zip(less, more))


def test_everything_stays_at_one_and_one_is_a_count_when_it_is_an_int() -> None:
    layers, ratios = PUBLISHED[0][:2]
    assert stage_counts(576, 1.0, layers, ratios, 32) == [576] * 3
    assert stage_counts(10, 10, layers, ratios, 32) == stage_counts(10, 99, layers, ratios, 32) == [10] * 3
    with pytest.raises(ValueError, match=r"keep 1 is out of reach.*average 2\.5 of 10 tokens over 32 layers"):
        stage_counts(10, 1, layers, ratios, 32)
    assert stage_counts(576, 144, layers, ratios, 32) == [0, 0, 0]
    with pytest.raises(ValueError, match="larger keep"):
        stage_counts(576, 0.2, layers, ratios, 32)
    # A stage that keeps all adds to what cannot go.
    with pytest.raises(ValueError, match=r"average 0\.5 of the tokens"):
        stage_counts(576, 0.4, (8, 16), (1.0, 0.5), 32)


def test_layers_scale_with_depth() -> None:
    assert stage_layers((8, 16, 24), 32) == (8, 16, 24)
    assert stage_layers((8, 16, 24), 40) == (10, 20, 30)
    assert stage_layers((8, 16, 24), 28) == (7, 14, 21)
    assert stage_layers((8, 16, 24), 4) == (1, 2, 3)
    assert stage_layers((8, 16, 24), 3) == (1, 2)
    assert stage_ratios((8, 16, 24), (0.5, 0.25, 0.125), 3) == (0.5, 0.125)
    assert stage_layers((7, 9, 12), 4) == (1, 2)
    assert stage_layers((30, 31), 2) == stage_layers((1,), 2) == (1,)
    assert stage_layers((8,), 1) == ()


@pytest.mark.parametrize(
    ("layers", "ratios", "message"),
    [
        ((8, 8), (0.5, 0.5), "ascending"),
        ((), (), "ascending"),
        ((0, 8), (0.5, 0.5), "at least 1"),
        ((8, 16), (0.5,), "one ratio"),
        ((8, 16), (0.5, 0.6), "none above"),
        ((8, 16), (1.5, 0.6), "between 0 and 1"),
    ],
)
def test_bad_schedules(layers, ratios, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_schedule("some method", layers, ratios)


def test_top_indices_ties_and_ragged_budgets() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, -1.0]])
    assert top_indices(scores, torch.tensor([3, 2])).tolist() == [[1, 2, 3], [0, 1, -1]]
