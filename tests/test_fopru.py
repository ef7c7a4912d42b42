"""FoPru against the vectors of its third-party code, and the properties of its specification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.contract import Geometry, VisualTokens
from vlmprune.pruners.fopru import FoPru, more_varied, significance

GOLDEN = sorted((Path(__file__).parent / "golden").glob("fopru_*.npz"))


def tokens_of(shapes: list[Geometry], scores: torch.Tensor) -> VisualTokens:
    signals: dict[str, Any] = {"received_attention": scores}
    counts = tuple(map(len, shapes))
    return VisualTokens(
        features=torch.zeros(*scores.shape, 2),
        counts=counts,
        index=tuple(map(torch.arange, counts)),
        shapes=tuple(shapes),
        signal=signals.__getitem__,
    )


def kept_by(pruner: FoPru, shapes: list[Geometry], scores: torch.Tensor) -> list[list[int]]:
    tokens = tokens_of(shapes, scores)
    budget = [count if kept is None else kept for kept, count in zip(pruner.budget(tokens.counts), tokens.counts)]
    index = pruner.select(tokens, torch.tensor(budget)).index
    kept = [sorted(row[row >= 0].tolist()) for row in index]
    assert [int((row >= 0).sum()) for row in index] == [len(set(row)) for row in kept]
    return kept


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    data = np.load(path)
    attention, mode = torch.from_numpy(data["attn"]), path.stem.split("_")[1]
    side = int(attention.shape[1] ** 0.5)
    torch.testing.assert_close(significance(attention), torch.from_numpy(data["significance"]))
    received = attention.mean((0, 1))
    torch.testing.assert_close(received, significance(attention))
    (kept,) = kept_by(FoPru(keep=float(data["ratio"]), mode=mode), [Geometry.grid(side, side)], received[None])
    assert kept == data["keep_idx"].tolist()


def test_significance() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 5)
    whole = logits.softmax(-1)
    torch.testing.assert_close(significance(whole), whole.mean((0, 1)))  # rows of attention all sum to one
    torch.testing.assert_close(significance(logits[[2, 0, 1]]), significance(logits))
    given_more = torch.randn(5, 1).expand(3, 5, 5).contiguous() + 0.01 * logits
    torch.testing.assert_close(significance(given_more), given_more.mean((0, 2)))


def test_logits_choose_the_more_varied_mean_picture_by_picture() -> None:
    generator = torch.Generator().manual_seed(3)
    received, given = torch.randn(2, 9, generator=generator), torch.randn(2, 9, generator=generator)
    received[0] *= 3
    given[1] *= 3
    received[1, 6:], given[1, 6:] = 100.0, 0.0  # padding, which has no say
    tokens = tokens_of([Geometry.grid(3, 3), Geometry.grid(2, 3)], received)
    tables = {"received_logits": received, "given_logits": given}
    tokens.signal = tables.__getitem__
    index = FoPru(keep=0.5, score="logits").select(tokens, torch.tensor([4, 3])).index
    assert sorted(index[0].tolist()) == sorted(received[0].topk(4).indices.tolist())
    assert sorted(index[1, :3].tolist()) == sorted(given[1, :6].topk(3).indices.tolist())
    assert torch.equal(more_varied(given, given), given)
    logits = torch.randn(4, 7, 7, generator=generator)
    torch.testing.assert_close(significance(logits), more_varied(logits.mean((0, 1)), logits.mean((0, 2))))
    flat = torch.ones(2, 4, 4)
    assert significance(torch.stack([flat, flat])).shape == (2, 4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.01, 1), st.integers(0, 2**16))
def test_rank_and_row(rows, cols, keep, seed) -> None:
    torch.manual_seed(seed)
    scores, shape = torch.rand(1, rows * cols), Geometry.grid(rows, cols)
    (best,) = kept_by(FoPru(keep=keep), [shape], scores)
    assert len(best) == max(1, int(rows * cols * keep + 1e-6))
    assert best == sorted(scores[0].argsort(descending=True)[: len(best)].tolist())
    (whole,) = kept_by(FoPru(keep=keep, mode="row"), [shape], scores)
    lines = sorted({i // cols for i in whole})
    assert whole == [line * cols + col for line in lines for col in range(cols)]
    assert len(lines) == max(1, int(rows * keep + 1e-6))
    sums = scores.view(rows, cols).sum(1)
    others = [line for line in range(rows) if line not in lines]
    assert not others or sums[lines].min() >= sums[others].max()


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.floats(0.05, 0.95), st.integers(0, 2**16))
def test_permuting_patches_permutes_the_choice(count, keep, seed) -> None:
    torch.manual_seed(seed)
    scores, shuffle = torch.rand(1, count), torch.randperm(count)
    shape = [Geometry.grid(1, count)]
    (mine,), (its,) = kept_by(FoPru(keep=keep), shape, scores), kept_by(FoPru(keep=keep), shape, scores[:, shuffle])
    assert mine == sorted(shuffle[its].tolist())


def test_pictures_keep_the_same_share_and_line_breaks_go() -> None:
    """A thumbnail of 2 x 2; tiles of 3 x 2 and 3 x 1 side by side, a line break behind each row."""
    shape = Geometry(
        plane=torch.tensor([0] * 4 + [1] * 12),
        row=torch.tensor([0, 0, 1, 1, 0, 0, 0, -1, 1, 1, 1, -1, 2, 2, 2, -1]),
        col=torch.tensor([0, 1, 0, 1, *[0, 1, 2, -1] * 3]),
        grids=((2, 2), (3, 3)),
        pictures=((2, 2), (3, 2), (3, 1)),
        tile=torch.tensor([0] * 4 + [1, 1, 2, -1] * 3),
    )
    scores = torch.arange(16.0)[None]
    (best,) = kept_by(FoPru(keep=0.4), [shape], scores)
    assert best == [2, 3, 9, 12, 13, 14]  # six of sixteen: two, three and one
    (whole,) = kept_by(FoPru(keep=0.7, mode="row"), [shape], scores)
    assert whole == [2, 3, 8, 9, 10, 12, 13, 14]  # one row of two, two of three
    video = Geometry.grid(2, 3, planes=2, suffix=1, kind="video")
    (whole,) = kept_by(FoPru(keep=6, mode="row"), [video], torch.arange(13.0)[None])
    assert whole == [3, 4, 5, 9, 10, 11]


def test_batch_equals_singles() -> None:
    torch.manual_seed(2)
    shapes = [Geometry.grid(3, 4), Geometry.grid(2, 3, planes=3, suffix=1, kind="video"), Geometry.grid(5, 4)]
    scores = torch.rand(3, 20)
    for mode in ("rank", "row"):
        pruner = FoPru(keep=0.55, mode=mode)
        together = kept_by(pruner, shapes, scores)
        for item, shape in enumerate(shapes):
            assert kept_by(pruner, [shape], scores[item : item + 1, : len(shape)]) == [together[item]]


def test_choices() -> None:
    for mode in ("rank", "row"):
        assert FoPru(keep=1.0, mode=mode).budget([25, 9]) == [25, 9]
        assert FoPru(keep=9, mode=mode).budget([9]) == [9]
    assert FoPru(keep=0.5).budget([25]) == [12]
    assert FoPru(keep=0.29).budget([100]) == [29]
    assert FoPru(keep=0.5, mode="row").budget([25, 1]) == [None, 1]
    assert FoPru(score="cls").needs == {"cls_attention"}
    for fields in ({"mode": "column"}, {"score": "auto"}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            FoPru(**fields)
