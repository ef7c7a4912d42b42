import pathlib

import numpy as np
import pytest
import torch

from vlmprune.kernels import attention_scores

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


def full_map(q, k, mask, query_mask, query_index, scale):
    """The whole fp64 map `[B, H, Q, S]`; rows that see nothing or do not count are 0."""
    q, k = q.double().cpu(), k.double().cpu().repeat_interleave(q.shape[1] // k.shape[1], 1)
    hidden = torch.zeros(q.shape[0], 1, q.shape[2], k.shape[2], dtype=torch.bool)
    if mask is not None:
        hidden |= ~mask[:, None, None]
    if query_index is not None:
        hidden |= torch.arange(k.shape[2]) > query_index[:, None, :, None]
    logits = (q @ k.mT * scale).masked_fill(hidden, -torch.inf)
    weights = logits.softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0.0)
    return weights if query_mask is None else weights.masked_fill(~query_mask[:, None, :, None], 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "groups", "queries", "keys", "d"), [(1, 1, 1, 1, 3), (4, 2, 5, 35, 24), (6, 1, 37, 19, 16)]
)
@pytest.mark.parametrize("setting", ["full", "padded", "causal", "everything"])
def test_equals_the_full_map(backend, strided, dtype, heads, groups, queries, keys, d, setting):
    torch.manual_seed(keys)
    q, k = torch.randn(2, heads, queries, d).to(dtype), torch.randn(2, groups, keys, d).to(dtype)
    mask = query_mask = query_index = None
    if setting in ("padded", "everything"):
        mask, query_mask = torch.rand(2, keys) < 0.7, torch.rand(2, queries) < 0.7
        k.masked_fill_(~mask[:, None, :, None], float("nan"))
        q.masked_fill_(~query_mask[:, None, :, None], float("nan"))
    if setting in ("causal", "everything"):
        query_index = torch.randint(0, keys, (2, queries))
    want = full_map(q, k, mask, query_mask, query_index, 0.3)
    q, k = strided(q), strided(k)
    options = {
        "mask": None if mask is None else mask.to(q.device),
        "query_mask": None if query_mask is None else query_mask.to(q.device),
        "causal": query_index is not None,
        "query_index": query_index,
        "scale": 0.3,
        "backend": backend,
    }
    cases = {("sum", True): want.sum(2), ("sum", False): want.mean(1).sum(1)}
    if setting == "everything":
        cases |= {("rows", True): want, ("rows", False): want.mean(1)}
    for (reduce, per_head), expected in cases.items():
        got = attention_scores(q, k, reduce=reduce, per_head=per_head, **options)
        assert got.dtype == torch.float32
        tolerance = 2e-6 if dtype == torch.float32 else 2e-5
        torch.testing.assert_close(got.double().cpu(), expected, atol=tolerance * max(1, queries), rtol=1e-4)


def test_causal_defaults_to_the_last_rows(backend, device):
    torch.manual_seed(1)
    q, k = torch.randn(1, 2, 9, 16, device=device), torch.randn(1, 2, 9, 16, device=device)
    rows = attention_scores(q, k, reduce="rows", causal=True, backend=backend)
    assert torch.equal(rows, rows.tril())
    torch.testing.assert_close(rows.sum(-1), torch.ones(1, 9, device=device))
    last = attention_scores(q[:, :, -2:], k, reduce="rows", causal=True, backend=backend)
    torch.testing.assert_close(last, rows[:, -2:])


def test_chunks_change_nothing(monkeypatch):
    import importlib

    torch.manual_seed(2)
    q, k = torch.randn(2, 4, 30, 8), torch.randn(2, 2, 30, 8)
    want = [attention_scores(q, k, reduce=r, causal=True) for r in ("sum", "rows")]
    monkeypatch.setattr(importlib.import_module("vlmprune.kernels.attention"), "_CHUNK", 7 * 2 * 4 * 30)
    for r, expected in zip(("sum", "rows"), want, strict=True):
        torch.testing.assert_close(attention_scores(q, k, reduce=r, causal=True), expected)


def test_memory_is_linear_in_the_length(monkeypatch):
    """No tensor the size of the map: the largest softmax input stays within the chunk."""
    largest = 0
    softmax = torch.softmax

    def spy(x, dim):
        nonlocal largest
        largest = max(largest, x.numel())
        return softmax(x, dim)

    monkeypatch.setattr(torch, "softmax", spy)
    attention_scores(torch.randn(1, 2, 4096, 4), torch.randn(1, 2, 4096, 4))
    assert 0 < largest <= 1 << 23 < 2 * 4096 * 4096


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("fastv_select_*.npz")), ids=lambda p: p.stem)
def test_fastv_golden(backend, device, path):
    data = np.load(path)
    q, k = (torch.from_numpy(data[key])[None].to(device) for key in ("q_last", "k"))
    rows = attention_scores(q[:, :, None], k, reduce="rows", per_head=True, causal=True, backend=backend)
    np.testing.assert_allclose(rows[0, :, 0].cpu(), data["attn_last"], atol=1e-5)
    score = attention_scores(q[:, :, None], k, backend=backend)[0].cpu()
    image = slice(int(data["image_start"]), int(data["image_start"]) + int(data["n_image"]))
    np.testing.assert_allclose(score[image], data["score"], atol=1e-5)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("visiondrop_llm_*.npz")), ids=lambda p: p.stem)
def test_visiondrop_golden(backend, device, path):
    data = np.load(path)
    q, k = (torch.from_numpy(data[key])[None].to(device) for key in ("q_rope", "k_rope"))
    start, n = int(data["image_index"]), int(data["num_image"])
    index = torch.arange(start, start + n)[None]
    score = attention_scores(q[:, :, start : start + n], k, causal=True, query_index=index, backend=backend)
    np.testing.assert_allclose(score[0, start : start + n].cpu() / n, data["scores"], atol=1e-5)


@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (3, 0)])
def test_empty(backend, device, queries, keys):
    q, k = torch.randn(2, 4, queries, 8, device=device), torch.randn(2, 2, keys, 8, device=device)
    assert attention_scores(q, k, backend=backend).tolist() == [[0.0] * keys] * 2
    assert attention_scores(q, k, reduce="rows", per_head=True, backend=backend).shape == (2, 4, queries, keys)


@pytest.mark.parametrize(
    ("q", "k", "kwargs"),
    [
        (torch.randn(1, 4, 8), torch.randn(1, 4, 8), {}),
        (torch.randn(1, 4, 2, 8), torch.randn(1, 3, 2, 8), {}),
        (torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2, 6), {}),
        (torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2, 8).half(), {}),
        (torch.randn(1, 4, 2, 8), torch.randn(1, 4, 5, 8), {"mask": torch.ones(1, 2, dtype=torch.bool)}),
        (torch.randn(1, 4, 2, 8), torch.randn(1, 4, 5, 8), {"query_index": torch.zeros(1, 2, dtype=torch.int64)}),
        (torch.randn(1, 4, 2, 8), torch.randn(1, 4, 5, 8), {"causal": True, "query_index": torch.zeros(1, 3).long()}),
        (torch.randn(1, 4, 2, 8), torch.randn(1, 4, 5, 8), {"reduce": "max"}),
        (torch.full((1, 4, 2, 8), float("nan")), torch.randn(1, 4, 5, 8), {}),
    ],
)
def test_wrong_arguments(q, k, kwargs):
    with pytest.raises(ValueError):
        attention_scores(q, k, **kwargs)


def test_compiled_as_one_op():
    q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    compiled = torch.compile(attention_scores, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, causal=True), attention_scores(q, k, causal=True))
