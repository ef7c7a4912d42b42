"""What every operation shares: argument checks, per-row counts, the choice of a backend, norms."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "triton"]
Count = int | Sequence[int] | Tensor

BODIES: dict[str, Callable[..., Any]] = {}
"""What each operation runs, by its name in torch's dispatcher; the last argument is the backend."""


def operation(name: str, schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as the operation `vlmprune::name` of torch's dispatcher."""

    def register(body: Callable[..., Any]) -> Any:
        BODIES[f"vlmprune::{name}"] = body
        return torch.library.custom_op(f"vlmprune::{name}", body, mutates_args=(), schema=schema)

    return register


def resolve_backend(backend: str, x: Tensor) -> str:
    """Return "torch" or "triton"; raise when Triton is asked for where it cannot run."""
    if backend == "auto":
        return "triton" if x.is_cuda and importlib.util.find_spec("triton") else "torch"
    if backend == "triton" and not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"backend='triton' needs a CUDA tensor, got one on {x.device}; "
            "use backend='auto', or set TRITON_INTERPRET=1 before triton is imported"
        )
    if backend not in ("torch", "triton"):
        raise ValueError(f"unknown backend {backend!r}; choose 'auto', 'torch' or 'triton'")
    return backend


def bf16_needs_upcast(x: Tensor) -> bool:
    """Triton's interpreter holds bf16 as raw 16-bit integers, and its `tl.dot` multiplies those."""
    return x.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"


def check_tokens(name: str, x: Tensor, mask: Tensor | None = None) -> None:
    """Check a `[B, N, D]` floating tensor and its optional `[B, N]` bool mask."""
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"{name} must be a floating tensor of shape [B, N, D], got {x.dtype} {list(x.shape)}")
    check_mask(mask, x.shape[:2], x.device)


def check_mask(mask: Tensor | None, shape: Sequence[int], device: torch.device) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool or list(mask.shape) != list(shape) or mask.device != device:
        raise ValueError(
            f"mask must be a bool tensor of shape {list(shape)} on {device}, "
            f"got {mask.dtype} {list(mask.shape)} on {mask.device}"
        )


def row_counts(k: Count, max_k: int | None, like: Tensor) -> tuple[Tensor, int]:
    """Return the counts as an int64 tensor `[B]` on the device of `like` `[B, N, ...]`, and the output width.

    The width is the largest count, at most N. A tensor `k` on a GPU without `max_k` costs one host synchronisation.
    """
    batch, n = like.shape[:2]
    if isinstance(k, Tensor):
        if k.is_floating_point() or k.dtype == torch.bool or k.shape not in ((), (batch,)):
            raise ValueError(f"k must be an integer tensor of shape [{batch}], got {k.dtype} {list(k.shape)}")
        if max_k is None:
            max_k = int(k.max()) if k.numel() else 0
        if k.device.type == "cpu" and not torch.compiler.is_compiling() and k.numel() and int(k.min()) < 0:
            raise ValueError(f"k must not be negative, got {int(k.min())}")
        counts = k.to(like.device, torch.int64, non_blocking=True).expand(batch)
    elif isinstance(k, int):
        if isinstance(k, bool) or k < 0:
            raise ValueError(f"k must be a count >= 0, got {k!r}")
        counts = torch.full((batch,), k, dtype=torch.int64, device=like.device)
        max_k = k if max_k is None else min(k, max_k)
    else:
        rows = list(k)
        if len(rows) != batch or any(not isinstance(i, int) or i < 0 for i in rows):
            raise ValueError(f"k must be one count >= 0 per row ({batch} rows), got {rows!r}")
        counts = torch.tensor(rows, dtype=torch.int64, device="cpu").to(like.device, non_blocking=True)
        max_k = max(rows, default=0) if max_k is None else max_k
    width = max(0, min(max_k, n))
    return counts.clamp(0, width), width


class Directions(NamedTuple):
    """Rows `[B, N, D]` in fp32, and the inverse of their norms `[B, N]`: a product is scaled after it is taken, which
    costs N x N instead of a copy of N x D."""

    rows: Tensor
    inverse: Tensor


def directions(name: str, x: Tensor, mask: Tensor | None, eps: float) -> Directions:
    """Prepare `x` `[B, N, D]` for cosines; masked rows become zero.

    A norm below `eps` is raised to it, so a zero row stays similar to nothing. A valid row with NaN or inf raises on
    the CPU; on a GPU, where the check would cost a synchronisation, such a row becomes zero.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    good = torch.isfinite(norm)
    if x.device.type == "cpu":
        if not (good if mask is None else good | ~mask).all():
            raise ValueError(f"{name} holds NaN or inf in a valid row")
        if mask is None or mask.all():
            return Directions(x.float(), norm.clamp_min_(eps).reciprocal_())
    good = good if mask is None else good & mask
    rows = x.float().masked_fill(~good[..., None], 0.0)
    return Directions(rows, norm.masked_fill_(~good, 1.0).clamp_min_(eps).reciprocal_())
