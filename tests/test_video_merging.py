"""FastVID, FlashVID and HoliTom: golden vectors and properties."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmprune
from vlmprune.pruners import _segments, fastvid, flashvid, holitom

SCENES = np.load(Path(__file__).parent / "golden" / "flashvid_fastvid.npz")
WINDOWS = np.load(Path(__file__).parent / "golden" / "video_reducers.npz")
METHODS = ("fastvid", "flashvid", "holitom")


def video(frames: torch.Tensor, attention: torch.Tensor | None = None) -> vlmprune.VisualTokens:
    count, size, _ = frames.shape
    rows = frames.flatten(0, 1)[None]
    if attention is None:
        attention = torch.rand(count, size, generator=torch.Generator().manual_seed(1))
    return vlmprune.VisualTokens(
        rows,
        (count * size,),
        (torch.arange(count * size),),
        (vlmprune.Geometry.grid(1, size, planes=count, kind="video"),),
        signal=lambda name: {_segments.ATTENTION: attention}[name].flatten()[None],
    )


def choose(name: str, frames: torch.Tensor, keep: int, attention: torch.Tensor | None = None, **fields: Any) -> Any:
    """Indices, ascending, and the rows there."""
    selection = vlmprune.create_pruner(name, **fields).select(video(frames, attention), torch.tensor([keep]))
    index, order = selection.index[0].sort()
    rows = frames.flatten(0, 1)[index] if selection.features is None else selection.features[0, order]
    return index, rows


def golden(case: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    tensors = (torch.from_numpy(SCENES[f"c{case}_{name}"]) for name in ("video", "attn"))
    return *tensors, float(SCENES[f"c{case}_ratio"])


@pytest.mark.parametrize("case", range(3))
def test_scenes(case: int) -> None:
    frames, _, _ = golden(case)
    for least, found in (("fast_c", "fast_segments"), ("min_segments", "flash_segments")):
        lengths = torch.bincount(_segments.scenes(frames, 0.9, int(SCENES[f"c{case}_{least}"])))
        assert lengths.tolist() == SCENES[f"c{case}_{found}"].tolist()


def test_as_many_scenes_as_frames_at_most() -> None:
    assert _segments.scenes(torch.ones(3, 2, 4), 0.9, 8).tolist() == [0, 1, 2]
    assert _segments.scenes(torch.ones(3, 2, 4), 0.9, 1).tolist() == [0, 0, 0]
    assert _segments.scenes(torch.ones(1, 2, 4), 0.9, 8).tolist() == [0]


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8), data=st.data())
def test_apportioned_counts(sizes: list[int], data: Any) -> None:
    """As many as asked for in every group, none above its size, each at least one where there are enough."""
    group = sorted(data.draw(st.lists(st.integers(0, 2), min_size=len(sizes), max_size=len(sizes))))
    group = [sorted(set(group)).index(each) for each in group]
    members = [[size for size, its in zip(sizes, group) if its == number] for number in range(max(group) + 1)]
    totals = [data.draw(st.integers(0, sum(each))) for each in members]
    wanted = torch.tensor([totals[its] for its in group])
    counts = _segments.apportion(torch.tensor(sizes), wanted, torch.tensor(group)).tolist()
    for number, (each, total) in enumerate(zip(members, totals)):
        mine = [count for count, its in zip(counts, group) if its == number]
        assert sum(mine) == total
        assert all(0 <= count <= size for count, size in zip(mine, each))
        if total >= sum(size > 0 for size in each):
            assert all(count > 0 for count, size in zip(mine, each) if size)


def test_clusters() -> None:
    """Two heaps and a row that does not count: the centres are one of each, and everybody joins its own heap's."""
    rows = torch.tensor([[0.0, 0.1, 0.2, 9.0, 9.2, 9.4, 4.0]])[..., None]
    mask = torch.tensor([[True] * 6 + [False]])
    centre, into = _segments.clusters(rows, mask, torch.tensor([2]), neighbours=3)
    assert centre[0].nonzero().flatten().tolist() == [1, 4]
    assert into[0].tolist() == [1, 1, 1, 4, 4, 4, 6]


