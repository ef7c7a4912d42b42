"""GlobalCom2 against its official vectors, and the properties that its specification asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws import model_of
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

import vlmprune
from vlmprune.contract import Geometry, VisualTokens
from vlmprune.pruners.globalcom2 import GlobalCom2, _View, crop_ratios, holistic_scores, regions, tile_grid

GOLDEN = sorted((Path(__file__).parent / "golden").glob("globalcom2_*.npz"))


def packed(side: int, grid: tuple[int, int], size: tuple[int, int]) -> Geometry:
    """Thumbnail, then tiles (rows, columns) without the padding of an image (width, height), a line break a row."""
    down, across = grid
    row, col = torch.meshgrid(torch.arange(down * side), torch.arange(across * side), indexing="ij")
    tile = 1 + row // side * across + col // side
    height, width = tile.shape
    if size[0] / size[1] > width / height:
        pad = (height - int(size[1] * (width / size[0]))) // 2
        tile = tile[pad : height - pad]
    else:
        pad = (width - int(size[0] * (height / size[1]))) // 2
        tile = tile[:, pad : width - pad]
    rows, cols = tile.shape
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(cols + 1))
    broken = place[:, 1] == cols
    thumbnail = Geometry.grid(side, side)
    return Geometry(
        plane=torch.cat([thumbnail.plane, torch.ones(len(place), dtype=torch.int64)]),
        row=torch.cat([thumbnail.row, place[:, 0].masked_fill(broken, -1)]),
        col=torch.cat([thumbnail.col, place[:, 1].masked_fill(broken, -1)]),
        grids=((side, side), (rows, cols)),
        pictures=((side, side),) * (1 + down * across),
        tile=torch.cat([thumbnail.plane, torch.nn.functional.pad(tile, (0, 1), value=-1).flatten()]),
    )


def tokens_of(shapes: list[Geometry], signals: dict[str, Any]) -> VisualTokens:
    counts = tuple(map(len, shapes))
    return VisualTokens(
        features=torch.zeros(len(shapes), max(counts), 2),
        counts=counts,
        index=tuple(map(torch.arange, counts)),
        shapes=tuple(shapes),
        signal=lambda need: signals.get(need.rstrip("?")) if need.endswith("?") else signals[need],
    )


def kept_by(pruner: GlobalCom2, tokens: VisualTokens) -> list[list[int]]:
    budget = [count if kept is None else kept for kept, count in zip(pruner.budget(tokens.counts), tokens.counts)]
    index = pruner.select(tokens, torch.tensor(budget)).index
    kept = [sorted(row[row >= 0].tolist()) for row in index]
    assert all(len(set(row)) == len(row) for row in kept)
    return kept


def noise(count: int, seed: int, items: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "cls_logits_last": torch.randn(items, count, generator=generator),
        "encoder_features": torch.randn(items, count, 6, generator=generator),
    }


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    data = np.load(path)
    side, ratio, grid = int(data["side"]), float(data["ratio"]), (int(data["grid_h"]), int(data["grid_w"]))
    shape = packed(side, grid, (int(data["orig_w"]), int(data["orig_h"])))
    assert tile_grid(shape) == grid
    # The crops' tokens in the order of the plane; where each stands in its own crop.
    inside = []
    scores = torch.zeros(len(shape))
    everything = torch.from_numpy(data["cls_scores"])
    pads = [(grid[0] * side - shape.grids[1][0]) // 2, (grid[1] * side - shape.grids[1][1]) // 2]
    for token, (tile, row, col) in enumerate(zip(shape.tile, shape.row, shape.col)):
        y, x = (row, col) if tile == 0 else ((row + pads[0]) % side, (col + pads[1]) % side)
        inside.append(int(y * side + x))
        if row >= 0:
            scores[token] = everything[tile, inside[-1]]

    view = _View(shape, scores.device)
    overview = scores[view.thumbnail]
    np.testing.assert_allclose(crop_ratios(view.region_sums(overview), ratio), data["scales"], atol=1e-12)
    general = view.resized(overview)
    for crop in range(len(data["scales"])):
        np.testing.assert_allclose(general[shape.tile == 1 + crop], data[f"crop{crop}_global"], atol=1e-5)

    (kept,) = kept_by(GlobalCom2(keep=ratio, exact_budget=False), tokens_of([shape], {"cls_logits_last": scores[None]}))
    mine = [(int(shape.tile[i]), inside[i]) for i in kept]
    thumbnail = [at for tile, at in mine if tile == 0]
    assert thumbnail == sorted(data["thumb_idx"].tolist())
    theirs = [(crop, at) for crop, at in data["seq_true"].tolist() if crop > 0]
    assert [(tile, at) for tile, at in mine if tile > 0] == theirs
    assert sum(tile < 0 for tile, _ in mine) == shape.grids[1][0]
    by_preset = GlobalCom2.preset("llava-next", average_tokens=ratio)
    assert kept_by(by_preset, tokens_of([shape], {"cls_logits_last": scores[None]})) == [kept]


def test_published_shares() -> None:
    peaked = torch.tensor([1000.0, 0, 0, 0])
    assert int(576 * crop_ratios(peaked, 0.25)[0]) == 251  # not 252: the authors' 1e-8
    assert crop_ratios(torch.full((6,), -3.0), 0.25).tolist() == [0.25] * 6
    # Behind the softmax all sums are below 1, and 10 levels them.
    softened = crop_ratios(torch.tensor([0.6, 0.1, 0.1, 0.2]), 0.25)
    assert (softened - 0.25).abs().max() < 0.011


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-80, 80), min_size=1, max_size=9), st.floats(0.01, 1), st.floats(-50, 50))
def test_crop_ratios(sums, ratio, shift) -> None:
    sums = torch.tensor(sums)
    shares = crop_ratios(sums, ratio)
    assert (shares >= 0).all()
    assert (shares <= 1).all()
    if (shares < 1).all():
        assert abs(float(shares.mean()) - ratio) < 1e-6
    order = sums.argsort()
    assert (shares[order].diff() >= 0).all()
    torch.testing.assert_close(crop_ratios(sums + shift, ratio), shares, atol=1e-4, rtol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 13), st.integers(1, 13), st.integers(1, 4), st.integers(1, 4))
def test_regions(rows, cols, down, across) -> None:
    of = regions((rows, cols), (down, across)).view(rows, cols)
    for row in range(rows):
        for col in range(cols):
            y = min(row // max(rows // down, 1), down - 1)
            x = min(col // max(cols // across, 1), across - 1)
            assert of[row, col] == y * across + x


grids = st.tuples(
    st.sampled_from([(1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (2, 3)]), st.integers(2, 6), st.floats(0.75, 1.33)
)


def geometry_of(case) -> Geometry:
    (down, across), side, stretch = case
    return packed(side, (down, across), (round(600 * across * stretch), 600 * down))


@settings(max_examples=60, deadline=None)
@given(grids, st.integers(0, 2**16), st.floats(0.02, 0.98), st.sampled_from(["keep", "drop"]))
def test_exactly_the_budget(case, seed, keep, newline) -> None:
    shape = geometry_of(case)
    assert tile_grid(shape) == case[0]
    tokens = tokens_of([shape], noise(len(shape), seed))
    pruner = GlobalCom2(keep=keep, newline=newline)
    if round(keep * len(shape)) == 0:
        return
    (kept,) = kept_by(pruner, tokens)
    assert len(kept) == round(keep * len(shape))
    breaks, all_breaks = int(shape.placeless[kept].sum()), int(shape.placeless.sum())
    shown = len(kept) - breaks
    if newline == "keep" and 2 * all_breaks <= len(kept):
        assert breaks == all_breaks
    else:
        assert breaks == max(0, len(kept) - (len(shape) - all_breaks))
    area = case[1] ** 2
    assert abs(int((shape.tile[kept] == 0).sum()) - shown * area / (len(shape) - all_breaks)) <= 0.5


@settings(max_examples=40, deadline=None)
@given(grids, st.integers(0, 2**16), st.floats(0.1, 0.9))
def test_as_published(case, seed, keep) -> None:
    shape = geometry_of(case)
    signals = noise(len(shape), seed)
    tokens = tokens_of([shape], signals)
    assert GlobalCom2(keep=keep, exact_budget=False).budget([len(shape)]) == [None]
    counts = {}
    for newline in ("keep", "nonempty", "drop"):
        (kept,) = kept_by(GlobalCom2(keep=keep, exact_budget=False, newline=newline), tokens)
        counts[newline] = set(kept)
    view = _View(shape, torch.device("cpu"))
    scores = signals["cls_logits_last"][0]
    shares = crop_ratios(view.region_sums(scores[view.thumbnail]), keep)
    shown = counts["drop"]
    for picture in range(len(shape.pictures)):
        size = int((shape.tile == picture).sum())
        share = keep if picture == 0 else float(shares[picture - 1])
        mine = [i for i in shown if shape.tile[i] == picture]
        assert len(mine) == int(size * share + 1e-9)
        if picture == 0:
            best = scores[shape.tile == 0].argsort(descending=True)[: len(mine)]
            assert sorted(mine) == sorted(best.tolist())
    breaks = shape.placeless.nonzero().flatten().tolist()
    assert counts["keep"] == shown | set(breaks)
    assert counts["nonempty"] == shown | {
        end for end in breaks if any(start in shown for start in range(end - shape.grids[1][1], end))
    }


def test_crops_follow_their_shares() -> None:
    """A thumbnail that points at one corner gives that crop more, and the crop's own scores then rank within it."""
    shape = packed(8, (2, 2), (600, 600))
    scores = torch.zeros(len(shape))
    scores[:64].view(8, 8)[:4, :4] = 2.0
    torch.manual_seed(0)
    scores[64:] = torch.rand(len(shape) - 64)
    tokens = tokens_of([shape], {"cls_logits_last": scores[None]})
    for exact in (True, False):
        (kept,) = kept_by(GlobalCom2(keep=0.3, exact_budget=exact, newline="drop"), tokens)
        sizes = torch.bincount(shape.tile[kept], minlength=5)[1:]
        assert sizes[0] > sizes[1] == sizes[2] == sizes[3]
    # A thumbnail that says nothing leaves the crop's own ranking.
    scores[:64] = 1.0
    (kept,) = kept_by(GlobalCom2(keep=0.3, exact_budget=False, newline="drop"), tokens)
    for crop in range(1, 5):
        mine = [i for i in kept if shape.tile[i] == crop]
        own = (shape.tile == crop).nonzero().flatten()
        assert mine == own[scores[own].argsort(descending=True)[: len(mine)]].sort().values.tolist()


