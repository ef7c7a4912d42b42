"""FastV against its official vectors, and its attention row against a full attention map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import BATCHES, PRUNERS
from families import FAMILIES
from test_laws import model_of

import vlmprune
from vlmprune.kernels import attention_scores
from vlmprune.pruners._top import top_indices

GOLDEN = sorted((Path(__file__).parent / "golden").glob("fastv_select_*.npz"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    data = np.load(path)
    q, k = torch.from_numpy(data["q_last"])[None, :, None], torch.from_numpy(data["k"])[None]
    start, count = int(data["image_start"]), int(data["n_image"])
    row = attention_scores(q, k, reduce="rows")[0, 0]
    torch.testing.assert_close(row[start : start + count], torch.from_numpy(data["score"]), atol=1e-6, rtol=1e-4)
    average = (2 + 30 * (1 - float(data["r"]))) / 32
    (keep,) = vlmprune.FastV(keep=average).budget([count], 2, 32)
    assert keep == int(data["n_keep"])
    kept = top_indices(row[None, start : start + count], torch.tensor([keep]))[0].sort().values + start
    text = [i for i in range(int(data["seq_len"])) if not start <= i < start + count]
    assert sorted(text + kept.tolist()) == data["keep_idx"].tolist()


# The mixture's deepstack reaches behind layer 1.
@pytest.mark.parametrize("family", [case for name, case in FAMILIES.items() if name != "qwen3-vl-moe"], ids=str)
@pytest.mark.parametrize("use_cache", [True, False])
def test_keeps_what_the_full_attention_map_says(family, use_cache: bool) -> None:
    model, inputs = model_of(family, "eager"), family.inputs(BATCHES["unequal"])
    for layer in (1, 2):
        with torch.no_grad(), vlmprune.prune(model, "fastv", keep=0.8, layer=layer) as session:
            model(**inputs, use_cache=use_cache)
        with torch.no_grad():
            maps = model(**inputs, output_attentions=True, use_cache=False).attentions[layer - 1]
        for item in session.last.items:
            row = maps[item.sample, :, -1, item.start : item.start + item.tokens_before].mean(0)
            kept = item.stages[0].kept.tolist()
            assert 0 < len(kept) < item.tokens_before
            best = row.sort(descending=True, stable=True).indices[: len(kept)]  # zeros tie behind a sliding window
            assert best.sort().values.tolist() == kept


@pytest.mark.parametrize("name", ["llava-clip-llama", "qwen2.5-vl"])
def test_all_rows_as_in_the_papers_text(name: str) -> None:
    """query="all": the mean, over the tokens that can see it, of the column of the full map."""
    family = FAMILIES[name]
    model, inputs = model_of(family, "eager"), family.inputs(BATCHES["one"])
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True, use_cache=False).attentions[0].mean(1)[0]
        with vlmprune.prune(model, "fastv", keep=0.5, layer=1, query="all") as session:
            model(**inputs)
    (item,) = session.last.items
    received = torch.stack([maps[j:, j].mean() for j in range(len(maps))])
    best = received[item.start : item.start + item.tokens_before].sort(descending=True, stable=True).indices
    kept = item.stages[0].kept
    assert best[: len(kept)].sort().values.tolist() == kept.tolist()


def test_bad_layer() -> None:
    with pytest.raises(ValueError, match='query must be "last" or "all"'):
        vlmprune.FastV(query="some")
    for layer in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="layer must be an int"):
            vlmprune.create_pruner("fastv", layer=layer)
    with pytest.raises(ValueError, match="has 3 layers"):
        vlmprune.prune(model_of(FAMILIES["llava-clip-llama"]), "fastv", layer=3)
    assert PRUNERS["fastv"].make().layers(3) == (1,)


def test_keep_is_the_average_over_layers() -> None:
    assert vlmprune.FastV().budget([576], 2, 32) == [288]
    assert vlmprune.FastV(keep=192).budget([576], 2, 32) == [round((192 * 32 - 2 * 576) / 30)]
    model, inputs = model_of(FAMILIES["llava-clip-llama"]), FAMILIES["llava-clip-llama"].inputs(BATCHES["one"])
    with torch.no_grad(), vlmprune.prune(model, "fastv", keep=0.6, layer=1) as session:
        model(**inputs)
    kept = session.last.layer_visual_tokens
    assert kept == [tokens - 5 for tokens in session.last.layer_tokens] == [25, 10, 10]
    assert session.last.average_keep == 45 / 75
    with pytest.raises(ValueError, match=r"first 2 of 3 layers.*larger keep or a smaller layer"):
        vlmprune.prune(model, "fastv", keep=0.5)