@pytest.mark.parametrize("case", range(3))
def test_fastvid(case: int) -> None:
    """As the parallel official code, whose sequence has three rows in front, two behind and loses remainders."""
    frames, attention, ratio = golden(case)
    count, size, _ = frames.shape
    least = int(SCENES[f"c{case}_fast_c"])
    official = torch.from_numpy(SCENES[f"c{case}_fast_keep"])[3:-2] - 3
    late = int(int(size * ratio) * 0.4)
    kept = _segments.top_of_each(attention, torch.ones_like(attention).bool(), int(size * ratio) - late)
    scene = _segments.scenes(frames, 0.9, least)
    anchors = fastvid.anchors_of(frames, ~kept, scene, late, 4)
    assert torch.equal((kept | anchors).flatten().nonzero().flatten(), official)
    rows = fastvid.folded(frames, ~kept, anchors, scene, 4, 0.6).flatten(0, 1)[official]
    np.testing.assert_allclose(rows, SCENES[f"c{case}_fast_tokens"][3:-2], atol=1e-5)

    index, rows = choose("fastvid", frames, count * int(size * ratio), attention, least_scenes=least)
    assert set(index.tolist()) >= set(official.tolist())
    missing = len(index) - len(official)
    assert 0 <= missing < count
    if not missing:
        np.testing.assert_allclose(rows, SCENES[f"c{case}_fast_tokens"][3:-2], atol=1e-5)


@pytest.mark.parametrize("case", range(3))
def test_flashvid_picks(case: int) -> None:
    """ADTS without and with events, on |video| as one scene."""
    frames, attention, _ = golden(case)
    most = int(SCENES[f"c{case}_adts_k"])
    counts = torch.full((len(frames),), most)
    events = flashvid.eventfulness(frames.abs(), torch.zeros(len(frames), dtype=torch.int64))
    for rows, weight, name in ((frames, attention, "v1"), (frames.abs(), attention * events, "v2_pos_video_abs")):
        picked = flashvid.diverse(rows, weight, counts, most)
        official = torch.from_numpy(SCENES[f"c{case}_adts_{name}"])
        assert torch.equal(picked, torch.zeros_like(picked).scatter(1, official, True))


@pytest.mark.parametrize("case", range(3))
def test_flashvid_trees(case: int) -> None:
    frames, _, _ = golden(case)
    count, size, _ = frames.shape
    left = torch.ones(count, size).bool().scatter(1, torch.from_numpy(SCENES[f"c{case}_tstm_sel"]), False)
    scene, most = torch.zeros(count, dtype=torch.int64), torch.full((count,), size - 4)
    root = flashvid.trees(frames, left, scene, 0.8, most)
    rows, members = (x[0] for x in _segments.means(frames.flatten(0, 1)[None], root.view(1, -1)))
    kept = (members > 0) & left.flatten()
    assert kept.nonzero().flatten().tolist() == SCENES[f"c{case}_tstm_flat_index"].tolist()
    np.testing.assert_allclose(rows[kept], SCENES[f"c{case}_tstm_tokens_mean"], atol=1e-4)
    assert members.sum() == count * size
    whole = (rows * members[:, None]).sum(0)
    torch.testing.assert_close(whole, frames.sum((0, 1)), atol=1e-3, rtol=1e-4)


