"""SparseVLM against its official vectors, and the properties that its specification asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import BATCHES
from fakes import picks, rows, tokens_of
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws import model_of

import vlmprune
from vlmprune.pruners import sparsevlm
from vlmprune.pruners._schedule import layer_average
from vlmprune.pruners.sparsevlm import KEPT, clusters_of, density_peaks, find_raters, sparsify, split

GOLDEN = sorted((Path(__file__).parent / "golden").glob("sparsevlm_*.npz"))


def load(path: Path) -> dict[str, Any]:
    return {key: torch.from_numpy(value) if value.ndim else value.item() for key, value in np.load(path).items()}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    data = load(path)
    start, count, keep = data["image_start"], data["n_image"], data["n_keep"]
    visual, text = slice(start, start + count), slice(start + count, None)
    embeds, hidden = data["embeds"][None], data["hidden"]
    masks = torch.ones(1, count, dtype=torch.bool), torch.ones_like(data["rater_score"], dtype=torch.bool)[None]
    share = sparsevlm.rater_scores(embeds[:, visual], masks[0], embeds[:, text], masks[1])
    torch.testing.assert_close(share[0], data["rater_score"], atol=1e-6, rtol=1e-4)
    raters = find_raters(embeds[:, visual], masks[0], embeds[:, text], masks[1])
    assert raters[0].nonzero().flatten().tolist() == data["rater_idx_in_text"].tolist()
    attention = data["attn_text_image"].mean(0)[None]
    score = sparsevlm.rate(attention, raters)
    torch.testing.assert_close(score[0], data["score"], atol=1e-6, rtol=1e-4)
    clusters = clusters_of(count - keep)
    assert clusters == data["cluster_num"]
    assert split(count, keep + clusters) == (keep, clusters)
    # Recycled tokens, in descending score.
    order = score[0].sort(descending=True, stable=True).indices
    pool = order[keep : keep + sparsevlm.recycled(count - keep)]
    assert data["deleted_visual"][data["recycle_idx_in_deleted"]].tolist() == pool.tolist()
    index, means = sparsify(hidden[visual], score[0], keep, clusters)
    assert index[:keep].tolist() == data["kept_visual"].tolist()
    torch.testing.assert_close(means, data["merged"], atol=1e-5, rtol=1e-4)
    out = torch.cat([hidden[:start], hidden[index[:keep] + start], means, hidden[start + count :]])
    torch.testing.assert_close(out, data["out_hidden"], atol=1e-5, rtol=1e-4)
    # v1.0.
    kept = sparsevlm.rank_count(attention[0, raters[0]], data["rank_scale"], data["rank_bias"])
    assert (kept < count) is bool(data["rank_flag"])
    assert sparsify(hidden[visual], score[0], kept, 0)[0].tolist() == data["rank_kept_visual"].tolist()


@pytest.mark.parametrize(
    ("tokens", "counts", "average"),
    [
        (192, [309, 204, 113], 206.5),
        (128, [312, 117, 39], 145.40625),
        (96, [249, 55, 27], 114.09375),
        (64, [82, 32, 18], 82.25),
    ],
)
def test_published_counts(tokens: int, counts: list[int], average: float) -> None:
    pruner = vlmprune.SparseVLM.preset("llava-1.5", tokens)
    assert [pruner.budget([576], layer, 32) for layer in (3, 7, 16)] == [[count] for count in counts]
    assert pruner.keep * 576 == pytest.approx(average)
    assert layer_average(576, counts, (3, 7, 16), 32) == average
    for before, (kept, left) in zip([576, *counts], zip(KEPT[tokens], counts)):
        assert split(before, left) == (kept, left - kept)
    plain = vlmprune.SparseVLM.preset("llava-1.5", tokens, recycle=False)
    assert [plain.budget([576], layer, 32) for layer in (3, 7, 16)] == [[kept] for kept in KEPT[tokens]]


def test_presets() -> None:
    assert vlmprune.SparseVLM.preset("llava-1.5") == vlmprune.SparseVLM()
    ranked = vlmprune.SparseVLM.preset("llava-1.5, v1.0", 128, positions="original")
    assert (ranked.rank_scale, ranked.rank_bias, ranked.positions) == (9.0, 6.0, "original")
    assert ranked.budget([576], 3, 32) == [None]
    assert ranked.budget([576], 0, 32) == [576]
    assert ranked.layers(32) == (3, 7, 16, 20)
    with pytest.raises(ValueError, match=r"'llava-1\.5' with 192, 128, 96, 64; 'llava-1\.5, v1\.0' with 192, 128, 64"):
        vlmprune.SparseVLM.preset("llava-1.5", 100)
    assert vlmprune.SparseVLM(keep=1.0).budget([576], 3, 32) == [576]
    with pytest.raises(ValueError, match="out of reach"):
        vlmprune.SparseVLM(keep=0.05).budget([576], 3, 32)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.floats(0.15, 1.0), st.booleans())
def test_counts_come_near_and_can_be_split(count: int, keep: float, recycle: bool) -> None:
    pruner = vlmprune.SparseVLM(keep=keep, recycle=recycle)
    left = [pruner.budget([count], layer, 32)[0] for layer in (3, 7, 16)]
    assert all(count >= a >= b for a, b in zip([count, *left], left))
    # A row more in every stage is the coarsest step; clusters remain where nothing is kept.
    floor = layer_average(count, sparsevlm._counts(count, (0.0,) * 3, recycle, 1.0), (3, 7, 16), 32)
    assert abs(layer_average(count, left, (3, 7, 16), 32) - max(keep * count, floor)) <= 1.0
    for before, after in zip([count, *left], left):
        if recycle and after < before:
            kept, clusters = split(before, after)
            assert kept + clusters == after
            assert clusters == clusters_of(before - kept)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 2**16))
def test_raters_exist_and_padding_has_no_say(count: int, text: int, seed: int) -> None:
    visual, words = rows(1, count, 6, seed=seed), rows(1, text, 6, seed=seed + 1)
    full = torch.ones(1, count, dtype=torch.bool), torch.ones(1, text, dtype=torch.bool)
    share = sparsevlm.rater_scores(visual, full[0], words, full[1])
    torch.testing.assert_close(share.sum(1), torch.ones(1))
    raters = find_raters(visual, full[0], words, full[1])
    assert raters.any()
    if text > 1:
        assert raters[0].tolist() == (share[0] > 1 / text).tolist()
    padded = find_raters(
        torch.cat([visual, rows(1, 3, 6)], 1),
        torch.cat([full[0], torch.zeros(1, 3, dtype=torch.bool)], 1),
        torch.cat([words, rows(1, 2, 6)], 1),
        torch.cat([full[1], torch.zeros(1, 2, dtype=torch.bool)], 1),
    )
    assert padded[0].tolist() == [*raters[0].tolist(), False, False]


def brute_force_peaks(x: torch.Tensor, clusters: int) -> tuple[list[int], list[int]]:
    apart = (x.double()[:, None] - x.double()).norm(dim=2) / x.shape[1] ** 0.5
    density = (-apart.square().sort(1).values[:, :clusters].mean(1)).exp()
    delta = torch.stack([apart[i][density > density[i]].min() if (density > density[i]).any() else apart.max()
                         for i in range(len(x))])  # fmt: skip
    centres = (density * delta).sort(descending=True, stable=True).indices[:clusters]
    label = apart[:, centres].argmin(1)
    label[centres] = torch.arange(clusters)
    return centres.tolist(), label.tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**16))
def test_density_peaks(count: int, clusters: int, seed: int) -> None:
    x, clusters = rows(count, 5, seed=seed), min(clusters, count)
    centres, label = density_peaks(x, clusters)
    assert (centres.tolist(), label.tolist()) == brute_force_peaks(x, clusters)
    assert label[centres].tolist() == list(range(clusters))
    # Far from each other, densities would underflow in fp32.
    assert density_peaks(x * 15, clusters)[0].tolist() == brute_force_peaks(x * 15, clusters)[0]


@pytest.mark.parametrize(("count", "seed"), [(6, 2), (8, 2), (40, 0), (200, 1), (400, 3)])
def test_mutual_neighbours_tie(count: int, seed: int) -> None:
    """With two clusters the density is that of the nearest alone: of a pair one and the same, whatever was rounded."""
    x = rows(count, 5, seed=seed)
    centres, label = density_peaks(x, 2)
    assert (centres.tolist(), label.tolist()) == brute_force_peaks(x, 2)


def test_clusters_average_what_they_take_in() -> None:
    features, score = rows(30, 4), torch.arange(30.0).flip(0)
    index, means = sparsify(features, score, 10, 1)  # six of twenty recycled, one cluster: their mean
    assert index[:10].tolist() == list(range(10))
    torch.testing.assert_close(means[0], features[10:17].mean(0))
    same = torch.cat([features[:10], features[10:11].expand(20, -1)])
    torch.testing.assert_close(sparsify(same, score, 10, 3)[1], features[10:11].expand(3, -1))
    assert not len(sparsify(features, score, 10, 0)[1])


def test_kept_rows_are_untouched_and_items_alone() -> None:
    names = ("text_attention", "prompt_features", "text_features")
    features = [rows(30, 4), rows(22, 4, seed=1)]
    signals = {
        "text_attention": [rows(5, 30, seed=2).abs().T, rows(5, 22, seed=3).abs().T],
        "prompt_features": [rows(30, 4, seed=4), rows(22, 4, seed=5)],
        "text_features": [rows(5, 4, seed=6), rows(3, 4, seed=7)],
    }
    pruner, budget = vlmprune.SparseVLM(keep=0.5), torch.tensor([12, 9])

    def padded(items: list[int]) -> vlmprune.VisualTokens:
        tables = {name: torch.nn.utils.rnn.pad_sequence([signals[name][i] for i in items], batch_first=True)
                  for name in names}  # fmt: skip
        tables["text_attention"] = tables["text_attention"].mT
        tables["text_mask"] = torch.arange(5) < torch.tensor([[5, 3][i] for i in items])[:, None]
        tables["text_mask"] = tables["text_mask"][:, : tables["text_features"].shape[1]]
        tables["text_attention"] = tables["text_attention"][:, : tables["text_features"].shape[1]]
        return tokens_of(*[features[i] for i in items], layer=1, depth=3, **tables)

    together = pruner.select(padded([0, 1]), budget)
    assert [len(kept) for kept in picks(together)] == [12, 9]
    for item in (0, 1):
        alone = pruner.select(padded([item]), budget[item : item + 1])
        assert picks(alone)[0] == picks(together)[item]
        left = int(budget[item])
        torch.testing.assert_close(alone.features[0, :left], together.features[item, :left])
        plain = ~together.merged[item, :left]
        index = together.index[item, :left]
        assert torch.equal(together.features[item, :left][plain], features[item][index[plain]])
        assert 0 < int((~plain).sum()) == split(len(features[item]), left)[1]


@pytest.mark.parametrize("name", ["llava-clip-llama", "qwen2.5-vl"])
def test_on_a_model(name: str) -> None:
    """The first stage's kept tokens are those that full maps of the unpruned model put first."""
    family = FAMILIES[name]
    model, inputs = model_of(family, "eager"), family.inputs(BATCHES["one"])
    with torch.no_grad():
        out = model(**inputs, output_attentions=True, output_hidden_states=True, use_cache=False)
        with vlmprune.prune(model, "sparsevlm", keep=0.6) as session:
            model(**inputs)
    (item,) = session.last.items
    visual = slice(item.start, item.start + item.tokens_before)
    embeds, count = out.hidden_states[0][0].float(), item.tokens_before
    share = (embeds[visual] @ embeds[visual.stop :].T).softmax(1).mean(0)
    score = out.attentions[0][0].mean(0)[visual.stop :, visual][share > share.mean()].mean(0)
    kept, clusters = split(count, len(item.stages[0].kept))
    best = score.sort(descending=True, stable=True).indices[:kept]
    assert set(best.tolist()) < set(item.stages[0].kept.tolist())
    assert clusters == 1
    assert item.merged.any()


def test_rank_adaptive_on_a_model() -> None:
    family = FAMILIES["llava-clip-llama"]
    model, inputs = model_of(family), family.inputs(BATCHES["unequal"])
    ranked = vlmprune.SparseVLM.preset("llava-1.5, v1.0", rank_scale=2.0, recycle=False)
    with torch.no_grad(), vlmprune.prune(model, ranked) as session:
        model(**inputs)
    # At most three words follow an image in these prompts: their attention has that rank at most.
    assert any(0 < item.tokens_after <= 6 for item in session.last.items)
    assert all(item.tokens_after <= item.tokens_before for item in session.last.items)
