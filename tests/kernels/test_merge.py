import pathlib

import numpy as np
import pytest
import torch

from vlmprune.kernels import bipartite_match, merge_plan, merge_tokens, nearest_target

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


def naive_merge(x, keep, into, weight, reduce):
    """Slot by slot in fp64."""
    x, out, size = x.double().cpu(), [], []
    for b in range(len(x)):
        for slot, target in enumerate(keep[b].tolist()):
            others = [i for i, s in enumerate(into[b].tolist()) if s == slot and i not in keep[b].tolist()]
            w, own = weight[b].double(), float(weight[b, target])
            if target < 0:
                out.append(torch.zeros(x.shape[2], dtype=torch.float64))
                size.append(0.0)
                continue
            total = sum((w[i] * x[b, i] for i in others), torch.zeros(x.shape[2], dtype=torch.float64))
            mass = sum(float(w[i]) for i in others)
            if reduce == "target_plus_mean":
                out.append(x[b, target] + (total / mass if mass else 0.0))
            else:
                out.append((own * x[b, target] + total) / (own + mass if reduce == "mean" else 1.0))
            size.append(own + mass)
    return torch.stack(out).view(len(x), -1, x.shape[2]), torch.tensor(size).view(len(x), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "slots", "d"), [(1, 1, 3), (7, 3, 5), (33, 9, 17)])