def test_flashvid_leaves_a_scene_its_budget() -> None:
    """A still video has more links than the budget leaves room for; ties at the raised threshold do not link."""
    torch.manual_seed(0)
    frames = torch.randn(1, 6, 4).expand(5, -1, -1) + 0.01 * torch.randn(5, 6, 4)
    left, scene = torch.ones(5, 6).bool(), torch.tensor([0, 0, 0, 1, 1])
    for most in ([0, 0, 0, 3, 4], [6, 5, 4, 3, 2], [6, 6, 6, 6, 6]):
        root = flashvid.trees(frames, left, scene, 0.8, torch.tensor(most))
        kept = (root == torch.arange(30).view(5, 6)).sum(1)
        assert kept[:3].sum() >= 18 - sum(most[:3])
        assert kept[3:].sum() >= 12 - sum(most[3:])
        assert torch.equal(root[3:] // 6 >= 3, torch.ones(2, 6).bool())


def test_flashvid_picks_no_token_twice() -> None:
    """Weights of zero, and products with the scene that are negative, leave nothing to tell candidates apart by."""
    frames = -torch.rand(2, 20, 6, generator=torch.Generator().manual_seed(0)) + 0.5
    for weight in (torch.zeros(2, 20), flashvid.eventfulness(frames, torch.tensor([0, 1]))):
        assert (weight >= 0).all()
        assert flashvid.diverse(frames, weight, torch.tensor([20, 7]), 20).sum(1).tolist() == [20, 7]


def test_flashvid_conserves_weight() -> None:
    """What ADTS leaves is all in the clusters, in proportion: the sum over the video stays."""
    torch.manual_seed(0)
    frames = torch.randn(1, 12, 6).expand(4, -1, -1) + 0.3 * torch.randn(4, 12, 6)
    index, rows = choose("flashvid", frames, 4, selected=0.0, least_scenes=1, threshold=-1.0)
    assert len(index) == 4
    whole = frames.flatten(0, 1)
    nearest = torch.linalg.lstsq(rows.T, whole.sum(0)).solution
    torch.testing.assert_close(nearest @ rows, whole.sum(0), atol=1e-3, rtol=1e-3)
    assert nearest.sum() == pytest.approx(48, abs=1e-2)


@pytest.mark.parametrize(("keep", "depth"), [(0.1, 28), (0.25, 28), (0.95, 28), (1.0, 28), (0.3, 4), (20, 28)])
def test_flashvid_keeps_the_average(keep: float, depth: int) -> None:
    pruner = vlmprune.FlashVID(keep=keep)
    first, last = pruner.layers(depth)
    left = [pruner.budget([6272], layer, depth)[0] for layer in (first, last)]
    average = (left[0] * last + left[1] * (depth - last)) / depth
    assert average == pytest.approx(keep if isinstance(keep, int) else keep * 6272, abs=1)
    if depth == 28 and keep == 0.25:
        assert left == [1960, 588]  # 1.25 * 0.25 of 6272, and 30 % of that


@pytest.mark.parametrize(
    ("threshold", "longest", "name"), [(0.8, 1024, "tau8"), (0.6, 1024, "tau6"), (0.6, 3, "tau6_max3")]
)
def test_holitom_windows(threshold: float, longest: int, name: str) -> None:
    frames = torch.from_numpy(WINDOWS["video"])
    still = holitom.runs(torch.cosine_similarity(frames[1:], frames[:-1], dim=-1) > threshold)
    begin, reduced = holitom.windows(still, longest)
    starts = sorted(set(begin.tolist()))
    ends = [*(start - 1 for start in starts[1:]), len(frames) - 1]
    assert [list(pair) for pair in zip(starts, ends)] == WINDOWS[f"holitom_windows_{name}"].tolist()
    assert int(reduced) == int(WINDOWS[f"holitom_reduced_{name}"])


@settings(max_examples=30, deadline=None)
@given(static=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=0, max_size=6))
def test_holitom_windows_are_the_best(static: list[list[bool]]) -> None:
    """Against every way to cut the video."""
    still = holitom.runs(torch.tensor(static, dtype=torch.bool).view(-1, 3))
    count = len(static) + 1
    gains = []
    for cuts in range(2 ** (count - 1)):
        bounds = [0, *(at for at in range(1, count) if cuts >> (at - 1) & 1), count]
        pairs = list(pairwise(bounds))
        gains.append(
            sum((e - s - 1) * sum(all(static[t][p] for t in range(s, e - 1)) for p in range(3)) for s, e in pairs)
        )
    begin, reduced = holitom.windows(still)
    assert int(reduced) == max(gains)
    assert (begin.diff() >= 0).all()


def test_holitom_averages_what_stands_still() -> None:
    """Two places that stand still in noise and one that does not: budget for all of the latter and two means."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.eye(3, 8).expand(4, -1, -1) + 0.05 * torch.randn(4, 3, 8, generator=generator)
    frames[:, 2] = torch.eye(8)[2:6]
    index, rows = choose("holitom", frames, 6)
    assert index.tolist() == [0, 1, 2, 5, 8, 11]
    torch.testing.assert_close(rows[:2], frames[:, :2].mean(0))
    assert torch.equal(rows[2:], frames[:, 2])
    index, rows = choose("holitom", frames, 5)  # 2 of 6 groups stand still, and clusters have their share
    assert len(index) == 5
    index, rows = choose("holitom", frames, 8)  # two static tokens come back as they are
    assert len(set(index.tolist()) - {0, 1, 2, 5, 8, 11}) == 2
    back = torch.tensor([number for number, each in enumerate(index.tolist()) if each % 3 < 2 and each > 2])
    assert torch.equal(rows[back], frames.flatten(0, 1)[index[back]])


def test_holitom_clusters_static_places() -> None:
    """beta of the centre, the others' mean for the rest."""
    frames = torch.tensor([[1.0, 0.1], [1.0, 0.2], [1.0, 0.3]]).expand(2, -1, -1)
    index, rows = choose("holitom", frames, 1, beta=0.6)
    place = int(index)
    others = frames[0][[each for each in range(3) if each != place]].mean(0)
    torch.testing.assert_close(rows[0], 0.6 * frames[0, place] + 0.4 * others)


