"""EVS, VidCom2 and DyCoke: golden vectors and properties."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import BATCHES
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws import generate, model_of

import vlmprune
from vlmprune.pruners import dycoke, evs, vidcom2

GOLDEN = Path(__file__).parent / "golden"
METHODS = ("evs", "vidcom2", "dycoke")


def video(frames: torch.Tensor) -> vlmprune.VisualTokens:
    count, size, _ = frames.shape
    shape = vlmprune.Geometry.grid(1, size, planes=count, kind="video")
    return vlmprune.VisualTokens(frames.flatten(0, 1)[None], (count * size,), (torch.arange(count * size),), (shape,))


def choose(name: str, frames: torch.Tensor, keep: int, **fields: Any) -> vlmprune.Selection:
    return vlmprune.create_pruner(name, keep=keep, **fields).select(video(frames), torch.tensor([keep]))


def test_evs_counts() -> None:
    for size, frames, rate, count in np.load(GOLDEN / "evs_mask.npz")["count_table"]:
        assert evs.published_count(int(frames), int(size), float(rate)) == int(count)


@pytest.mark.parametrize("case", range(4))
def test_evs_masks(case: int) -> None:
    data = np.load(GOLDEN / "evs_mask.npz")
    frames, height, width = data[f"m{case}_thw"]
    size = height * width // data[f"m{case}_merge"] ** 2
    rows = torch.from_numpy(data[f"m{case}_embeds"]).view(frames, size, -1)
    keep = evs.published_count(int(frames), int(size), float(data[f"m{case}_q"]))
    kept = choose("evs", rows, keep).index[0].sort().values
    assert kept.tolist() == np.flatnonzero(data[f"m{case}_mask"]).tolist()


def test_evs_ties_go_to_the_lower_index() -> None:
    mask = np.load(GOLDEN / "evs_mask.npz")["ties_mask_T4_h2_w3_q05"]
    kept = choose("evs", torch.ones(4, 6, 5), int(mask.sum())).index[0].sort().values
    assert kept.tolist() == np.flatnonzero(mask).tolist()


def test_vidcom2_scores_and_counts() -> None:
    data = np.load(GOLDEN / "video_reducers.npz")
    frames = torch.from_numpy(data["video"])
    by_video, by_frame = vidcom2.likeness(frames)
    np.testing.assert_allclose(by_video, data["vidcom2_vid_score"], atol=1e-4)
    np.testing.assert_allclose(by_frame, data["vidcom2_frame_score"], atol=1e-4)
    np.testing.assert_allclose(vidcom2.frame_scales(by_video, 0.25), data["vidcom2_scales_b25"], atol=1e-4)
    for base, name in ((0.25, "vidcom2_b25_indices"), (0.15, "vidcom2_b15_indices")):
        size = frames.shape[1]
        each = (vidcom2.frame_scales(by_video, base) * size).round().long().clamp(min=1)
        score = by_video + by_frame
        kept = [t * size + p for t, k in enumerate(each.tolist()) for p in score[t].argsort(stable=True)[:k].tolist()]
        assert sorted(kept) == sorted(data[name].tolist())


@pytest.mark.parametrize(("share", "name"), [(0.3, "dycoke_k3_indices"), (0.7, "dycoke_k7_indices")])
def test_dycoke_choice(share: float, name: str) -> None:
    """As the official code but for the last window, whose third frame that leaves whole."""
    data = np.load(GOLDEN / "video_reducers.npz")
    frames = torch.from_numpy(data["video"])
    mask = dycoke.changed(frames, int((1 - share) * frames.shape[1]))
    official = torch.zeros(mask.numel(), dtype=torch.bool)
    official[torch.from_numpy(data[name])] = True
    official = official.view_as(mask)
    assert torch.equal(mask[:6], official[:6])
    assert official[6].all()
    assert int(mask[6].sum()) == int((1 - share) * frames.shape[1])
    assert torch.equal(mask[7], official[7])


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 9), size=st.integers(1, 12), share=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_as_many_as_announced(name: str, count: int, size: int, share: float, seed: int) -> None:
    """Different indices inside the video, exactly the budget, whatever the shape; odd frame counts too."""
    keep = max(1, round(share * count * size))
    if name == "dycoke":
        keep = max(keep, -(-count // 4) * size)
    frames = torch.randn(count, size, 7, generator=torch.Generator().manual_seed(seed))
    index = choose(name, frames, keep).index[0].tolist()
    assert len(set(index)) == len(index) == keep
    assert 0 <= min(index) <= max(index) < count * size


def test_evs_keeps_the_first_frame_and_what_changed() -> None:
    frames = torch.randn(1, 8, 5).expand(5, -1, -1).clone()
    frames[3, 2], frames[4, 2] = -frames[3, 2], -frames[4, 2]
    assert choose("evs", frames, 9).index[0].sort().values.tolist() == [*range(8), 3 * 8 + 2]
    scaled = frames * torch.rand(5, 8, 1).add(0.1)
    assert torch.equal(choose("evs", scaled, 9).index.sort().values, choose("evs", frames, 9).index.sort().values)


def test_vidcom2_gives_every_frame_a_token_and_odd_ones_more() -> None:
    torch.manual_seed(0)
    frames = torch.randn(1, 16, 24).expand(6, -1, -1) + 0.05 * torch.randn(6, 16, 24)
    frames[4] = torch.randn(16, 24)
    kept = choose("vidcom2", frames, 24).index[0] // 16
    counts = torch.bincount(kept, minlength=6)
    assert counts.min() >= 1
    assert counts.argmax() == 4


@pytest.mark.parametrize("wanted", [[5.0, 1.0, 0.2], [9.0, 9.0, 9.0], [0.1, 0.1, 0.1], [100.0, 0.0, 0.0]])
@pytest.mark.parametrize("total", [2, 3, 10, 29, 30])
def test_reconciled_counts(wanted: list[float], total: int) -> None:
    counts = vidcom2.reconciled(torch.tensor(wanted), total, 10)
    assert int(counts.sum()) == total
    assert int(counts.max()) <= 10
    assert int(counts.min()) >= (total >= 3)


def test_dycoke_says_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"every fourth frame whole.*at least 0\.25"):
        choose("dycoke", torch.randn(8, 4, 3), 7)
    with pytest.raises(ValueError, match="drop"):
        vlmprune.DyCoke(drop=1.0)


def test_dycoke_empties_the_cache() -> None:
    """From `layer` on, the cache holds a share of the visual tokens; before, all that passed the boundary."""
    family = FAMILIES["llava-onevision"]
    model, inputs = model_of(family), family.inputs(BATCHES["video"])
    with vlmprune.prune(model, "dycoke", keep=0.8, layer=1, drop=0.5) as session:
        out = generate(model, inputs)
    (item,) = session.last.items
    after = len(item.kept)
    assert sorted(item.cached) == [1, 2]
    assert all(len(held) == int(after * 0.5) for held in item.cached.values())
    lengths = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
    assert lengths[0] - lengths[1] == after - int(after * 0.5) == lengths[0] - lengths[2]


def test_order_of_videos_does_not_matter() -> None:
    torch.manual_seed(3)
    one, two = torch.randn(4, 6, 5), torch.randn(4, 6, 5)
    shape = vlmprune.Geometry.grid(1, 6, planes=4, kind="video")
    for name in METHODS:
        pruner = vlmprune.create_pruner(name, keep=12)
        kept = []
        for pair in ((one, two), (two, one)):
            rows = torch.stack([each.flatten(0, 1) for each in pair])
            tokens = vlmprune.VisualTokens(rows, (24, 24), (torch.arange(24),) * 2, (shape,) * 2)
            kept.append(pruner.select(tokens, torch.tensor([12, 12])).index.sort().values)
        assert torch.equal(kept[0], kept[1].flip(0))
