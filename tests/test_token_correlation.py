"""Token-correlation compression by its specification's properties; there are no official vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import picks, rows, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmprune
from vlmprune.pruners.token_correlation import TokenCorrelation, correlation_select, density_budget, iqr_outliers


def everything(n: int) -> torch.Tensor:
    return torch.ones(1, n, dtype=torch.bool)


def keep_of(keys: torch.Tensor, attention: torch.Tensor, **options: object) -> list[int]:
    n = len(keys)
    settings_ = {"limit": torch.tensor([n]), **options}
    return correlation_select(keys[None], attention[None], everything(n), **settings_)[0].nonzero().flatten().tolist()  # type: ignore[arg-type]


def test_identical_and_orthogonal_patches() -> None:
    attention = rows(40).abs()
    best = attention.sort(descending=True).indices[:8].sort().values.tolist()
    assert density_budget(torch.ones(1, 40, 6), everything(40)).tolist() == [0]
    assert set(best) <= set(keep_of(torch.ones(40, 6), attention))
    assert keep_of(torch.ones(40, 6), torch.full((40,), 0.5), min_keep=3) == [0, 1, 2]
    assert density_budget(torch.eye(40)[None], everything(40)).tolist() == [40]
    assert keep_of(torch.eye(40), attention) == [*range(40)]


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 30), st.integers(0, 2**16))
def test_density_by_its_definition(n, seed) -> None:
    keys = rows(n, 3, seed=seed)
    unit = torch.nn.functional.normalize(keys.double(), dim=1)
    near = ((unit @ unit.T > 0.7) & ~torch.eye(n, dtype=torch.bool)).sum(1)
    expected = int((near < 0.1 * n).sum())
    for block in (4, 1024):
        assert density_budget(keys[None], everything(n), 0.7, 0.1, block=block).tolist() == [expected]
    padded = torch.cat([keys, torch.full((5, 3), 7.0)])[None]
    mask = torch.arange(n + 5)[None] < n
    assert density_budget(padded, mask, 0.7, 0.1).tolist() == [expected]


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 18), st.integers(0, 2**16))
def test_a_copy_adds_no_more_than_one(n, seed) -> None:
    """While the threshold beta N stays between the same whole numbers."""
    keys = rows(n, 3, seed=seed)
    copied = torch.cat([keys, keys[:1]])
    before = density_budget(keys[None], everything(n), 0.7, 0.05)
    after = density_budget(copied[None], everything(n + 1), 0.7, 0.05)
    assert int(after) <= int(before) + 1


def test_outliers() -> None:
    scores = rows(3, 50).abs()
    scores[1, 7] = 9.0
    low, high = np.quantile(scores.numpy(), [0.25, 0.75], axis=1)
    expected = scores > torch.from_numpy(high + 1.5 * (high - low))[:, None]
    assert torch.equal(iqr_outliers(scores, everything(50).expand(3, -1)), expected)
    assert expected[1, 7]
    assert not iqr_outliers(torch.full((1, 9), 0.1), everything(9)).any()
    half = torch.arange(50)[None] < 25
    assert torch.equal(iqr_outliers(scores[:1], half)[:, :25], iqr_outliers(scores[:1, :25], everything(25)))


def test_outliers_stay_first_and_limits_hold() -> None:
    keys, attention = torch.ones(40, 6), torch.linspace(0.1, 0.2, 40)
    attention[[3, 30]] = torch.tensor([4.0, 3.0])
    assert set(keep_of(keys, attention)) == {3, 30, *range(34, 40)}, "two outliers, eight in all"
    assert keep_of(keys, attention, min_keep=0) == [3, 30]
    assert keep_of(torch.eye(40), attention, limit=torch.tensor([1])) == [3]
    assert keep_of(torch.eye(40), attention, limit=torch.tensor([3])) == [3, 30, 39]
    spared = torch.arange(40)[None] < 10
    assert keep_of(keys, attention, spared=spared, min_keep=0) == [*range(10), 30]


def test_sampling_is_repeatable_and_follows_attention() -> None:
    keys = torch.cat([torch.eye(20), torch.ones(20, 20)])
    attention = torch.full((40,), 1e-6)
    attention[25:] = 0.5
    assert keep_of(keys, attention, seed=1) == keep_of(keys, attention, seed=1)
    assert keep_of(keys, attention, seed=1) != keep_of(keys, attention, seed=2)
    for seed in range(5):
        kept = keep_of(keys, attention, seed=seed)
        assert len(kept) == 20
        assert {*range(25, 40)} <= set(kept), "what is attended to is drawn first"


def test_pruner() -> None:
    """Tiles choose by themselves, the thumbnail stays whole, line breaks go, the limit is the item's."""
    plane = torch.arange(3).repeat_interleave(16)
    shape = vlmprune.Geometry.grid(4, 4, planes=3, suffix=1)
    shape = vlmprune.Geometry(**{**vars(shape), "tile": torch.cat([plane, torch.tensor([-1])])})
    features, keys, attention = rows(49, 4), torch.zeros(49, 48), torch.full((1, 49), 0.1)
    keys[16:32] = 1.0  # tile 1 is blank, tile 2 is full
    keys[32:48] = torch.eye(48)[:16]
    tokens = tokens_of(features, shapes=[shape], encoder_keys=keys[None], cls_attention=attention)
    pruner = TokenCorrelation(min_keep=2)
    assert pruner.budget([49]) == [None]
    assert picks(pruner.select(tokens, torch.tensor([49]))) == [[*range(15), 16, 17, *range(32, 46)]]
    wide = TokenCorrelation(min_keep=2, keep=48)
    assert picks(wide.select(tokens, torch.tensor([49]))) == [[*range(16), 16, 17, *range(32, 48)]]
    assert len(picks(TokenCorrelation(keep=12).select(tokens, torch.tensor([49])))[0]) <= 12
    assert TokenCorrelation(keep=1.0).budget([49]) == [49]
    assert TokenCorrelation(keep=60).budget([49, 80]) == [49, None]
    for fields in ({"beta": 2.0}, {"min_keep": -1}, {"sampling": "all"}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            TokenCorrelation(**fields)