def test_holistic_scores() -> None:
    torch.manual_seed(1)
    local, general = torch.randn(2, 10)
    members = torch.tensor([[1] * 6 + [0] * 4, [0] * 6 + [1] * 4]).bool()
    scores = holistic_scores(local, general, members)
    for crop in (slice(0, 6), slice(6, 10)):
        both = torch.nn.functional.normalize(local[crop], dim=0) + torch.nn.functional.normalize(general[crop], dim=0)
        torch.testing.assert_close(scores[crop], both / 2)
    louder = local.clone()
    louder[:6] *= 7
    torch.testing.assert_close(holistic_scores(louder, general, members), scores)
    torch.testing.assert_close(holistic_scores(local, 0 * general, members)[:6].argsort(), local[:6].argsort())
    assert holistic_scores(local, general, members, alpha=1)[:6].argsort().tolist() == general[:6].argsort().tolist()


def test_without_thumbnail() -> None:
    # One picture: its best. With a line break, and without CLS.
    signals = noise(13, 2)
    (kept,) = kept_by(GlobalCom2(keep=5), tokens_of([Geometry.grid(3, 4, suffix=1)], signals))
    best = signals["cls_logits_last"][0, :12].argsort(descending=True)[:4].tolist()
    assert kept == sorted([*best, 12])
    rows = signals["encoder_features"][0, :12]
    alike = torch.nn.functional.cosine_similarity(rows, rows.mean(0), dim=-1)
    for pruner, without in (
        (GlobalCom2(keep=4, newline="drop"), True),
        (GlobalCom2(keep=4, score="cosine", newline="drop"), False),
    ):
        given_ = {**signals, "cls_logits_last": None} if without else signals
        (kept,) = kept_by(pruner, tokens_of([Geometry.grid(3, 4, suffix=1)], given_))
        assert kept == sorted(alike.argsort()[:4].tolist())
    # Frames: the one unlike the others keeps more.
    torch.manual_seed(3)
    frames = torch.randn(1, 6).repeat(48, 1) + 0.1 * torch.randn(48, 6)
    frames[16:32] += 4 * torch.randn(16, 6)
    signals = {"encoder_features": frames[None], "cls_logits_last": None}
    for exact in (True, False):
        pruner = GlobalCom2(keep=0.25, exact_budget=exact)
        (kept,) = kept_by(pruner, tokens_of([Geometry.grid(4, 4, planes=3, kind="video")], signals))
        sizes = torch.tensor(kept).div(16, rounding_mode="floor").bincount(minlength=3)
        assert sizes[1] > max(sizes[0], sizes[2])


