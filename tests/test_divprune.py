"""The properties that DivPrune's specification asks for, on the pruner itself (golden vectors: tests/kernels)."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmprune

shapes = st.tuples(st.integers(2, 40), st.integers(2, 24), st.integers(0, 2**16))


def tokens_of(features: torch.Tensor) -> vlmprune.VisualTokens:
    count = len(features)
    return vlmprune.VisualTokens(
        features=features[None],
        counts=(count,),
        index=(torch.arange(count),),
        shapes=(vlmprune.Geometry.grid(1, count),),
    )


def order_of(features: torch.Tensor, keep: float | int) -> list[int]:
    pruner = vlmprune.DivPrune(keep=keep)
    budget = torch.tensor(pruner.budget([len(features)]))
    return pruner.select(tokens_of(features), budget).index[0, : int(budget)].tolist()


def random_rows(shape: tuple[int, int, int]) -> torch.Tensor:
    count, width, seed = shape
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def distances(features: torch.Tensor) -> torch.Tensor:
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    return 1 - unit @ unit.T


@settings(max_examples=40, deadline=None)
@given(shapes, st.floats(0.05, 1.0))
def test_as_many_as_asked_all_different(shape, keep) -> None:
    order = order_of(random_rows(shape), keep)
    assert len(order) == round(keep * shape[0]) == len(set(order))
    assert set(order) <= set(range(shape[0]))


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_invariant_to_scaling_and_rotation(shape) -> None:
    rows = random_rows(shape)
    generator = torch.Generator().manual_seed(shape[2] + 1)
    scaled = rows * torch.rand(len(rows), 1, generator=generator).add(0.1).mul(7)
    rotation, _ = torch.linalg.qr(torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64))
    keep = max(1, len(rows) // 3)
    apart = distances(rows)
    for other in (scaled, (rows.double() @ rotation).float()):
        assert_equally_good(apart, order_of(rows, keep), order_of(other, keep))


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_permuting_tokens_permutes_the_choice(shape) -> None:
    rows = random_rows(shape)
    shuffle = torch.randperm(len(rows), generator=torch.Generator().manual_seed(shape[2] + 2))
    keep = max(1, len(rows) // 3)
    back = [int(shuffle[i]) for i in order_of(rows[shuffle], keep)]
    assert_equally_good(distances(rows), order_of(rows, keep), back)


def assert_equally_good(apart: torch.Tensor, mine: list[int], its: list[int]) -> None:
    """The same picks, or, from the first that differs, a tie within fp32."""
    for step, (a, b) in enumerate(zip(mine, its)):
        if a == b:
            continue
        if step == 0:
            others = apart + torch.eye(len(apart)) * 9
            gains = [others[i].min() for i in (a, b)]
        else:
            gains = [apart[i, mine[:step]].min() for i in (a, b)]
        assert abs(gains[0] - gains[1]) < 1e-5
        return


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_every_pick_is_the_farthest_and_the_distances_fall(shape) -> None:
    rows = random_rows(shape)
    order, apart = order_of(rows, len(rows) - 1), distances(rows)
    alone = (apart + torch.eye(len(rows)) * 9).min(1).values
    assert alone[order[0]] >= alone.max() - 1e-5
    gains = []
    for step in range(1, len(order)):
        left = [i for i in range(len(rows)) if i not in order[:step]]
        gain = apart[order[step], order[:step]].min()
        assert gain >= max(apart[i, order[:step]].min() for i in left) - 1e-5
        gains.append(float(gain))
    assert all(after <= before + 1e-5 for before, after in itertools.pairwise(gains))


def test_everything_is_kept_in_any_order_at_one_and_nothing_at_a_tiny_ratio() -> None:
    rows = random_rows((20, 8, 0))
    assert sorted(order_of(rows, 1.0)) == list(range(20))
    assert order_of(rows, 0.02) == []
    assert order_of(rows[:1], 1) == [0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_never_picks_twice(dtype) -> None:
    rows = torch.ones(300, 64) + 1e-3 * random_rows((300, 64, 3))
    order = order_of(rows.to(dtype), 288)
    assert len(set(order)) == 288