@pytest.mark.parametrize("reduce", ["mean", "sum", "target_plus_mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_slot_by_slot(backend, strided, dtype, n, slots, d, reduce, weighted):
    torch.manual_seed(n)
    x, weight = torch.randn(2, n, d).to(dtype), torch.rand(2, n) + 0.5 if weighted else torch.ones(2, n)
    keep = torch.stack([torch.randperm(n)[:slots] for _ in range(2)])
    into = torch.randint(-1, slots, (2, n))
    if slots > 1:
        keep[0, 1] = -1
        into[0][into[0] == 1] = 0
    dropped = (into < 0) & ~torch.stack([torch.isin(torch.arange(n), row) for row in keep])
    x[dropped] = float("nan")
    want, want_size = naive_merge(x, keep, into, weight, reduce)
    x = strided(x)
    merged, size = merge_tokens(
        x, keep.to(x.device), into.to(x.device),
        weight=strided(weight) if weighted else None, reduce=reduce, backend=backend,
    )  # fmt: skip
    assert merged.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(merged.double().cpu(), want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(size.cpu(), want_size, atol=1e-5, rtol=1e-5)


def test_reference_equals_the_fast_path():
    import importlib

    module = importlib.import_module("vlmprune.kernels.merge")
    torch.manual_seed(0)
    x, weight, into = torch.randn(2, 20, 6), torch.rand(2, 20), torch.randint(-1, 4, (2, 20))
    for fast, slow in zip(
        module._slot_sums_cpu(x, weight.masked_fill(into < 0, 0.0), into, 4),
        module.slot_sums_reference(x, weight.masked_fill(into < 0, 0.0), into, 4),
        strict=True,
    ):
        torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize("case", ["cls0", "cls1"])
def test_tome_golden(backend, device, case):
    data = np.load(GOLDEN / "tome_merge.npz")
    metric, x, size = (torch.from_numpy(data[f"{case}_{key}"]).to(device) for key in ("metric", "x", "size"))
    n, r = x.shape[1], int(data["r"])
    protected = torch.zeros(x.shape[:2], dtype=torch.bool, device=device)
    protected[:, 0] = case == "cls1"
    matching = bipartite_match(metric, r, protected=protected, backend=backend)
    plan = merge_plan(matching, n, n - r)
    assert torch.equal(plan.keep, plan.keep.sort(1).values)
    members = torch.nn.functional.one_hot(plan.into, n - r).mT.cpu().numpy()
    merged, total = merge_tokens(x, plan.keep, plan.into, weight=size[..., 0], backend=backend)
    sums, _ = merge_tokens(x, plan.keep, plan.into, reduce="sum", backend=backend)
    for b in range(len(x)):
        theirs = {tuple(row.nonzero()[0]): i for i, row in enumerate(data[f"{case}_source"][b])}
        order = [theirs[tuple(row.nonzero()[0])] for row in members[b]]
        np.testing.assert_allclose(merged[b].cpu(), data[f"{case}_wavg_x"][b][order], atol=1e-5)
        np.testing.assert_allclose(total[b].cpu(), data[f"{case}_wavg_size"][b][order, 0], atol=1e-5)
        np.testing.assert_allclose(sums[b].cpu(), data[f"{case}_merge_sum"][b][order], atol=1e-5)


@pytest.mark.parametrize("case", range(12))
def test_pitome_golden(backend, device, case):
    data = np.load(GOLDEN / "pitome_merge.npz")
    cls, ratio, _, _, by_tome = data[f"case{case}_params"]
    cls = int(cls)
    metric, x, size = (torch.from_numpy(data[key]).to(device) for key in ("metric", "x", "size"))
    ranks = torch.from_numpy(data[f"case{case}_order"]).to(device) + cls
    n = x.shape[1]
    r = int(np.floor(n - cls - (n - cls) * ratio))
    matching = bipartite_match(metric, r, order=ranks if by_tome else ranks[:, : 2 * r], backend=backend)
    plan = merge_plan(matching, n, n - r)
    members = torch.nn.functional.one_hot(plan.into, n - r).mT.cpu().numpy()
    merged, total = merge_tokens(x, plan.keep, plan.into, weight=size[..., 0], backend=backend)
    for b in range(len(x)):
        theirs = {tuple(row.nonzero()[0]): i for i, row in enumerate(data[f"case{case}_source"][b])}
        order = [theirs[tuple(row.nonzero()[0])] for row in members[b]]
        np.testing.assert_allclose(merged[b].cpu(), data[f"case{case}_wavg_x"][b][order], atol=1e-5)
        np.testing.assert_allclose(total[b].cpu(), data[f"case{case}_wavg_size"][b][order, 0], atol=1e-5)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("visionzip_*.npz")), ids=lambda p: p.stem)
def test_visionzip_golden(backend, device, path):
    data = np.load(path)
    if "n576" in path.stem and backend == "triton" and device == "cpu":
        pytest.skip("too large for the interpreter")
    hidden, metric = (torch.from_numpy(data[key]).to(device) for key in ("hidden", "key_metric"))
    batch, n, _ = hidden.shape
    dominant = torch.from_numpy(data["dominant_sorted"]).to(device)
    out = torch.zeros(batch, n, dtype=torch.bool, device=device).scatter_(1, dominant, True)
    rest = out.long().argsort(dim=1, stable=True)[:, : n - dominant.shape[1]]
    targets = rest[:, torch.from_numpy(data["target_pos_in_rest"]).to(device)]
    keep = torch.cat([dominant, targets], 1)
    candidates = torch.arange(keep.shape[1], device=device).expand_as(keep) >= dominant.shape[1]
    into = nearest_target(metric, keep, candidates=candidates, backend=backend)
    merged, size = merge_tokens(hidden, keep, into, reduce="target_plus_mean", backend=backend)
    np.testing.assert_allclose(merged.cpu(), data["out"], atol=1e-4)
    assert (size.sum(1) == n).all()


def test_merged_size_is_conserved_and_protected_tokens_survive(backend, device):
    torch.manual_seed(3)
    metric = torch.randn(2, 15, 8, device=device)
    mask = torch.ones(2, 15, dtype=torch.bool, device=device)
    mask[1, [0, 4, 9]] = False
    metric[~mask] = float("nan")
    protected = torch.zeros_like(mask)
    protected[:, 1] = True
    matching = bipartite_match(metric, [3, 9], mask=mask, protected=protected, backend=backend)
    assert (matching.source[0] >= 0).sum() == 3
    assert (matching.source[1] >= 0).sum() == 5, "twelve valid tokens propose six times, one of them protected"
    assert not mask[1, matching.destination[1][:5]].logical_not().any()
    assert 1 not in matching.source.tolist()[0] + matching.destination.tolist()[0]
    assert (matching.score[0, :3].diff() <= 0).all()
    plan = merge_plan(matching, 15, 12, mask=mask)
    x = torch.randn(2, 15, 4, device=device)
    merged, size = merge_tokens(x, plan.keep, plan.into, backend=backend)
    assert size.sum(1).tolist() == [15.0, 12.0]
    assert (plan.into[~mask] == -1).all()
    for b in range(2):
        slot = plan.keep[b].tolist().index(1)
        assert torch.equal(merged[b, slot], x[b, 1])


def test_twins_on_opposite_sides_merge_first(backend, device):
    torch.manual_seed(4)
    metric = torch.randn(1, 8, 6, device=device)
    metric[0, 5] = 2 * metric[0, 2]
    matching = bipartite_match(metric, 1, backend=backend)
    assert (matching.source.item(), matching.destination.item()) == (2, 5)


def test_nothing_to_merge(backend, device):
    metric = torch.randn(2, 5, 3, device=device)
    for m, r in ((metric, 0), (metric[:, :1], 4)):
        matching = bipartite_match(m, r, backend=backend)
        assert matching.source.shape == (2, 0)
        plan = merge_plan(matching, m.shape[1], m.shape[1])
        merged, size = merge_tokens(m, plan.keep, plan.into, backend=backend)
        assert torch.equal(merged, m)
        assert (size == 1).all()
    assert merge_tokens(metric, torch.empty(2, 0).long(), torch.full((2, 5), -1), backend=backend)[0].shape == (2, 0, 3)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"keep": torch.zeros(1, 2)},
        {"keep": torch.tensor([[0, 5]])},
        {"into": torch.full((1, 5), 2)},
        {"into": torch.zeros(1, 4).long()},
        {"weight": torch.ones(1, 4)},
        {"reduce": "max"},
    ],
)
def test_wrong_arguments(kwargs):
    args = {"keep": torch.tensor([[0, 3]]), "into": torch.zeros(1, 5).long()} | kwargs
    with pytest.raises(ValueError):
        merge_tokens(torch.randn(1, 5, 4), **args)


