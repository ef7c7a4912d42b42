"""HICom: its windows, pooling by the question, and the stand-in without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import BATCHES
from fakes import rows, tokens_of
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws import Recorded, generate, model_of

import vlmprune
from vlmprune import Geometry
from vlmprune.pruners import hicom
from vlmprune.pruners._windows import Windows, axis_windows

GOLDEN = np.load(Path(__file__).parent / "golden" / "hicom_local.npz")
sides = st.integers(1, 9)


def video(frames: int, height: int, width: int, **fields: Any) -> Geometry:
    return Geometry.grid(height, width, planes=frames, kind="video", **fields)


def asked(*features: torch.Tensor, shapes: list[Geometry], guide: torch.Tensor | None = None) -> vlmprune.VisualTokens:
    words = rows(len(features), 3, features[0].shape[1], seed=9)
    mask = torch.ones(len(features), 3, dtype=torch.bool)
    if guide is not None:
        words, mask = guide.expand(len(features), 1, -1), mask[:, :1]
    return tokens_of(*features, shapes=shapes, instruction=words, instruction_mask=mask)


@pytest.mark.parametrize("case", range(3))
def test_golden(case: int) -> None:
    frames, height, width, time, side, image = map(int, GOLDEN[f"c{case}_args"])
    shape = Geometry.grid(height, width, planes=frames, kind="image" if image else "video")
    windows = Windows.of_kernel(shape, time, side)
    assert np.array_equal(windows.members, GOLDEN[f"c{case}_window_index"])
    features, embed = (torch.from_numpy(GOLDEN[f"c{case}_{name}"]).flatten(0, 2) for name in ("features", "embed"))
    guide = torch.from_numpy(GOLDEN[f"c{case}_guide"])
    for name, logits in (
        ("scaled_dot", hicom.scaled_dot(embed, guide)),
        ("cliplogit_2p3_m4", hicom.cosine_logits(embed, guide, 2.3)),
    ):
        wanted = GOLDEN[f"c{case}_out_{name}"]
        found = hicom.pool(features, logits, windows.members)
        np.testing.assert_allclose(found.view(wanted.shape), wanted, atol=1e-5)


@given(st.integers(1, 40), st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_windows_of_a_kernel_cover_the_axis(length: int, kernel: int) -> None:
    starts, size = axis_windows(length, kernel)
    assert len(starts) == -(-length // kernel)
    assert size == min(kernel, length)
    assert starts[0] == 0
    assert starts[-1] + size == length
    assert (starts.diff() > 0).all()
    assert (starts.diff() <= size).all()


@given(st.integers(1, 40), st.data())
@settings(max_examples=100, deadline=None)
def test_windows_of_a_count_cover_the_axis(length: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, length))
    starts, size = axis_windows(length, count=count)
    assert len(starts) == count
    assert starts[-1] + size == length
    assert (starts.diff() > 0).all()
    assert (starts.diff() >= size - 1).all()  # at most one shared: HICom's rule holds for every count


@pytest.mark.parametrize(
    ("length", "expected"), [(5, [0, 1]), (6, [0, 2]), (9, [0, 2, 5]), (2, [0]), (3, [0]), (7, [0, 3]), (8, [0, 4])]
)
def test_lengths_at_which_the_official_split_fails(length: int, expected: list[int]) -> None:
    assert axis_windows(length, 4)[0].tolist() == expected


@given(sides, sides, sides, st.data())
@settings(max_examples=60, deadline=None)
def test_as_many_windows_as_asked_for(frames: int, height: int, width: int, data: st.DataObject) -> None:
    total = frames * height * width
    count = data.draw(st.integers(1, total))
    windows = Windows.of_count(video(frames, height, width), count)
    assert len(windows) == count
    assert len(set(windows.middle.tolist())) == count
    assert (windows.members == windows.middle[:, None]).any(1).all()
    assert windows.members[windows.members >= 0].unique().tolist() == list(range(total))
    for members in windows.members:
        there = members[members >= 0].tolist()
        assert there == sorted(set(there))


def test_the_default_gives_the_published_windows_and_so_does_the_preset() -> None:
    for frames, side in ((32, 27), (8, 9), (4, 3)):
        shape = video(frames, side, side)
        published = Windows.of_kernel(shape, 4, 3)
        assert len(published) == (frames // 4) * (side // 3) ** 2
        count = vlmprune.HIComLocal().budget([len(shape)])[0]
        found = Windows.of_count(shape, count)
        assert torch.equal(found.members, published.members)
        assert torch.equal(found.middle, published.middle)
    preset = vlmprune.HIComLocal.preset("local43")
    assert isinstance(preset, vlmprune.HIComLocal)
    assert preset.kernel == (4, 3)
    assert len(Windows.of_kernel(video(32, 27, 27), 4, 3)) == 648


@given(sides, sides, sides, st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_the_count_follows_from_the_grid(frames: int, height: int, width: int, time: int, side: int) -> None:
    windows = Windows.of_kernel(video(frames, height, width), time, side)
    assert len(windows) == -(-frames // time) * -(-height // side) * -(-width // side)
    image = Windows.of_kernel(Geometry.grid(height, width, planes=frames), time, side)
    assert len(image) == frames * -(-height // side) * -(-width // side), "an image's pictures are not frames"


@given(st.integers(0, 2**16), st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_rows_lie_among_their_window_s(seed: int, count: int) -> None:
    shape = video(3, 4, 5)
    features, logits = rows(60, 7, seed=seed), 3 * rows(60, seed=seed + 1)
    members = Windows.of_count(shape, count).members
    found = hicom.pool(features, logits, members)
    for row, window in zip(found, members):
        inside = features[window[window >= 0]]
        assert (row <= inside.amax(0) + 1e-5).all()
        assert (row >= inside.amin(0) - 1e-5).all()
        weights = logits[window[window >= 0]].softmax(0)
        torch.testing.assert_close(row, (weights[:, None] * inside).sum(0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
    constant = hicom.pool(torch.full((60, 7), 2.5), logits, members)
    torch.testing.assert_close(constant, torch.full_like(constant, 2.5))
    means = hicom.pool(features, torch.zeros(60), members)
    torch.testing.assert_close(means[0], features[members[0][members[0] >= 0]].mean(0), atol=1e-5, rtol=1e-5)
    order = torch.randperm(members.shape[1], generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(hicom.pool(features, logits, members[:, order]), found, atol=1e-5, rtol=1e-5)


def test_windows_in_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    features, logits, members = rows(60, 7), rows(60, seed=1), Windows.of_count(video(3, 4, 5), 11).members
    whole = hicom.pool(features, logits, members)
    monkeypatch.setattr(hicom, "BLOCK", 100)
    torch.testing.assert_close(hicom.pool(features, logits, members), whole)


def test_no_question_is_the_mean_and_a_loud_one_its_token() -> None:
    shape, features = Geometry.grid(4, 4), rows(16, 6)
    pruner, budget = vlmprune.HIComLocal(keep=4), torch.tensor([4])
    quiet = pruner.select(asked(features, shapes=[shape], guide=torch.zeros(6)), budget)
    block = features.view(2, 2, 2, 2, 6).mean((1, 3)).view(4, 6)
    torch.testing.assert_close(quiet.features[0], block)
    assert quiet.index.tolist() == [[0, 2, 8, 10]]
    loud = pruner.select(asked(features, shapes=[shape], guide=1e4 * features[5]), budget)
    torch.testing.assert_close(loud.features[0, 0], features[5])
    assert not torch.equal(loud.features, quiet.features)


def test_line_breaks_stay_only_where_there_is_room() -> None:
    shape = Geometry.grid(2, 3, suffix=2)
    features = rows(8, 5)
    for keep, breaks in ((4, 0), (6, 0), (7, 1), (3, 0)):
        found = vlmprune.HIComLocal(keep=keep).select(asked(features, shapes=[shape]), torch.tensor([keep]))
        assert int((found.index >= 6).sum()) == breaks
        assert len(set(found.index[0].tolist())) == keep
        assert torch.equal(found.features[found.index >= 6], features[6 : 6 + breaks])
        assert not found.merged[found.index >= 6].any()


def test_given_relevance_takes_the_place_of_the_question() -> None:
    shapes, features = [Geometry.grid(4, 4), video(2, 3, 3)], [rows(16, 6), rows(18, 6, seed=1)]
    guide = rows(6, seed=4)
    padded = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
    cosines = torch.nn.functional.cosine_similarity(padded, guide, dim=-1)
    budget, tokens = torch.tensor([4, 4]), tokens_of(*features, shapes=shapes)
    found = vlmprune.HIComLocal(keep=4, scale=3.0, relevance=cosines).select(tokens, budget)
    plain = vlmprune.HIComLocal(keep=4, scale=3.0).select(asked(*features, shapes=shapes, guide=guide), budget)
    torch.testing.assert_close(found.features, plain.features)
    assert vlmprune.HIComLocal(scale=3.0, relevance=cosines).needs == frozenset()
    with pytest.raises(ValueError, match=r"hicom_local's relevance must be \[2, 18\]"):
        vlmprune.HIComLocal(keep=4, scale=3.0, relevance=cosines[:, 1:]).select(tokens, budget)


def test_the_question_changes_what_the_model_sees() -> None:
    family = FAMILIES["llava-onevision"]
    model = model_of(family)
    seen, given_rows = [], []
    for question in ([3, 4, 5], [6, 7, 8]):
        inputs = family.inputs([[1, 2, ("video", 0), *question]])
        pruner = vlmprune.HIComLocal(kernel=(2, 2))
        with vlmprune.prune(model, pruner) as session, Recorded(pruner) as calls:
            generate(model, inputs, max_new_tokens=2)
        (item,) = session.last.items
        seen.append((item.kept.tolist(), item.tokens_after))
        given_rows.append(calls[0][1].features)
    assert (given_rows[0] - given_rows[1]).abs().max() > 1e-3
    shape = item.geometry
    frames, (height, width) = len(shape.grids), shape.grids[0]
    assert seen[0] == seen[1], "the windows do not depend on the question"
    assert seen[0][1] == -(-frames // 2) * -(-height // 2) * -(-width // 2)


def test_batches_with_tiles_in_scope_and_out() -> None:
    family = FAMILIES["llava-next"]
    model, inputs = model_of(family), family.inputs(BATCHES["three"])
    for pruner in (
        vlmprune.HIComLocal(keep=5),
        vlmprune.PerTile(vlmprune.HIComLocal(keep=5)),
        vlmprune.HIComLocal.preset("local43"),
    ):
        with vlmprune.prune(model, pruner) as session:
            generate(model, inputs, max_new_tokens=2)
        assert session.last.changed
        if not isinstance(pruner, vlmprune.HIComLocal) or pruner.kernel is None:
            assert {item.tokens_after for item in session.last.items} == {5}


def test_errors() -> None:
    for kernel in ((0, 3), (4,), 3, (4.0, 3), "43"):
        with pytest.raises(ValueError, match=r"hicom_local needs kernel=\(frames, rows and columns\)"):
            vlmprune.HIComLocal(kernel=kernel)
    with pytest.raises(ValueError, match="set scale= as well"):
        vlmprune.HIComLocal(relevance=torch.ones(1, 4))
    with pytest.raises(ValueError, match="hicom_local publishes 'local43' with 648"):
        vlmprune.HIComLocal.preset("local44")
    holes = Geometry.grid(3, 3).take(torch.tensor([0, 2, 3, 4, 5, 6, 7, 8]))
    with pytest.raises(ValueError, match="before methods that cut them"):
        Windows.of_count(holes, 2)
