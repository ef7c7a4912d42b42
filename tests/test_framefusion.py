"""FrameFusion: golden vectors and properties."""

from __future__ import annotations

from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import BATCHES
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws import model_of

import vlmprune
from vlmprune.pruners import _segments, framefusion

GOLDEN = np.load(Path(__file__).parent / "golden" / "video_reducers.npz")


def test_similarity() -> None:
    place = torch.from_numpy(GOLDEN["ff_patch_type"])
    order, likeness = framefusion.similarity(torch.from_numpy(GOLDEN["ff_hidden"]), place)
    text = int((place < 0).sum())
    assert order[text:].tolist() == GOLDEN["ff_token_index"].tolist()
    assert (likeness[:text] == -2).all()
    np.testing.assert_allclose(likeness[text:], GOLDEN["ff_similarity"], atol=1e-5)


def test_merging() -> None:
    rows, place = torch.from_numpy(GOLDEN["ff_hidden"]), torch.from_numpy(GOLDEN["ff_patch_type"])
    order, likeness = framefusion.similarity(rows, place)
    into = framefusion.joined(order, likeness >= float(GOLDEN["ff_threshold"]))
    kept = into == torch.arange(len(rows))
    assert torch.equal(kept, torch.from_numpy(GOLDEN["ff_keep_mask"]))
    merged, members = _segments.means(rows[None], into[None])
    np.testing.assert_allclose(merged[0, kept], GOLDEN["ff_merged"][kept.numpy()], atol=1e-5)
    assert members.sum() == len(rows)


@pytest.mark.parametrize(("name", "cost", "depth"), [("ff_ratio_cost03", 0.3, 28), ("ff_ratio_cost05_L32", 0.5, 32)])
def test_what_the_budget_leaves(name: str, cost: float, depth: int) -> None:
    for row, ratio in zip(GOLDEN["ff_sparsity_lists"], GOLDEN[name]):
        left = list(accumulate((1 - percent / 100 for percent in row if percent >= 0), mul))
        share = framefusion.goal(cost * depth, sum(left), depth - len(left)) / (left[-1] if left else 1)
        assert max(0, 1 - share) == pytest.approx(ratio, abs=1e-4)


def run(
    frames: torch.Tensor, depth: int, **fields: Any
) -> tuple[list[int], list[torch.Tensor], list[torch.Tensor], vlmprune.Pruner]:
    """Tokens behind each layer, and what is left at the end, in a decoder whose layers change nothing."""
    count, size = frames.shape[:2]
    pruner = vlmprune.create_pruner("framefusion", **fields)
    shape = vlmprune.Geometry.grid(1, size, planes=count, kind="video" if count > 1 else "image")
    rows, index, behind = frames.flatten(0, 1), torch.arange(count * size), []
    attention = torch.rand(count * size, generator=torch.Generator().manual_seed(0))
    for layer in range(depth):
        if layer in pruner.layers(depth):
            (wanted,) = pruner.budget([count * size], layer, depth)
            tokens = vlmprune.VisualTokens(
                rows[None],
                (len(rows),),
                (index,),
                (shape,),
                layer=layer,
                depth=depth,
                signal=lambda _, now=index: attention[now][None],
            )
            if wanted is None:
                choice = pruner.select(tokens, torch.tensor([len(rows)]))
                rows = rows[choice.index[0]] if choice.features is None else choice.features[0]
                index = index[choice.index[0]]
            assert (index.diff() > 0).all()
        behind.append(len(rows))
    return behind, rows, index, attention


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 7),
    size=st.integers(1, 9),
    depth=st.integers(2, 12),
    noise=st.sampled_from([0.0, 0.3, 0.6, 1.0, 3.0]),
    share=st.floats(0, 1),
    start=st.integers(1, 3),
)
def test_the_average_is_kept(count: int, size: int, depth: int, noise: float, share: float, start: int) -> None:
    """Whatever the video is like, the average over the layers is `keep`, up to a token and at least one."""
    start = min(start, depth - 1)
    keep = start / depth + share * (1 - start / depth)
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(1, size, 8, generator=generator) + noise * torch.randn(count, size, 8, generator=generator)
    behind, rows, _, _ = run(frames, depth, keep=min(1.0, keep), merges=5, start=start)
    assert sorted(behind, reverse=True) == behind
    assert behind[-1] >= 1
    assert sum(behind) / depth == pytest.approx(min(1.0, keep) * count * size, abs=1.0)
    assert rows.isfinite().all()


