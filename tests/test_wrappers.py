"""Merge, PerTile and PerFrame around methods of every kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from fakes import picks, rows, tokens_of

import vlmprune
from vlmprune.contract import SIGNALS, Geometry
from vlmprune.pruners._grid import shares

# A thumbnail of 2 x 2, and a picture of 2 x 4 from two tiles, its rows broken by a line break.
THUMBNAIL = Geometry.grid(2, 2)
TILED = Geometry(
    plane=torch.tensor([0] * 4 + [1] * 10),
    row=torch.cat([THUMBNAIL.row, torch.tensor([0, 0, 0, 0, -1, 1, 1, 1, 1, -1])]),
    col=torch.cat([THUMBNAIL.col, torch.tensor([0, 1, 2, 3, -1, 0, 1, 2, 3, -1])]),
    grids=((2, 2), (2, 4)),
    pictures=((2, 2),) * 3,
    tile=torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, -1, 1, 1, 2, 2, -1]),
    sources=torch.tensor([0, 1, 2, 3, 4, 5, 8, 9, -1, 6, 7, 10, 11, -1])[:, None],
)
TILES = [[0, 1, 2, 3], [4, 5, 9, 10], [6, 7, 11, 12]]
VIDEO = Geometry.grid(2, 3, planes=3, kind="video")


@dataclass(kw_only=True)
class Longest(vlmprune.Pruner):
    """Keeps the rows longer than `least` and records what it is shown."""

    least: float = 2.5
    asked: Any = None

    name: ClassVar[str] = "longest"
    needs: ClassVar[frozenset[str]] = frozenset(SIGNALS) - {"encoder_kept"}

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 1) -> Sequence[int | None]:
        return [None] * len(counts)

    def select(self, tokens: vlmprune.VisualTokens, budget: torch.Tensor) -> vlmprune.Selection:
        self.asked = (tokens, budget)
        long = tokens.valid & (tokens.features.norm(dim=-1) > self.least)
        return vlmprune.Selection(torch.arange(long.shape[1]).expand_as(long).masked_fill(~long, -1))


def inside(pruner: vlmprune.Pruner, tokens: vlmprune.VisualTokens, *keeps: int) -> vlmprune.Selection:
    return pruner.select(tokens, torch.tensor(keeps))


def test_a_wrapper_is_what_it_holds() -> None:
    inner = vlmprune.MMTok(keep=0.2)
    for kind in (vlmprune.Merge, vlmprune.PerTile, vlmprune.PerFrame):
        wrapped = kind(inner)
        assert (wrapped.keep, wrapped.positions, wrapped.needs) == (0.2, "compact", inner.needs)
        assert wrapped.query_aware
        assert wrapped.budget([100, 7]) == inner.budget([100, 7])
        changed = replace(wrapped, keep=0.5, positions="original")
        assert changed.pruner == replace(inner, keep=0.5, positions="original")
        assert inner.keep == 0.2
        assert kind(inner, keep=1.0).pruner.keep == 1.0
        with pytest.raises(ValueError, match=r"takes a pruner.*'mmtok'"):
            kind("mmtok")  # type: ignore[arg-type]
    fastv = vlmprune.PerTile(vlmprune.FastV(keep=0.6, layer=1))
    assert fastv.layers(4) == (1,)
    assert fastv.budget([100], 1, 4) == fastv.pruner.budget([100], 1, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_the_mean_over_the_nearest(dtype: torch.dtype) -> None:
    features = [rows(20, 6).to(dtype), rows(12, 6, seed=1).to(dtype)]
    tokens, inner = tokens_of(*features), vlmprune.DivPrune()
    choice, mine = inside(inner, tokens, 5, 3), inside(vlmprune.Merge(inner), tokens, 5, 3)
    assert torch.equal(choice.index, mine.index)
    assert mine.features is not None
    assert mine.merged is not None
    for item, each in enumerate(features):
        kept = [int(i) for i in choice.index[item] if i >= 0]
        unit = torch.nn.functional.normalize(each.double(), dim=1)
        nearest = (unit @ unit[kept].T).argmax(1).tolist()
        for slot, token in enumerate(kept):
            members = [i for i in range(len(each)) if i == token or (i not in kept and nearest[i] == slot)]
            expected = each[members].float().mean(0).to(dtype)
            torch.testing.assert_close(mine.features[item, slot], expected)
            assert bool(mine.merged[item, slot]) == (len(members) > 1)


def test_merge_leaves_line_breaks_alone() -> None:
    shape = Geometry.grid(2, 3, suffix=2)
    features = rows(8, 6)
    tokens = tokens_of(features, shapes=[shape])
    mine = inside(vlmprune.Merge(vlmprune.MMTok()), fake(tokens), 4)
    members = features[:6].sum(0)
    # Every placed token is in exactly one group: the groups' sums add up to theirs.
    unit = torch.nn.functional.normalize(features, dim=1)
    groups = (unit[:6] @ unit[mine.index[0]].T).argmax(1)
    weight = torch.bincount(groups, minlength=4).float()
    torch.testing.assert_close((mine.features[0] * weight[:, None]).sum(0), members)  # type: ignore[index]


def fake(tokens: vlmprune.VisualTokens) -> vlmprune.VisualTokens:
    """With the signals of MMTok and CDPruner, aligned with the tokens."""
    items, count, _ = tokens.features.shape
    tables = {
        "encoder_features": rows(items, count, 5, seed=11) * tokens.valid[..., None],
        "instruction": rows(items, 3, tokens.features.shape[-1], seed=12),
        "instruction_mask": torch.ones(items, 3, dtype=torch.bool),
    }
    return replace(tokens, signal=tables.__getitem__)


def test_merge_of_all_or_nothing_and_of_a_method_that_merges() -> None:
    tokens = tokens_of(rows(9, 6) * torch.linspace(0.1, 3, 9)[:, None])
    mine = inside(vlmprune.Merge(Longest(least=100.0)), tokens, 9)
    assert picks(mine) == [[]]
    with pytest.raises(ValueError, match="without Merge"):
        inside(vlmprune.Merge(vlmprune.Pool()), tokens, 3)
    with pytest.raises(ValueError, match="without Merge"):
        vlmprune.Merge(vlmprune.create_pruner("tome"))


def test_stages_inside_the_tower_are_the_inner_methods() -> None:
    inner = vlmprune.create_pruner("tome", keep=0.5)
    wrapped = vlmprune.PerTile(inner)
    assert wrapped.encoder_layers(24) == inner.encoder_layers(24) != ()
    assert wrapped.proportional == inner.proportional


def test_a_scope_refuses_methods_that_cut_the_cache() -> None:
    class Cutting(Longest):
        def cache_layers(self, depth: int) -> tuple[int, ...]:
            return (depth - 1,)

    assert vlmprune.Merge(Cutting()).cache_layers(4) == (3,)
    with pytest.raises(ValueError, match="without per_tile"):
        vlmprune.PerTile(Cutting()).cache_layers(4)


def test_gradients_pass_a_merge() -> None:
    features = rows(12, 6).requires_grad_()
    mine = inside(vlmprune.Merge(vlmprune.DivPrune()), tokens_of(features), 4)
    assert mine.features is not None
    (mine.features**2).sum().backward()
    assert (features.grad.abs().sum(1) > 0).all()  # type: ignore[union-attr]


@pytest.mark.parametrize("method", [vlmprune.MMTok(), vlmprune.CDPruner(), vlmprune.DivPrune(), vlmprune.Uniform()])
def test_each_tile_chooses_by_itself(method: vlmprune.Pruner) -> None:
    features, other = rows(14, 8), rows(9, 8, seed=5)
    tokens = fake(tokens_of(features, other, shapes=[TILED, Geometry.grid(3, 3)]))
    index = inside(vlmprune.PerTile(method), tokens, 7, 4).index
    expected = []
    for tile, keep in zip(TILES, (3, 2, 2)):
        alone = tokens_of(features[tile], shapes=[Geometry.grid(2, 2)])
        signals = {name: tokens.signal(name)[:1] for name in ("instruction", "instruction_mask")}
        signals["encoder_features"] = tokens.signal("encoder_features")[:1, tile]
        (kept,) = picks(inside(method, replace(alone, signal=signals.__getitem__), keep))
        expected += [tile[i] for i in kept]
    assert sorted(index[0].tolist()) == sorted(expected)
    whole = tokens_of(other, shapes=[Geometry.grid(3, 3)])
    signals = {name: tokens.signal(name)[1:] for name in ("instruction", "instruction_mask")}
    signals["encoder_features"] = tokens.signal("encoder_features")[1:, :9]
    assert (
        sorted(i for i in index[1].tolist() if i >= 0)
        == picks(inside(method, replace(whole, signal=signals.__getitem__), 4))[0]
    )


def test_budgets_are_shared_by_size_and_line_breaks_come_last() -> None:
    tokens = tokens_of(rows(14, 8), shapes=[TILED])
    pruner = vlmprune.PerTile(vlmprune.DivPrune())
    for keep in range(1, 14):
        (kept,) = picks(inside(pruner, tokens, keep))
        each = [len(set(tile) & set(kept)) for tile in TILES]
        assert len(kept) == keep
        assert max(each) - min(each) <= 1
        assert sum(each) == min(keep, 12)
    assert shares(torch.tensor([4, 8, 0]), 5).tolist() == [2, 3, 0]


def test_frames_of_a_video_choose_by_themselves_and_an_image_is_one() -> None:
    features = rows(18, 8)
    video, image = tokens_of(features, shapes=[VIDEO]), tokens_of(features[:14], shapes=[TILED])
    pruner = vlmprune.PerFrame(vlmprune.DivPrune())
    (kept,) = picks(inside(pruner, video, 6))
    alone = [picks(inside(pruner.pruner, tokens_of(features[i : i + 6]), 2))[0] for i in (0, 6, 12)]
    assert kept == [6 * frame + i for frame, chosen in enumerate(alone) for i in chosen]
    (kept,) = picks(inside(pruner, image, 5))
    places = [i for tile in TILES for i in tile]
    places.sort()
    assert kept == [places[i] for i in picks(inside(pruner.pruner, tokens_of(features[places]), 5))[0]]


@pytest.mark.parametrize("method", [vlmprune.Pool(), vlmprune.Merge(vlmprune.DivPrune())])
def test_methods_that_merge(method: vlmprune.Pruner) -> None:
    features = rows(18, 8)
    mine = inside(vlmprune.PerFrame(method), tokens_of(features, features[:6], shapes=[VIDEO, THUMB_3]), 7, 6)
    assert mine.features is not None
    assert mine.merged is not None
    assert picks(mine)[1] == [*range(6)], "an item of which all stay"
    for index, row in zip(mine.index[1], mine.features[1]):
        if index >= 0:
            assert torch.equal(row, features[index])
    assert not mine.merged[1].any()
    for frame, keep in enumerate((3, 2, 2)):
        part = features[6 * frame : 6 * frame + 6]
        alone = inside(method, tokens_of(part, shapes=[Geometry.grid(2, 3)]), keep)
        assert alone.features is not None
        for index, row in zip(alone.index[0].tolist(), alone.features[0]):
            at = mine.index[0].tolist().index(6 * frame + index)
            torch.testing.assert_close(mine.features[0, at], row)


THUMB_3 = Geometry.grid(2, 3, kind="video")


def test_adaptive_methods_and_all_signals_behind_the_boundary() -> None:
    """Some tokens are gone already: the parts hold what is left, numbered within them, with signals to match."""
    index = torch.tensor([0, 2, 3, 5, 6, 7, 8, 9, 12, 13])
    features = rows(10, 4) * torch.linspace(0.5, 3, 10)[:, None]
    table = rows(1, 10, 4, seed=1)
    signals: dict[str, Any] = dict.fromkeys(SIGNALS, table)
    signals |= {"instruction": rows(1, 2, 4), "instruction_mask": torch.ones(1, 2, dtype=torch.bool)}
    signals |= {"prompt_features": rows(1, 14, 4), "text_features": rows(1, 3, 4), "cls_features": rows(1, 3, 4)}
    signals |= {"cls_keys": rows(1, 3, 4), "text_attention": rows(1, 3, 10), "next_text_attention": rows(1, 3, 10)}
    tokens = tokens_of(features, shapes=[TILED], index=[index], layer=2, **signals)
    inner = Longest()
    mine = inside(vlmprune.PerTile(inner), tokens, 10)
    long = [i for i in range(10) if float(features[i].norm()) > 2.5]
    assert picks(mine)[0] == sorted({*long, 6, 9}), "line breaks are in no part: they stay"
    given, budget = inner.asked
    members = [[0, 1, 2], [3, 7], [4, 5, 8]]
    assert given.counts == (3, 2, 3)
    assert budget.tolist() == [3, 2, 3]
    assert [each.tolist() for each in given.index] == [[0, 2, 3], [1, 2], [0, 1, 3]]
    for part, (those, tile) in enumerate(zip(members, TILES)):
        assert torch.equal(given.features[part, : len(those)], features[those])
        for name in SIGNALS:
            mine_, its = given.signal(name)[part], signals[name][0]
            if name != "instruction_keys" and name.startswith(("instruction", "text_features", "text_mask")):
                assert torch.equal(mine_, its)
            elif name.startswith("cls_") and "attention" not in name and "logits" not in name:
                assert torch.equal(mine_, its[part : part + 1])
            elif name == "prompt_features":
                assert torch.equal(mine_, its[tile])
            elif name.endswith("text_attention"):
                assert torch.equal(mine_[:, : len(those)], its[:, those])
            else:
                assert torch.equal(mine_[: len(those)], its[those])
        shape = given.shapes[part]
        assert (shape.grids, shape.pictures, shape.tile) == (((2, 2),), ((2, 2),), None)
        assert shape.row.tolist() == [0, 0, 1, 1]
        assert shape.col.tolist() == [0, 1, 0, 1]
        assert shape.sources is not None
        assert shape.sources.flatten().tolist() == [0, 1, 2, 3]
        assert len(given.geometry[part]) == len(those)


def test_wrappers_by_name() -> None:
    made = vlmprune.create_pruner("merge(divprune)", keep=0.3, positions="original")
    assert made == vlmprune.Merge(vlmprune.DivPrune(keep=0.3, positions="original"))
    nested = vlmprune.create_pruner("per_tile(merge(cdpruner))", keep=0.2)
    assert nested == vlmprune.PerTile(vlmprune.Merge(vlmprune.CDPruner(keep=0.2)))
    with pytest.raises(ValueError, match=r"unknown wrapper 'fold': known are merge, per_tile, per_frame"):
        vlmprune.create_pruner("fold(divprune)")
    with pytest.raises(ValueError, match=r"unknown pruner 'divprun': did you mean 'divprune'"):
        vlmprune.create_pruner("merge(divprun)")
    with pytest.raises(ValueError, match=r"'divprune' has no field 'seed'"):
        vlmprune.create_pruner("merge(divprune)", seed=1)