def test_compiled_as_one_op():
    x, keep, into = torch.randn(1, 5, 4), torch.tensor([[0, 3]]), torch.tensor([[0, 1, 1, 1, -1]])
    compiled = torch.compile(merge_tokens, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x, keep, into), merge_tokens(x, keep, into), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("reduce", ["mean", "sum", "target_plus_mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients(backend, device, reduce, weighted):
    """Those of the definition written out, for `x`; a weight that asks for one is refused."""
    torch.manual_seed(1)
    keep = torch.tensor([[0, 5, -1], [1, 2, 6]])
    into = torch.tensor([[0, 1, 1, -1, 0, 0, 1], [0, 0, 1, 2, -1, 2, 2]])
    x, weight = torch.randn(2, 7, 4), torch.rand(2, 7) + 0.5 if weighted else torch.ones(2, 7)
    grad = torch.randn(2, 3, 4)
    mine = x.clone().to(device).requires_grad_()
    args = (keep.to(device), into.to(device))
    out, _ = merge_tokens(mine, *args, weight=weight.to(device) if weighted else None, reduce=reduce, backend=backend)
    out.backward(grad.to(device))
    plain = x.double().requires_grad_()
    expected, _ = naive_merge(plain, keep, into, weight, reduce)
    expected.backward(grad.double())
    torch.testing.assert_close(mine.grad.cpu().double(), plain.grad, atol=1e-5, rtol=1e-5)
    weight = weight.to(device).requires_grad_()
    out, _ = merge_tokens(mine, *args, weight=weight, reduce=reduce, backend=backend)
    with pytest.raises(RuntimeError, match="detach weight"):
        out.sum().backward()
