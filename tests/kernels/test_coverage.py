import pathlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.kernels import coverage_select, pairwise_cosine

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


def naive(table, k):
    """The published loop on one fp64 table `[R, N]`; picks and their gains."""
    covered, chosen, gains = torch.zeros(len(table), 1, dtype=torch.float64), [], []
    table = table.double().cpu()
    for _ in range(min(k, table.shape[1])):
        gain = (table - covered).clamp_min(0).sum(0)
        gain[chosen] = -torch.inf
        chosen.append(int(gain.argmax()))
        gains.append(float(gain[chosen[-1]]))
        covered = torch.maximum(covered, table[:, chosen[-1:]])
    return chosen, gains


def objective(table, chosen):
    return float(table.double()[:, chosen].clamp_min(0).amax(1).sum()) if len(chosen) else 0.0


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("mmtok_*.npz")), ids=lambda p: p.stem)
def test_mmtok_golden(backend, device, path):
    data = np.load(path)
    proj, pre, words = (torch.from_numpy(data[key])[None].to(device) for key in ("vision_proj", "vision_pre", "text"))
    n, m = proj.shape[1], words.shape[1]
    text = (pairwise_cosine(words, proj, backend=backend) / float(data["tv_temp"])).softmax(-1) / m
    visual = (pairwise_cosine(pre, backend=backend) / float(data["vv_temp"])).softmax(-1) / n
    mask = torch.ones(1, n, dtype=torch.bool, device=device)
    mask[0, torch.from_numpy(data["exclude"]).to(device)] = False
    interpreted = backend == "triton" and device == "cpu"
    k = (
        min(int(data["k"]), 6) if interpreted and n > 100 else int(data["k"])
    )  # picks are nested; the interpreter is slow
    picks = coverage_select(visual, k, text=text, visual_weight=float(data["alpha"]), mask=mask, backend=backend)
    assert picks[0].tolist() == data["order"][:k].tolist()
    if k < int(data["k"]):
        return
    table = torch.cat([text, float(data["alpha"]) * visual], 1)[0]
    assert objective(table, picks[0]) == pytest.approx(float(data["objective"]), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "n", "m"), [(1, 1, 0), (5, 3, 2), (17, 17, 4), (24, 35, 1)])
def test_equals_the_published_loop(backend, strided, dtype, rows, n, m):
    torch.manual_seed(n)
    visual, text = strided(torch.rand(2, rows, n).to(dtype)), strided(torch.rand(2, m, n).to(dtype))
    mask = torch.rand(2, n) < 0.8
    visual.masked_fill_(~mask[:, None].to(visual.device), float("nan"))
    ks = [n + 1, (n + 1) // 2]
    picks = coverage_select(
        visual, ks, text=text if m else None, visual_weight=0.5, mask=mask.to(visual.device), backend=backend
    )
    table = torch.cat([0.5 * visual.float(), text.float()], 1)
    for item, k in enumerate(ks):
        valid = mask[item].nonzero()[:, 0]
        want, gains = naive(table[item][:, valid], k)
        got = picks[item][picks[item] >= 0]
        assert len(set(got.tolist())) == len(want)
        got_gains = naive_gains(table[item], got)
        for mine, theirs, i, j in zip(got_gains, gains, got.tolist(), valid[want].tolist(), strict=True):
            assert i == j or mine == pytest.approx(theirs, rel=1e-6), "only gains equal in fp32 may swap"


def naive_gains(table, chosen):
    table, covered, gains = table.double().cpu(), 0.0, []
    for j in chosen.tolist():
        union = torch.maximum(table[:, j], torch.as_tensor(covered, dtype=torch.float64)).clamp_min(0)
        gains.append(float((union - covered).sum()))
        covered = union
    return gains


def test_fp32_ties_go_to_the_lowest_index_on_every_backend(backend, device):
    """Column sums that differ by less than fp32 can tell are equal, in whatever order they are added up."""
    visual = torch.ones(1, 8, 6)
    visual[0, 5, 3] += 1e-7
    assert coverage_select(visual.to(device), 3, backend=backend).tolist() == [[0, 3, 1]]


def test_no_gain_left_takes_the_lowest_indices(backend, device):
    text = torch.zeros(1, 2, 12)
    text[0, 0, 7] = text[0, 1, 4] = 1.0
    visual = torch.zeros(1, 3, 12)
    picks = coverage_select(visual.to(device), 6, text=text.to(device), backend=backend)
    assert picks.tolist() == [[4, 7, 0, 1, 2, 3]]


def test_duplicates_go_last_and_lowest_index_wins(backend, device):
    torch.manual_seed(1)
    visual = torch.rand(1, 9, 5).repeat(1, 1, 3).to(device)
    picks = coverage_select(visual, 15, backend=backend)[0].tolist()
    assert sorted(picks) == list(range(15))
    assert all(i < 5 for i in picks[:5])


def test_picks_are_nested_and_negative_entries_count_as_zero(backend, device):
    torch.manual_seed(2)
    visual = torch.randn(1, 14, 19, device=device)
    longest = coverage_select(visual, 19, backend=backend)
    for k in (0, 1, 7):
        assert torch.equal(coverage_select(visual, k, backend=backend), longest[:, :k])
    assert torch.equal(coverage_select(visual.clamp_min(0), 19, backend=backend), longest)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10), st.lists(st.integers(0, 3), min_size=81, max_size=81))
