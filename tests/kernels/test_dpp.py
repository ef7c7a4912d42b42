import pathlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.kernels import dpp_select, pairwise_cosine

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


def naive(kernel, k):
    """Greedy by brute force: each step tries every row and takes the largest determinant. fp64, one item."""
    kernel, chosen = kernel.double().cpu(), []
    for _ in range(min(k, len(kernel))):
        left = [j for j in range(len(kernel)) if j not in chosen]
        dets = [float(torch.linalg.slogdet(kernel[[*chosen, j]][:, [*chosen, j]]).logabsdet) for j in left]
        chosen.append(left[int(np.argmax(dets))])
    return chosen


def features(batch, n, d, dtype=torch.float32):
    return torch.randn(batch, n, d).to(dtype)


@pytest.mark.parametrize("case", ["neg", "pos", "theta05", "theta08"])
def test_cdpruner_golden(backend, device, case):
    data = np.load(GOLDEN / "cdpruner_select.npz")
    x, relevance = (torch.from_numpy(data[key]).to(device) for key in ("image_features", f"{case}_relevance"))
    similarity = pairwise_cosine(x, backend=backend)
    picks = dpp_select(similarity, int(data["num_keep"]), quality=relevance, backend=backend)
    assert picks.tolist() == data[f"{case}_order"].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "d"), [(1, 4), (3, 8), (19, 24), (41, 64)])
def test_equals_brute_force(backend, strided, dtype, n, d):
    torch.manual_seed(n)
    x = features(2, n, d, dtype)
    mask = torch.rand(2, n) < 0.8
    mask[:, 0] = True
    quality = torch.rand(2, n) + 0.1
    similarity = pairwise_cosine(x)
    similarity.masked_fill_(~(mask[:, None] & mask[..., None]), float("nan"))
    quality.masked_fill_(~mask, float("nan"))
    ks = [min(n + 2, d // 3), n // 2]
    picks = dpp_select(
        strided(similarity),
        ks,
        quality=strided(quality),
        mask=mask.to(strided(mask).device),
        backend=backend,
    )
    for item, k in enumerate(ks):
        valid = mask[item].nonzero()[:, 0]
        q = quality[item, valid]
        want = naive(q[:, None] * similarity[item][valid][:, valid] * q, k)
        assert [i for i in picks[item].tolist() if i >= 0] == valid[want].tolist()


def test_beyond_the_rank_the_best_quality_fills_up(backend, device):
    torch.manual_seed(1)
    x = torch.randn(1, 5, 5).repeat(1, 4, 1)
    quality = torch.linspace(0.5, 1.0, 20)[None]
    picks = dpp_select(pairwise_cosine(x).to(device), 12, quality=quality.to(device), backend=backend)[0].tolist()
    assert sorted(i % 5 for i in picks[:5]) == list(range(5)), "five directions first"
    rest = [i for i in range(19, -1, -1) if i not in picks[:5]]
    assert picks[5:] == rest[:7]


def test_rounding_below_zero_is_not_a_candidate(backend, device):
    """Once two directions are spanned, every Schur complement is a rounding error of either sign."""
    torch.manual_seed(5)
    x = torch.randn(1, 2, 3)[:, torch.randint(0, 2, (30,))] * (1 + torch.rand(1, 30, 1))
    similarity = (x @ x.mT).to(device)
    picks = dpp_select(similarity, 30, eps=0.0, backend=backend)[0].tolist()
    assert sorted(picks) == list(range(30))


def test_duplicates_zero_rows_and_zero_quality(backend, device):
    x = torch.ones(1, 9, 4)
    x[0, 3] = 0
    assert dpp_select(pairwise_cosine(x).to(device), 9, backend=backend)[0].tolist() == list(range(9))
    zero = torch.zeros(1, 9, device=device)
    assert dpp_select(pairwise_cosine(x).to(device), 4, quality=zero, backend=backend).tolist() == [[0, 1, 2, 3]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(0, 13), st.integers(0, 2**12 - 1))
def test_any_multiset_yields_distinct_picks_that_span_it(directions, k, bits):
    """Orthogonal directions and zero rows, repeated at will: one pick per direction, by quality, then the rest."""
    x = torch.eye(5)[directions][None] * (torch.tensor(directions) > 0)[None, :, None]
    quality = 1 + torch.tensor([bits >> i & 1 for i in range(len(directions))], dtype=torch.float32)[None]
    picks = dpp_select(pairwise_cosine(x), k, quality=quality)[0].tolist()
    by_quality = sorted(range(len(directions)), key=lambda i: (-quality[0, i], i))
    spanning = []
    for i in by_quality:
        if directions[i] and directions[i] not in [directions[j] for j in spanning]:
            spanning.append(i)
    want = spanning + [i for i in by_quality if i not in spanning]
    assert picks == want[: min(k, len(directions))]


def test_ragged_nested_and_alone(backend, device):
    torch.manual_seed(2)
    similarity = pairwise_cosine(features(3, 25, 32)).to(device)
    picks = dpp_select(similarity, [10, 0, 3], backend=backend)
    assert [(row >= 0).sum().item() for row in picks] == [10, 0, 3]
    for item, k in ((0, 10), (2, 3)):
        alone = dpp_select(similarity[item : item + 1], k, backend=backend)[0]
        assert torch.equal(picks[item, :k], alone)
    assert torch.equal(picks, dpp_select(similarity, torch.tensor([10, 0, 3]).to(device), max_k=10, backend=backend))


@pytest.mark.parametrize("shape", [(2, 0, 0), (0, 3, 3)])
def test_empty(backend, device, shape):
    assert dpp_select(torch.rand(shape, device=device), 2, backend=backend).shape == (shape[0], min(2, shape[1]))


@pytest.mark.parametrize(
    ("similarity", "kwargs"),
    [
        (torch.rand(1, 3, 4), {}),
        (torch.rand(3, 3), {}),
        (torch.rand(1, 3, 3), {"quality": torch.rand(1, 4)}),
        (torch.rand(1, 3, 3), {"mask": torch.ones(3, dtype=torch.bool)}),
        (torch.full((1, 3, 3), float("nan")), {}),
        (torch.rand(1, 3, 3), {"quality": torch.full((1, 3), float("inf"))}),
    ],
)
def test_wrong_arguments(similarity, kwargs):
    with pytest.raises(ValueError):
        dpp_select(similarity, 2, **kwargs)


def test_compiled_as_one_op():
    similarity = pairwise_cosine(torch.randn(2, 6, 8))
    compiled = torch.compile(dpp_select, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(similarity, 3), dpp_select(similarity, 3))
