"""PyramidDrop against its official vectors, and the properties that its specification asks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import BATCHES
from fakes import picks, rows, tokens_of
from families import FAMILIES
from test_laws import model_of

import vlmprune
from vlmprune.kernels import attention_scores

GOLDEN = sorted((Path(__file__).parent / "golden").glob("pyramiddrop_rank_*.npz"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    data = np.load(path)
    start, count = int(data["image_start"]), int(data["n_image"])
    q, k = torch.from_numpy(data["q_text"])[None], torch.from_numpy(data["k_rope"])[None]
    row = attention_scores(q, k, reduce="rows")[0, 0, start : start + count]
    torch.testing.assert_close(row, torch.from_numpy(data["score"]), atol=1e-6, rtol=1e-4)
    stage = int(path.stem.split("stage")[1][0])
    pruner = vlmprune.PyramidDrop()
    layer, original = pruner.layer_list[stage], int(data["n_image_orig"])
    (keep,) = pruner.budget([original], layer, 32)
    assert keep == int(data["n_keep"])
    assert ([original], pruner.budget([original], pruner.layer_list[stage - 1], 32))[stage > 0] == [count]
    hidden = torch.from_numpy(data["hidden"])
    tokens = tokens_of(hidden[start : start + count], layer=layer, depth=32, next_last_attention=row[None])
    kept = torch.tensor(picks(pruner.select(tokens, torch.tensor([keep])))[0]) + start
    assert kept.tolist() == data["keep_idx"].tolist()
    left = torch.cat([hidden[:start], hidden[kept], hidden[start + count :]])
    torch.testing.assert_close(left.sum(1), torch.from_numpy(data["out_hidden_sum"]))


def test_padding_and_ties() -> None:
    scores = torch.tensor([[0.2, 0.2, 0.3, 0.2], [0.0, 0.0, 0.0, 0.0]])
    tokens = tokens_of(rows(4, 3), rows(2, 3), layer=1, next_last_attention=scores)
    assert picks(vlmprune.PyramidDrop().select(tokens, torch.tensor([3, 1]))) == [[0, 1, 2], [0]]


def test_published_counts_and_presets_of_depth() -> None:
    pruner = vlmprune.PyramidDrop()
    assert [pruner.budget([576, 100], layer, 32) for layer in (8, 16, 24)] == [[288, 50], [144, 25], [72, 12]]
    assert [pruner.budget([576], layer, 28) for layer in pruner.layers(28)] == [[288], [144], [72]]
    assert vlmprune.PyramidDrop(keep=1.0).budget([576], 8, 32) == [576]
    assert vlmprune.PyramidDrop(layer_list=(6, 12, 18), model_depth=28).layers(28) == (6, 12, 18)
    assert pruner.budget([576], 0, 32) == [576]
    with pytest.raises(ValueError, match="has no layer 40 in a model of 32 layers"):
        vlmprune.PyramidDrop(layer_list=(8, 40), ratios=(0.5, 0.25))
    with pytest.raises(ValueError, match="out of reach"):
        vlmprune.prune(model_of(FAMILIES["llava-clip-llama"]), "pyramiddrop", keep=0.3)


@pytest.mark.parametrize("family", [FAMILIES["llava-clip-llama"], FAMILIES["qwen2.5-vl"]], ids=str)
def test_ranks_by_the_attention_of_the_layer_behind(family) -> None:
    """The first stage's survivors are the top of row S - 1 of that layer's own attention in the unpruned model."""
    model, inputs = model_of(family, "eager"), family.inputs(BATCHES["unequal"])
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True, use_cache=False).attentions[1]
        with vlmprune.prune(model, "pyramiddrop", keep=0.6) as session:
            model(**inputs)
    for item in session.last.items:
        first, second = (stage.kept for stage in item.stages)
        row = maps[item.sample, :, -1, item.start : item.start + item.tokens_before].mean(0)
        best = row.sort(descending=True, stable=True).indices[: len(first)]
        assert best.sort().values.tolist() == first.tolist()
        assert 0 < len(second) < len(first) < item.tokens_before
        assert set(second.tolist()) < set(first.tolist())
    assert session.last.layer_visual_tokens == sorted(session.last.layer_visual_tokens, reverse=True)
