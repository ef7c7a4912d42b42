"""The selections of whole methods against their golden vectors, on both backends."""

import pathlib

import numpy as np
import pytest
import torch

from vlmprune.pruners.cdpruner import cdpruner_select, instruction_relevance, normalise
from vlmprune.pruners.mmtok import mmtok_select
from vlmprune.pruners.todre import todre_select

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


def load(path, device):
    data = np.load(path)
    return {name: torch.from_numpy(data[name]).to(device) if data[name].ndim else data[name] for name in data.files}


def few(backend, device, n, k):
    """Picks are nested and Triton's interpreter is slow: the first of them are enough for large items there."""
    return min(k, 6) if backend == "triton" and device == "cpu" and n > 100 else k


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("mmtok_*.npz")), ids=lambda path: path.stem)
def test_mmtok(backend, device, path):
    data = load(path, device)
    n = len(data["vision_proj"])
    if backend == "triton" and device == "cpu" and n > 200:
        pytest.skip("slow under the interpreter; test_coverage.py takes its kernel through it")
    k = few(backend, device, n, int(data["k"]))
    exclude = torch.zeros(1, n, dtype=torch.bool, device=device)
    exclude[0, data["exclude"]] = True
    order = mmtok_select(
        data["vision_proj"][None],
        data["vision_pre"][None],
        torch.tensor([k]),
        text=data["text"][None],
        exclude=exclude,
        text_temperature=float(data["tv_temp"]),
        visual_temperature=float(data["vv_temp"]),
        alpha=float(data["alpha"]),
        backend=backend,
    )[0]
    assert order.tolist() == data["order"][:k].tolist()
    if k == int(data["k"]):
        assert order.sort().values.tolist() == data["kept"].tolist()


@pytest.mark.parametrize("case", ["neg", "pos", "theta05", "theta08"])
def test_cdpruner(backend, device, case):
    data = load(GOLDEN / "cdpruner_select.npz", device)
    items, n = data["image_features"].shape[:2]
    text = data["text_embeds"].expand(items, -1, -1)
    raw = instruction_relevance(data["image_embeds"], text) * (1 if case == "pos" else -1)
    theta = {"theta05": 0.5, "theta08": 0.8}.get(case)
    # The official code takes minimum and maximum over the batch: here one item of all its tokens.
    relevance = normalise(raw.reshape(1, -1), theta=theta).view(items, n)
    torch.testing.assert_close(relevance, data[f"{case}_relevance"], atol=1e-4, rtol=1e-4)
    k = int(data["num_keep"])
    order = cdpruner_select(data["image_features"], relevance, torch.tensor([k, k]), backend=backend)
    assert order.tolist() == data[f"{case}_order"].tolist()


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("todre_*.npz")), ids=lambda path: path.stem)
def test_todre(backend, device, path):
    data = load(path, device)
    k = few(backend, device, len(data["features"]), int(data["k"]))
    features, saliency = data["features"][None].float(), data["cls_attn"][None].float()
    order = todre_select(features, saliency, torch.tensor([k]), backend=backend)[0]
    assert order.tolist() == data["order"][:k].tolist()
    if k == int(data["k"]):
        assert order.sort().values.tolist() == data["keep_sorted"].tolist()