def test_holitom_merges_inside_the_decoder() -> None:
    """What leaves goes into the kept token nearest to it, all members at once."""
    rows = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.1], [3.0, 0.0]]])
    attention = torch.tensor([[0.9, 0.8, 0.1, 0.2]])
    tokens = vlmprune.VisualTokens(
        rows, (4,), (torch.arange(4),), (vlmprune.Geometry.grid(2, 2),), layer=18, depth=28, signal=lambda _: attention
    )
    selection = vlmprune.HoliTom().select(tokens, torch.tensor([2]))
    assert selection.index.tolist() == [[0, 1]]
    torch.testing.assert_close(selection.features, torch.tensor([[[2.0, 0.1 / 3], [0.0, 1.0]]]))


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 9), size=st.integers(1, 12), share=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_as_many_as_announced(name: str, count: int, size: int, share: float, seed: int) -> None:
    """Different indices inside the video, exactly the budget, whatever the shape; odd frame counts and images too."""
    keep = max(1, round(share * count * size))
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randn(1, size, 7, generator=generator) + 0.5 * torch.randn(count, size, 7, generator=generator)
    index, rows = choose(name, frames, keep)
    assert len(set(index.tolist())) == len(index) == keep
    assert 0 <= int(index.min()) <= int(index.max()) < count * size
    assert rows.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("keep", [1, 5, 11])
def test_a_constant_video_stays_constant(name: str, count: int, keep: int) -> None:
    token = torch.randn(5, generator=torch.Generator().manual_seed(0))
    _, rows = choose(name, token.expand(count, 12, -1), keep)
    torch.testing.assert_close(rows, token.expand(keep, -1))


@pytest.mark.parametrize("name", METHODS)
def test_order_of_videos_does_not_matter(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    rows, attention = torch.randn(2, 24, 5, generator=generator), torch.rand(2, 24, generator=generator)
    shape = vlmprune.Geometry.grid(1, 6, planes=4, kind="video")
    found = []
    for order in ([0, 1], [1, 0]):
        signal = attention[order]
        tokens = vlmprune.VisualTokens(
            rows[order], (24, 24), (torch.arange(24),) * 2, (shape,) * 2, signal=lambda _, given=signal: given
        )
        found.append(vlmprune.create_pruner(name).select(tokens, torch.tensor([12, 12])))
    assert torch.equal(found[0].index, found[1].index.flip(0))
    assert torch.equal(found[0].features, found[1].features.flip(0))


@pytest.mark.parametrize("name", METHODS)
def test_gradients_pass_to_what_is_merged(name: str) -> None:
    torch.manual_seed(0)
    frames = torch.randn(1, 8, 6).expand(5, -1, -1) + 0.1 * torch.randn(5, 8, 6)
    frames.requires_grad_(True)
    _, rows = choose(name, frames, 25, **({} if name == "holitom" else {"least_scenes": 1}))
    rows.square().sum().backward()
    assert (frames.grad.abs().sum(-1) > 0).sum() > 25


def test_presets_and_bad_fields() -> None:
    for fields in ({"every": 0}, {"merged": 1.5}, {"beta": -1.0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            vlmprune.create_pruner("fastvid", **fields)
    with pytest.raises(ValueError, match=r"publishes 'llava' with 0\.1; 'qwen2\.5-vl' with 0\.27"):
        fastvid.FastVID.preset("gpt")
    for fields in ({"selected": 2.0}, {"least_scenes": 0}, {"layer": 28}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            vlmprune.create_pruner("flashvid", **fields)
    with pytest.raises(ValueError, match="publishes"):
        flashvid.FlashVID.preset("gpt")
    assert flashvid.FlashVID.preset("qwen3-vl").layers(36) == (0, 28)
    for fields in ({"inner": 2.0}, {"layer": 0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            vlmprune.create_pruner("holitom", **fields)
    with pytest.raises(ValueError, match="publishes"):
        holitom.HoliTom.preset("llava", 0.5)
    assert holitom.HoliTom.preset("llava", 0.1).budget([1000], 0, 28) == [100]
    assert fastvid.FastVID.preset("qwen2.5-vl", keep=0.1) == fastvid.FastVID(keep=0.1, threshold=0.84)


def test_every_frame_has_a_token() -> None:
    """FastVID: as long as the budget has one salient token for each."""
    index, _ = choose("fastvid", torch.randn(6, 10, 4, generator=torch.Generator().manual_seed(0)), 12)
    assert set((index // 10).tolist()) == set(range(6))
