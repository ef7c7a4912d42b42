import pathlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.kernels import max_min_select

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


def naive(x, k, first="isolated", objective="max_min"):
    """The published loop on one item in fp64; indices into the rows of x."""
    unit = torch.nn.functional.normalize(x.double().cpu(), dim=1)
    distance = 1 - unit @ unit.T
    n, chosen = len(x), []
    while len(chosen) < min(k, n):
        if chosen:
            to_chosen = distance[chosen]
            score = to_chosen.amin(0) if objective == "max_min" else to_chosen.sum(0)
        elif first == "isolated":
            score = distance.clone().fill_diagonal_(torch.inf).amin(1)
        elif first == "eccentric":
            score = -(unit @ unit.sum(0))
        else:
            score = (torch.arange(n) == first).double()
        score[chosen] = -torch.inf
        chosen.append(int(score.argmax()))
    return chosen


def naive_batch(x, ks, mask, firsts, objective):
    rows = []
    for item, k, valid, first in zip(x, ks, mask, firsts, strict=True):
        where = valid.nonzero()[:, 0].tolist()
        local = where.index(first) if isinstance(first, int) and first in where else first
        rows.append([where[i] for i in naive(item[valid], k, local, objective)])
    width = min(max(ks), x.shape[1])
    return torch.tensor([r + [-1] * (width - len(r)) for r in rows])


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("divprune_*.npz")), ids=lambda p: p.stem)
def test_divprune_golden(backend, device, path):
    data = np.load(path)
    x = torch.from_numpy(data["features"])[None].to(device)
    picks = max_min_select(x, int(data["num_keep"]), backend=backend)[0].cpu()
    assert picks.tolist() == data["order"].tolist()
    assert picks.sort().values.tolist() == data["kept"].tolist()


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("todre_*.npz")), ids=lambda p: p.stem)
def test_todre_golden(backend, device, path):
    data = np.load(path)
    x = torch.from_numpy(data["features"]).float()[None].to(device)
    pivot = torch.from_numpy(data["cls_attn"]).argmax().reshape(1)
    picks = max_min_select(x, int(data["k"]), first=pivot, objective="max_sum", backend=backend)[0].cpu()
    assert picks.tolist() == data["order"].tolist()
    assert picks.sort().values.tolist() == data["keep_sorted"].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 3, 5), (3, 17, 7), (2, 65, 33)])
@pytest.mark.parametrize("first", ["isolated", "eccentric", "index"])
@pytest.mark.parametrize("objective", ["max_min", "max_sum"])
def test_equals_the_published_loop(backend, strided, dtype, shape, first, objective):
    torch.manual_seed(shape[1])
    batch, n, _ = shape
    x = strided(torch.randn(shape).to(dtype))
    mask = torch.rand(batch, n) < 0.8
    mask[:, :3] = True  # two rows are equally far from their mean: a tie
    x[~mask] = float("nan")
    ks = [int(k) for k in torch.randint(0, n + 3, (batch,))]
    firsts = [int(m.nonzero()[-1]) for m in mask] if first == "index" else [first] * batch
    picks = max_min_select(
        x,
        ks,
        mask=mask.to(x.device),
        first=torch.tensor(firsts) if first == "index" else first,
        objective=objective,
        backend=backend,
    )
    assert picks.dtype == torch.int64
    assert picks.tolist() == naive_batch(x, ks, mask, firsts, objective).tolist()


def test_ragged_counts_three_ways(backend, device):
    x = torch.randn(3, 12, 6, device=device)
    want = max_min_select(x, [4, 0, 20], backend=backend)
    assert want.shape == (3, 12)
    assert [(row >= 0).sum().item() for row in want] == [4, 0, 12]
    counts = torch.tensor([4, 0, 20])
    assert torch.equal(want, max_min_select(x, counts, backend=backend))
    assert torch.equal(want, max_min_select(x, counts.to(device), max_k=12, backend=backend))
    assert torch.equal(want[:, :7], max_min_select(x, counts.to(device), max_k=7, backend=backend))
    for k in (3, 9):
        assert torch.equal(max_min_select(x, k, backend=backend), max_min_select(x, [k] * 3, backend=backend))


def test_picks_are_nested(backend, device):
    x = torch.randn(1, 40, 16, device=device)
    longest = max_min_select(x, 40, backend=backend)
    assert sorted(longest[0].tolist()) == list(range(40))
    for k in (0, 1, 7, 39):
        assert torch.equal(max_min_select(x, k, backend=backend), longest[:, :k])


def test_alone_or_in_a_padded_batch(backend, device):
    torch.manual_seed(4)
    items = [torch.randn(n, 24) for n in (5, 31, 18)]
    batch, mask = torch.full((3, 37, 24), float("nan")), torch.zeros(3, 37, dtype=torch.bool)
    for b, (item, start) in enumerate(zip(items, (32, 2, 0), strict=True)):
        batch[b, start : start + len(item)], mask[b, start : start + len(item)] = item, True
    together = max_min_select(batch.to(device), [3, 9, 18], mask=mask.to(device), backend=backend).cpu()
    for row, item, start, k in zip(together, items, (32, 2, 0), (3, 9, 18), strict=True):
        alone = max_min_select(item[None].to(device), k, backend=backend)[0].cpu()
        assert row[:k].tolist() == (alone + start).tolist()


