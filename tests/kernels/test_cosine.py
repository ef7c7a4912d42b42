import pytest
import torch

from vlmprune.kernels import pairwise_cosine


def oracle(x, y, mask, y_mask):
    """fp64, row by row."""
    x, y = x.double(), y.double()
    sim = torch.zeros(x.shape[0], x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            for j in range(y.shape[1]):
                if mask[b, i] and y_mask[b, j]:
                    u, v = x[b, i], y[b, j]
                    sim[b, i, j] = u @ v / (u.norm().clamp_min(1e-8) * v.norm().clamp_min(1e-8))
    return sim


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 5), (1, 17, 33), (3, 5, 64)])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_fp64(backend, strided, dtype, shape, masked):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    x[:, shape[1] // 2] = 0
    mask = torch.rand(shape[:2]) < 0.6 if masked else torch.ones(shape[:2], dtype=torch.bool)
    if masked:
        x[~mask] = float("nan")
    x, mask = strided(x), mask.to(strided(x).device)
    sim = pairwise_cosine(x, mask=mask if masked else None, backend=backend)
    assert sim.dtype == torch.float32
    torch.testing.assert_close(sim.double(), oracle(x, x, mask, mask), atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_sides(backend, strided, dtype):
    torch.manual_seed(1)
    x, y = strided(torch.randn(2, 5, 19).to(dtype)), strided(torch.randn(2, 21, 19).to(dtype))
    x_mask, y_mask = torch.rand(2, 5, device=x.device) < 0.7, torch.rand(2, 21, device=x.device) < 0.7
    sim = pairwise_cosine(x, y, mask=x_mask, y_mask=y_mask, backend=backend)
    torch.testing.assert_close(sim.double(), oracle(x, y, x_mask, y_mask), atol=2e-6, rtol=0)


def test_mirrored_blocks_equal_one_product(device):
    torch.manual_seed(2)
    x = torch.randn(2, 1100, 40, device=device)
    unit = torch.nn.functional.normalize(x, dim=-1)
    sim = pairwise_cosine(x)
    torch.testing.assert_close(sim, unit @ unit.mT, atol=2e-6, rtol=0)


@pytest.mark.parametrize("shape", [(2, 0, 4), (0, 3, 4)])
def test_empty(backend, device, shape):
    assert pairwise_cosine(torch.randn(shape, device=device), backend=backend).shape == (shape[0], shape[1], shape[1])


def test_fp16_rows_whose_squares_overflow_fp16(backend, device):
    x = torch.full((1, 4, 256), 3e4, dtype=torch.float16, device=device)
    torch.testing.assert_close(pairwise_cosine(x, backend=backend), torch.ones(1, 4, 4, device=device))


def test_nan_in_a_valid_row_raises_on_the_cpu():
    x = torch.randn(1, 4, 8)
    x[0, 2, 3] = float("inf")
    with pytest.raises(ValueError, match="NaN or inf"):
        pairwise_cosine(x)
    pairwise_cosine(x, mask=torch.tensor([[True, True, False, True]]))


@pytest.mark.parametrize(
    ("x", "kwargs"),
    [
        (torch.randn(3, 4), {}),
        (torch.ones(1, 3, 4, dtype=torch.int64), {}),
        (torch.randn(1, 3, 4), {"mask": torch.ones(1, 4, dtype=torch.bool)}),
        (torch.randn(1, 3, 4), {"mask": torch.ones(1, 3)}),
        (torch.randn(1, 3, 4), {"y": torch.randn(1, 3, 5)}),
        (torch.randn(1, 3, 4), {"y_mask": torch.ones(1, 3, dtype=torch.bool)}),
        (torch.randn(1, 3, 4), {"backend": "cuda"}),
    ],
)
def test_wrong_arguments(x, kwargs):
    with pytest.raises(ValueError):
        pairwise_cosine(x, **kwargs)


def test_compiled_as_one_op():
    x = torch.randn(2, 9, 8)
    assert torch.equal(torch.compile(pairwise_cosine, fullgraph=True, backend="aot_eager")(x), pairwise_cosine(x))
