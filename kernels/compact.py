"""Gather a kept set over all the tensors that run along the sequence, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ._common import operation, resolve_backend


def compact(
    keep: Tensor,
    tensors: Sequence[Tensor],
    *,
    dims: Sequence[int] | None = None,
    fill: Sequence[float] | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """Cut every tensor down to the kept columns of each row of a ragged batch.

    out[..., b, t, ...] = tensor[..., b, keep[b, t], ...] where keep[b, t] >= 0, and its fill elsewhere: -1 stands for
    padding on whichever side the caller puts it.

    Args:
        keep: `[B, K]` int64 columns, or -1.
        tensors: any dtypes, for instance embeddings `[B, S, D]`, a mask `[B, S]`, labels `[B, S]`, M-RoPE positions
            `[3, B, S]`, deepstack planes `[L, B, S, D]`. All share B and S.
        dims: which dimension of each tensor is the sequence, 1 by default; the one before it is the batch.
        fill: what each tensor holds at padding, 0 by default.
        backend: "auto" (Triton on a GPU, torch elsewhere), "torch" or "triton".

    Returns:
        The tensors, contiguous, with S replaced by K. Gradients flow back to the kept columns.

    Raises:
        ValueError: on shapes that do not fit together, and on columns out of range in a CPU `keep`.
        RuntimeError: `backend="triton"` on a CPU tensor outside Triton's interpreter.
    """
    tensors = list(tensors)
    where = [1] * len(tensors) if dims is None else list(dims)
    values = [0.0] * len(tensors) if fill is None else [float(v) for v in fill]
    if keep.dim() != 2 or keep.dtype != torch.int64:
        raise ValueError(f"keep must be int64 [B, K], got {keep.dtype} {list(keep.shape)}")
    if len(where) != len(tensors) or len(values) != len(tensors):
        raise ValueError(f"{len(tensors)} tensors need as many dims ({len(where)}) and fill values ({len(values)})")
    if not tensors:
        return []
    fits = [1 <= d < t.dim() and t.shape[d - 1] == keep.shape[0] for t, d in zip(tensors, where, strict=True)]
    lengths = {t.shape[d] if ok else -1 for t, d, ok in zip(tensors, where, fits, strict=True)}
    if len(lengths) != 1 or -1 in lengths or {t.device for t in tensors} != {keep.device}:
        raise ValueError(
            f"every tensor must have batch {keep.shape[0]} before one common sequence dimension on {keep.device}, "
            f"got {[list(t.shape) for t in tensors]} with dims {where}"
        )
    return _compact(keep, tensors, where, values, resolve_backend(backend, keep))


@operation(
    "compact",
    schema="(Tensor keep, Tensor[] tensors, int[] dims, float[] fill, str backend) -> Tensor[]",
)
def _compact(keep: Tensor, tensors: list[Tensor], dims: list[int], fill: list[float], backend: str) -> list[Tensor]:
    length = tensors[0].shape[dims[0]]
    if keep.device.type == "cpu" and ((keep < -1) | (keep >= length)).any():
        raise ValueError(f"keep must lie in [-1, {length})")
    if backend == "triton" and keep.numel() and all(t.numel() for t in tensors):
        from . import triton_compact

        return triton_compact.compact(keep, tensors, dims, fill)
    return [compact_reference(keep, t, d, v) for t, d, v in zip(tensors, dims, fill, strict=True)]


@_compact.register_fake
def _(keep: Tensor, tensors: list[Tensor], dims: list[int], fill: list[float], backend: str) -> list[Tensor]:
    return [t.new_empty(*t.shape[:d], keep.shape[1], *t.shape[d + 1 :]) for t, d in zip(tensors, dims, strict=True)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    keep, tensors, ctx.dims, _, _ = inputs
    ctx.shapes = [t.shape for t in tensors]
    ctx.save_for_backward(keep)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[None, list[Tensor | None], None, None, None]:
    """A kept column receives the sum of what its copies receive, the others nothing."""
    (keep,) = ctx.saved_tensors
    back: list[Tensor | None] = []
    for grad, shape, dim in zip(grads, ctx.shapes, ctx.dims, strict=True):
        if grad is None or not grad.is_floating_point():
            back.append(None)
            continue
        view = [1] * (dim - 1) + list(keep.shape) + [1] * (len(shape) - dim - 1)
        index = keep.clamp_min(0).view(view).expand_as(grad)
        back.append(grad.new_zeros(shape).scatter_add_(dim, index, grad.masked_fill((keep < 0).view(view), 0.0)))
    return None, back, None, None, None


_compact.register_autograd(_backward, setup_context=_save)


def planes(tensor: Tensor, dim: int) -> Tensor:
    """`tensor` as `[P, B, S, I]`."""
    shape = tensor.shape
    return tensor.reshape(prod(shape[: dim - 1]), shape[dim - 1], shape[dim], prod(shape[dim + 1 :]))


def compact_reference(keep: Tensor, tensor: Tensor, dim: int, fill: float) -> Tensor:
    """One tensor, any device."""
    out_shape = (*tensor.shape[:dim], keep.shape[1], *tensor.shape[dim + 1 :])
    if not tensor.numel():
        return tensor.new_full(out_shape, fill)
    rows = torch.arange(keep.shape[0], device=keep.device)[:, None]
    out = planes(tensor, dim)[:, rows, keep.clamp_min(0)]
    return out.masked_fill_((keep < 0)[..., None], fill).reshape(out_shape)