@pytest.mark.parametrize("first", ["isolated", "eccentric", 3])
@pytest.mark.parametrize("objective", ["max_min", "max_sum"])
def test_duplicates_and_zero_rows_are_picked_once(backend, device, first, objective):
    torch.manual_seed(5)
    x = torch.randn(1, 6, 8).repeat(1, 4, 1)
    x[0, [3, 10]] = 0
    picks = max_min_select(x.to(device), 24, first=first, objective=objective, backend=backend)[0].tolist()
    assert sorted(picks) == list(range(24))
    if objective == "max_min":
        early = {i % 6 if i not in (3, 10) else -i for i in picks[:8]}
        assert len(early) == 8, "six directions and the two zero rows come before any copy"


axes = st.tuples(st.integers(0, 3), st.sampled_from([-4.0, -1.0, 0.0, 0.5, 2.0]))


@pytest.mark.parametrize("objective", ["max_min", "max_sum"])
@settings(max_examples=30, deadline=None)
@given(st.lists(axes, min_size=1, max_size=10), st.integers(0, 11), st.none() | st.integers(0, 9))
def test_exact_ties_everywhere(objective, rows, k, first):
    """Rows on the axes have cosines -1, 0 or 1, exactly: nearly every step ties, and the picks must be the same."""
    x = torch.zeros(1, len(rows), 4)
    for i, (axis, length) in enumerate(rows):
        x[0, i, axis] = length
    rule = "isolated" if first is None else first % len(rows)
    assert max_min_select(x, k, first=rule, objective=objective)[0].tolist() == naive(x[0], k, rule, objective)


def test_equal_rows_give_the_lowest_index_first(backend, device):
    x = torch.ones(2, 9, 4, device=device)
    assert max_min_select(x, 9, backend=backend).tolist() == [list(range(9))] * 2
    assert max_min_select(x, 4, first=5, backend=backend).tolist() == [[5, 0, 1, 2]] * 2


def test_one_token_per_cluster(backend, device):
    torch.manual_seed(6)
    centres = torch.linalg.qr(torch.randn(16, 16))[0][:7]
    labels = torch.randint(0, 7, (50,)).index_copy(0, torch.arange(7), torch.arange(7))
    x = (centres[labels] + 0.01 * torch.randn(50, 16))[None]
    picks = max_min_select(x.to(device), 7, backend=backend)[0].cpu()
    assert sorted(labels[picks].tolist()) == list(range(7))


def test_token_scale_does_not_matter(backend, device):
    torch.manual_seed(7)
    x = torch.randn(1, 30, 12, device=device)
    scaled = x * torch.logspace(-3, 3, 30, device=device)[None, :, None]
    assert torch.equal(max_min_select(x, 11, backend=backend), max_min_select(scaled, 11, backend=backend))


@pytest.mark.parametrize("shape", [(2, 0, 4), (0, 5, 4)])
def test_empty(backend, device, shape):
    picks = max_min_select(torch.randn(shape, device=device), 3, backend=backend)
    assert picks.shape == (shape[0], min(3, shape[1]))


@pytest.mark.parametrize("first", ["isolated", "eccentric", 2])
@pytest.mark.parametrize("objective", ["max_min", "max_sum"])
def test_without_stored_similarities(backend, device, first, objective, monkeypatch):
    import importlib

    torch.manual_seed(8)
    x, mask = torch.randn(2, 45, 20, device=device), torch.rand(2, 45, device=device) < 0.8
    mask[:, 2] = True
    x[~mask] = float("nan")
    args = {"mask": mask, "first": first, "objective": objective, "backend": backend}
    want = max_min_select(x, [9, 45], **args)
    monkeypatch.setattr(importlib.import_module("vlmprune.kernels.max_min"), "_GRAM_BYTES", 0)
    assert torch.equal(max_min_select(x, [9, 45], **args), want)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"k": -1},
        {"k": 2.0},
        {"k": [1, 2]},
        {"k": torch.tensor([1.0])},
        {"k": torch.tensor([-2])},
        {"k": 2, "first": "cls"},
        {"k": 2, "first": 5},
        {"k": 2, "first": torch.tensor([7])},
        {"k": 2, "first": 1, "mask": torch.tensor([[True, False, True, True, True]])},
        {"k": 2, "objective": "min"},
        {"k": 2, "backend": "numpy"},
    ],
)
def test_wrong_arguments(kwargs):
    with pytest.raises((ValueError, TypeError)):
        max_min_select(torch.randn(1, 5, 3), **kwargs)


def test_nan_in_a_valid_row(device):
    x = torch.randn(1, 6, 4, device=device)
    x[0, 3] = float("nan")
    if device == "cpu":
        with pytest.raises(ValueError, match="NaN or inf"):
            max_min_select(x, 2)
    else:
        assert sorted(max_min_select(x, 6)[0].tolist()) == list(range(6))


def test_compiled_as_one_op():
    x, mask = torch.randn(2, 9, 8), torch.ones(2, 9, dtype=torch.bool)
    counts = torch.tensor([2, 4])

    def select(x, counts, mask):
        return max_min_select(x, counts, mask=mask, max_k=4)

    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, counts, mask), select(x, counts, mask))