def test_batch_equals_singles() -> None:
    shapes = [packed(4, (2, 2), (600, 500)), Geometry.grid(5, 5), packed(3, (1, 3), (1000, 200))]
    longest = max(map(len, shapes))
    signals = noise(longest, 4, items=3)
    for exact in (True, False):
        together = kept_by(GlobalCom2(keep=0.4, exact_budget=exact), tokens_of(shapes, signals))
        for item, shape in enumerate(shapes):
            alone = {name: signal[item : item + 1, : len(shape)] for name, signal in signals.items()}
            assert kept_by(GlobalCom2(keep=0.4, exact_budget=exact), tokens_of([shape], alone)) == [together[item]]


def test_everything_is_kept_at_one_and_bad_choices_say_so() -> None:
    for exact in (True, False):
        assert GlobalCom2(keep=1.0, exact_budget=exact).budget([100, 7]) == [100, 7]
    assert GlobalCom2(score="softmax").needs == {"cls_attention_last", "encoder_features"}
    assert GlobalCom2(score="cosine").needs == {"encoder_features"}
    for fields in ({"temperature": 0}, {"alpha": 2}, {"score": "raw"}, {"newline": "some"}, {"newline": "nonempty"}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            GlobalCom2(**fields)
    with pytest.raises(ValueError, match="use keep="):
        GlobalCom2.preset("llava-next", average_tokens=0.3)


@pytest.mark.parametrize("name", ["llava-next", "llava-onevision"])
def test_on_a_model(name: str) -> None:
    """Tiles lie as the model lays them, and the published rule's counts hold for the adapter's geometry."""
    family = FAMILIES[name]
    model, inputs = model_of(family), family.inputs([[1, ("image", number), 2] for number in range(3)])
    pruner = GlobalCom2(keep=0.4, exact_budget=False, newline="drop")
    with torch.no_grad(), vlmprune.prune(model, pruner) as session:
        model(**inputs)
    for item, size in zip(session.last.items, family.sizes):
        shape = item.geometry
        grid = get_anyres_image_grid_shape(size, model.config.image_grid_pinpoints, 16)
        assert tile_grid(shape) == tuple(grid)
        picture = shape.tile[item.kept]
        assert int((picture == 0).sum()) == int(16 * 0.4)
        assert not (picture < 0).any()
        kept, sizes = (
            torch.bincount(tiles[tiles > 0], minlength=len(shape.pictures))[1:] for tiles in (picture, shape.tile)
        )
        assert (kept <= sizes).all()
        assert int(sizes.sum() * 0.4 * (1 - 1 / len(sizes))) - len(sizes) <= int(kept.sum()) < int(sizes.sum())
