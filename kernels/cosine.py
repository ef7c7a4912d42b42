"""Cosine similarity of every pair of rows, accumulated in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import Directions, check_mask, check_tokens, directions, operation, resolve_backend

_BLOCK = 192


def pairwise_cosine(
    x: Tensor,
    y: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    backend: str = "auto",
    eps: float = 1e-8,
) -> Tensor:
    """Cosine similarity between the rows of `x` and of `y` (of `x` itself when `y` is None).

    Args:
        x: `[B, N, D]`, any floating dtype and strides.
        y: `[B, M, D]` of the same dtype, or None.
        mask: `[B, N]` bool, True where a row of `x` is a token; with `y=None` it holds for both sides.
        y_mask: `[B, M]` bool, the same for `y`.
        backend: "auto" (Triton on a GPU, torch elsewhere), "torch" or "triton".
        eps: norms below it are raised to it, so a zero row has similarity 0 to everything, itself included.

    Returns:
        fp32 `[B, N, M]`; 0 wherever either row is masked out.

    Raises:
        ValueError: on wrong shapes or dtypes, and on NaN or inf in a valid row of a CPU tensor. On a GPU the check
            would cost a host synchronisation: there such a row counts as a zero row.
        RuntimeError: `backend="triton"` on a CPU tensor outside Triton's interpreter.
    """
    check_tokens("x", x, mask)
    if y is None:
        if y_mask is not None:
            raise ValueError("y_mask needs y")
    else:
        check_tokens("y", y)
        check_mask(y_mask, y.shape[:2], y.device)
        if y.shape[0] != x.shape[0] or y.shape[2] != x.shape[2] or y.dtype != x.dtype or y.device != x.device:
            raise ValueError(
                f"y must match x in batch, width, dtype and device: {y.dtype} {list(y.shape)} on {y.device} "
                f"against {x.dtype} {list(x.shape)} on {x.device}"
            )
    return _pairwise_cosine(x, y, mask, y_mask, eps, resolve_backend(backend, x))


@operation(
    "pairwise_cosine",
    schema="(Tensor x, Tensor? y, Tensor? mask, Tensor? y_mask, float eps, str backend) -> Tensor",
)
def _pairwise_cosine(
    x: Tensor, y: Tensor | None, mask: Tensor | None, y_mask: Tensor | None, eps: float, backend: str
) -> Tensor:
    if backend == "triton":
        from . import triton_cosine

        return triton_cosine.pairwise_cosine(x, y, mask, y_mask, eps)
    left = directions("x", x, mask, eps)
    return gram(left) if y is None else cosine_reference(left, directions("y", y, y_mask, eps))


@_pairwise_cosine.register_fake
def _(x: Tensor, y: Tensor | None, mask: Tensor | None, y_mask: Tensor | None, eps: float, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], (x if y is None else y).shape[1], dtype=torch.float32)


def cosine_reference(x: Directions, y: Directions) -> Tensor:
    """One product, scaled: any device."""
    return torch.bmm(x.rows, y.rows.mT).mul_(x.inverse[..., None]).mul_(y.inverse[:, None])


def gram_flops(n: int, width: int) -> int:
    """Products of `gram` on the CPU for one item of `n` rows, 2 FLOPs a multiply-add."""
    if n <= _BLOCK:
        return 2 * n * n * width
    block = _BLOCK if n < 8 * _BLOCK else 2 * _BLOCK
    return sum(2 * min(block, n - i) * (n - i) * width for i in range(0, n, block))


def gram(x: Directions) -> Tensor:
    """The cosines of `x` with itself.

    On the CPU a large product is made of block rows right of the diagonal, mirrored: half the arithmetic, and the
    mirror is a copy. On a GPU, and for small N, one call is faster.
    """
    batch, n, _ = x.rows.shape
    if x.rows.device.type != "cpu" or n <= _BLOCK:
        return cosine_reference(x, x)
    out = x.rows.new_empty(batch, n, n)
    block = _BLOCK if n < 8 * _BLOCK else 2 * _BLOCK
    for rows, inverse, g in zip(x.rows, x.inverse, out, strict=True):
        for i in range(0, n, block):
            j = min(i + block, n)
            g[i:j, i:].addmm_(rows[i:j], rows[i:].T, beta=0).mul_(inverse[i:j, None]).mul_(inverse[i:])
            g[j:, i:j] = g[i:j, j:].T
    return out