def test_lazy_equals_naive_with_many_ties(rows, n, k, entries):
    """Small integers tie all the time; fp32 sums of them are exact, so the picks must be the very same."""
    table = torch.tensor(entries[: rows * n], dtype=torch.float32).reshape(1, rows, n)
    want, gains = naive(table[0], k)
    assert coverage_select(table, k)[0].tolist() == want
    assert gains == sorted(gains, reverse=True)


def test_lazy_equals_the_reference_on_a_real_size():
    import importlib

    module = importlib.import_module("vlmprune.kernels.coverage")
    torch.manual_seed(3)
    x = torch.nn.functional.normalize(torch.randn(20, 24).repeat_interleave(12, 0) + 0.5 * torch.randn(240, 24), dim=1)
    visual = (x @ x.T / 0.2).softmax(-1)[None] / 240
    columns, counts = module.stack_columns(visual, None, 1.0, None), torch.tensor([60])
    fast, slow = (torch.full((1, 60), -1) for _ in range(2))
    module._select_cpu(columns, counts, fast, None, chunk=7)
    module.coverage_reference(columns, counts, slow, None)
    assert torch.equal(fast, slow)


@pytest.mark.parametrize("shape", [(2, 4, 0), (0, 3, 5), (1, 0, 4)])
def test_empty(backend, device, shape):
    picks = coverage_select(torch.rand(shape, device=device), 3, backend=backend)
    assert picks.shape == (shape[0], min(3, shape[2]))
    if shape == (1, 0, 4):
        assert picks.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"k": -1},
        {"k": 2, "visual_weight": -0.5},
        {"k": 2, "visual_weight": float("nan")},
        {"k": 2, "text": torch.rand(1, 2, 4)},
        {"k": 2, "mask": torch.ones(1, 4, dtype=torch.bool)},
        {"k": 2, "backend": "cuda"},
    ],
)
def test_wrong_arguments(kwargs):
    with pytest.raises(ValueError):
        coverage_select(torch.rand(1, 3, 5), **kwargs)


def test_nan_in_a_valid_column_raises_on_the_cpu():
    visual = torch.rand(1, 3, 5)
    visual[0, 1, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or inf"):
        coverage_select(visual, 2)
    mask = torch.tensor([[True, True, False, True, True]])
    assert 2 not in coverage_select(visual, 4, mask=mask)[0].tolist()


def test_compiled_as_one_op():
    visual = torch.rand(2, 6, 6)
    compiled = torch.compile(coverage_select, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(visual, 3), coverage_select(visual, 3))
