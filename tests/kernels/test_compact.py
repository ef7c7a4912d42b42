import pytest
import torch

from vlmprune.kernels import compact


def naive(keep, tensor, dim, fill):
    out = tensor.new_full((*tensor.shape[:dim], keep.shape[1], *tensor.shape[dim + 1 :]), fill)
    for b in range(keep.shape[0]):
        for t, column in enumerate(keep[b].tolist()):
            if column >= 0:
                out.select(dim, t).select(dim - 1, b).copy_(tensor.select(dim, column).select(dim - 1, b))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "length", "kept", "d"), [(1, 1, 1, 1), (2, 7, 3, 5), (3, 19, 11, 1030)])
def test_everything_along_the_sequence_in_one_call(backend, strided, dtype, batch, length, kept, d):
    torch.manual_seed(length)
    keep = torch.stack([torch.randperm(length)[:kept].sort().values for _ in range(batch)])
    keep[0, : kept // 2] = -1
    keep[-1, kept - kept // 3 :] = -1
    tensors = [
        torch.randn(batch, length, d).to(dtype),
        torch.rand(batch, length) < 0.5,
        torch.randint(-100, 2**40, (batch, length)),
        torch.randint(0, 99, (3, batch, length)),
        torch.randn(2, batch, length, 3).to(dtype),
        torch.randint(0, 99, (batch, length), dtype=torch.int32),
    ]
    dims, fill = [1, 1, 1, 2, 2, 1], [0.25, 0, -100, 1, -1.5, 7]
    inputs = [strided(t) if t.dtype != torch.bool else t.to(strided(tensors[0]).device) for t in tensors]
    got = compact(keep.to(inputs[0].device), inputs, dims=dims, fill=fill, backend=backend)
    for mine, tensor, dim, value in zip(got, tensors, dims, fill, strict=True):
        assert mine.dtype == tensor.dtype
        assert mine.is_contiguous()
        assert torch.equal(mine.cpu(), naive(keep, tensor, dim, value))


def test_defaults_and_nothing(backend, device):
    x = torch.randn(2, 4, 3, device=device)
    keep = torch.tensor([[0, 3], [2, -1]], device=device)
    (out,) = compact(keep, [x], backend=backend)
    assert torch.equal(out, torch.stack([x[0, [0, 3]], torch.stack([x[1, 2], torch.zeros(3, device=device)])]))
    assert compact(keep, [], backend=backend) == []
    assert compact(keep[:, :0], [x], backend=backend)[0].shape == (2, 0, 3)
    assert compact(keep.fill_(-1), [x[:, :0]], fill=[2.0], backend=backend)[0].eq(2.0).all()


@pytest.mark.parametrize(
    ("keep", "tensors", "kwargs"),
    [
        (torch.zeros(2, 2), [torch.randn(2, 4)], {}),
        (torch.tensor([[4], [0]]), [torch.randn(2, 4)], {}),
        (torch.tensor([[-2], [0]]), [torch.randn(2, 4)], {}),
        (torch.tensor([[0], [0]]), [torch.randn(3, 4)], {}),
        (torch.tensor([[0], [0]]), [torch.randn(2, 4), torch.randn(2, 5)], {}),
        (torch.tensor([[0], [0]]), [torch.randn(2, 4)], {"dims": [0]}),
        (torch.tensor([[0], [0]]), [torch.randn(2, 4)], {"dims": [1, 1]}),
        (torch.tensor([[0], [0]]), [torch.randn(2, 4)], {"fill": []}),
    ],
)
def test_wrong_arguments(keep, tensors, kwargs):
    with pytest.raises(ValueError):
        compact(keep, tensors, **kwargs)


def test_gradients_reach_the_kept_columns(backend, device):
    x = torch.randn(2, 4, 3, device=device, dtype=torch.float64, requires_grad=True)
    planes = torch.randn(2, 2, 4, device=device, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(8, device=device).view(2, 4)
    keep = torch.tensor([[0, 3, -1], [2, 2, 1]], device=device)

    def cut(x, planes):
        out = compact(keep, [x, labels, planes], dims=[1, 1, 2], fill=[5, 0, 5], backend=backend)
        return out[0], out[2]

    assert torch.autograd.gradcheck(cut, (x, planes))


def test_compiled_as_one_op():
    keep, x, mask = torch.tensor([[0, 3], [2, -1]]), torch.randn(2, 4, 3), torch.ones(2, 4, dtype=torch.bool)

    def cut(keep, x, mask):
        return compact(keep, [x, mask])

    compiled = torch.compile(cut, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(keep, x, mask), cut(keep, x, mask), strict=True):
        assert torch.equal(got, want)