def test_a_constant_video_stays_constant() -> None:
    token = torch.randn(6, generator=torch.Generator().manual_seed(0))
    behind, rows, index, _ = run(token.expand(5, 4, -1), 10, keep=0.4)
    assert behind == [8] * 10  # merging alone reaches it
    torch.testing.assert_close(rows, token.expand(8, -1))
    assert set(index[:4].tolist()) == {0, 1, 2, 3}


def test_merging_goes_on_while_it_pays_then_attention_cuts() -> None:
    """Half of the places stand still, so the first stage merges, the second finds nothing, the third cuts."""
    frames = torch.eye(8, 16).expand(4, -1, -1).clone()
    frames[1::2, 4:] *= -1
    behind, _, index, attention = run(frames, 10, keep=0.3)
    assert behind[:2] == [20, 20]
    assert set(behind[2:]) == {round((0.3 * 32 * 10 - 40) / 8)}
    left = torch.tensor([*range(8), *(8 * t + p for t in (1, 2, 3) for p in range(4, 8))])
    assert index.tolist() == left[attention[left].argsort(descending=True)[: behind[-1]]].sort().values.tolist()


def test_an_image_is_cut_before_layer_1() -> None:
    behind, _, index, attention = run(torch.ones(1, 20, 4), 5, keep=0.4)
    assert behind == [20, 5, 5, 5, 5]
    assert index.tolist() == attention.argsort(descending=True)[:5].sort().values.tolist()
    assert run(torch.ones(1, 20, 4), 5, keep=0.8, start=3)[0] == [20, 20, 20, 10, 10]


def test_items_keep_their_own_budget() -> None:
    """A still video, an image and a moving video in one call end as alone."""
    torch.manual_seed(0)
    videos = [torch.randn(1, 4, 8).expand(4, -1, -1), torch.randn(4, 4, 8)]
    shape = vlmprune.Geometry.grid(1, 4, planes=4, kind="video")
    alone = [run(frames, 4, keep=0.5)[0] for frames in videos]
    pruner = vlmprune.FrameFusion(keep=0.5)
    rows, index = [each.flatten(0, 1) for each in videos], [torch.arange(16)] * 2
    for layer in range(4):
        attention = torch.nn.utils.rnn.pad_sequence([torch.linspace(1, 0, 16)[each] for each in index], True)
        tokens = vlmprune.VisualTokens(
            torch.nn.utils.rnn.pad_sequence(rows, True),
            tuple(map(len, rows)),
            tuple(index),
            (shape, shape),
            layer=layer,
            depth=4,
            signal=lambda _, given=attention: given,
        )
        choice = pruner.select(tokens, torch.tensor(tokens.counts))
        for number in range(2):
            chosen = choice.index[number][choice.index[number] >= 0]
            given = tokens.features[number][chosen] if choice.features is None else choice.features[number]
            rows[number], index[number] = given[: len(chosen)], index[number][chosen]
        assert [len(each) for each in rows] == [each[layer] for each in alone]


def test_what_it_cannot_do() -> None:
    model = model_of(FAMILIES["llava-onevision"])
    with pytest.raises(ValueError, match="out of reach"):
        vlmprune.prune(model, "framefusion", keep=0.3)  # three layers
    with pytest.raises(ValueError, match="layers from 2 on"):
        vlmprune.prune(model_of(FAMILIES["qwen3-vl-moe"]), "framefusion", keep=0.8)
    vlmprune.prune(model_of(FAMILIES["qwen3-vl-moe"]), "framefusion", keep=0.8, start=2).close()
    for fields in ({"merges": 0}, {"least": 2.0}, {"start": 0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            vlmprune.create_pruner("framefusion", **fields)


def test_two_prompts_in_a_row() -> None:
    """Nothing of the first is left for the second, also where the first broke off."""
    family = FAMILIES["llava-onevision"]
    model, inputs = model_of(family), family.inputs(BATCHES["video"])
    kept = []
    with torch.no_grad(), vlmprune.prune(model, "framefusion", keep=0.5) as session:
        for _ in range(2):
            model(**inputs)
            kept.append([stage.kept.tolist() for stage in session.last.items[0].stages])
        session.pruner._courses[0].spent = 999
        model(**inputs)
        kept.append([stage.kept.tolist() for stage in session.last.items[0].stages])
    assert kept[0] == kept[1] == kept[2]
    assert sum(map(len, kept[0])) / 3 == pytest.approx(6.5, abs=1)
