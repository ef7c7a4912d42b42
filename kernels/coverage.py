"""Greedy maximum coverage (facility location): keep the tokens that together represent every row of a table best."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import Count, check_mask, check_tokens, operation, resolve_backend, row_counts

_STRIP = 64
_SMALL = 1 << 17
_SLACK = 1e-5  # more than the relative error of an fp32 sum


def coverage_select(
    visual: Tensor,
    k: Count,
    *,
    text: Tensor | None = None,
    visual_weight: float = 1.0,
    mask: Tensor | None = None,
    max_k: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Greedily pick `k` columns per item that maximise the coverage of the rows.

    The objective is f(S) = sum_i max_{j in S} text[i, j] + visual_weight * sum_i max_{j in S} visual[i, j] with
    f(empty) = 0, as in MMTok (arXiv 2508.18264, section 3: softmax-calibrated text-to-visual and visual-to-visual
    similarities). A row's gain is taken in fp32, the sum over rows in fp64, and the sums are compared in fp32, so
    that every backend decides alike. Ties go to the lowest index, also when no gain is left. A picked column is never
    a candidate again.

    Args:
        visual: `[B, R, N]` floating, usually R = N: how well column j represents row i. Negative entries count as 0.
        k: picks per item: an int, one int per row, or an integer tensor `[B]`. A row with fewer valid columns than
            its `k` yields all of them.
        text: `[B, M, N]` rows of weight 1, or None. Padding rows must be zero.
        visual_weight: the weight of the visual rows, >= 0.
        mask: `[B, N]` bool, True where a column may be picked. Rows are not masked: set padding rows to zero.
        max_k: the largest value in a tensor `k`, known on the host; without it a CUDA `k` costs a synchronisation.
        backend: "auto" (Triton on a GPU, torch elsewhere), "torch" or "triton".

    Returns:
        int64 `[B, K]` in the order of selection, K = min(largest k, N); rows with fewer picks are padded by -1.

    Raises:
        ValueError: on wrong shapes, counts or weights, and on NaN or inf in a valid column of a CPU table. On a GPU
            values are not inspected.
        RuntimeError: `backend="triton"` on a CPU tensor outside Triton's interpreter.
    """
    check_tokens("visual", visual)
    batch, _, n = visual.shape
    check_mask(mask, (batch, n), visual.device)
    if text is not None:
        check_tokens("text", text)
        if text.shape[0] != batch or text.shape[2] != n or text.device != visual.device:
            raise ValueError(
                f"text must be [{batch}, M, {n}] on {visual.device}, got {list(text.shape)} on {text.device}"
            )
    if not visual_weight >= 0.0:
        raise ValueError(f"visual_weight must be >= 0, got {visual_weight}")
    counts, width = row_counts(k, max_k, visual.mT)
    return _coverage_select(visual, text, visual_weight, counts, width, mask, resolve_backend(backend, visual))


@operation(
    "coverage_select",
    schema=(
        "(Tensor visual, Tensor? text, float weight, Tensor counts, int width, Tensor? mask, str backend) -> Tensor"
    ),
)
def _coverage_select(
    visual: Tensor, text: Tensor | None, weight: float, counts: Tensor, width: int, mask: Tensor | None, backend: str
) -> Tensor:
    picks = torch.full((visual.shape[0], width), -1, dtype=torch.int64, device=visual.device)
    if not picks.numel():
        return picks
    columns = stack_columns(visual, text, weight, mask)
    if mask is not None:
        counts = torch.minimum(counts, mask.sum(1))
    if backend == "triton":
        from . import triton_coverage

        return triton_coverage.coverage_select(columns, counts, picks, mask)
    select = _select_cpu if visual.device.type == "cpu" else coverage_reference
    return select(columns, counts, picks, mask)


@_coverage_select.register_fake
def _(
    visual: Tensor, text: Tensor | None, weight: float, counts: Tensor, width: int, mask: Tensor | None, backend: str
) -> Tensor:
    return visual.new_empty(visual.shape[0], width, dtype=torch.int64)


def stack_columns(visual: Tensor, text: Tensor | None, weight: float, mask: Tensor | None) -> Tensor:
    """fp32 `[B, N, R + M]`: column j of the whole table as row j, so that one candidate is one run of memory."""
    rows = visual.shape[1]
    out = visual.new_empty(
        visual.shape[0], visual.shape[2], rows + (0 if text is None else text.shape[1]), dtype=torch.float32
    )
    for i in range(0, rows, _STRIP):  # a transposed copy by strips stays in cache
        out[:, :, i : min(i + _STRIP, rows)] = visual[:, i : i + _STRIP].mT
    if weight != 1.0:
        out[:, :, :rows] *= weight
    if text is not None:
        out[:, :, rows:] = text.mT
    if mask is not None:
        out.masked_fill_(~mask[..., None], 0.0)
    if out.device.type == "cpu" and not torch.isfinite(out.sum()) and not torch.isfinite(out).all():
        raise ValueError("the table holds NaN or inf in a valid column")
    return out


def coverage_reference(columns: Tensor, counts: Tensor, picks: Tensor, mask: Tensor | None) -> Tensor:
    """The plain greedy loop on `[B, N, R]` columns, any device, without a host synchronisation; fills `picks`."""
    items = torch.arange(columns.shape[0], device=columns.device)
    covered, gains = torch.zeros_like(columns[:, :1]), torch.empty_like(columns)
    barred = torch.zeros_like(columns[:, :, 0]) if mask is None else torch.where(mask, 0.0, -torch.inf)
    for t in range(picks.shape[1]):
        gain = torch.maximum(columns, covered, out=gains).sub_(covered).sum(2, dtype=torch.float64).float()
        current = (gain + barred).argmax(1)
        picks[:, t] = torch.where(t < counts, current, -1)
        barred[items, current] = -torch.inf
        covered = torch.maximum(covered, columns[items, current, None])
    return picks


def _select_cpu(columns: Tensor, counts: Tensor, picks: Tensor, mask: Tensor | None, chunk: int = 32) -> Tensor:
    """The same picks by lazy evaluation (Minoux 1978): a gain can only shrink, so a stale one is an upper bound.

    A step evaluates the `chunk` best bounds, then four times as many, and so on, until no stale bound reaches the best
    gain found. An fp32 sum, raised by more than its error, is bound enough; only the few candidates within that error
    of the best are summed in fp64. Many small items at once are quicker without the bookkeeping.
    """
    batch, n, rows = columns.shape
    if batch > 1 and n * rows <= _SMALL:
        return coverage_reference(columns, counts, picks, mask)
    scratch = torch.empty_like(columns[0])
    for item, (table, out) in enumerate(zip(columns, picks, strict=True)):
        covered, chosen = torch.zeros_like(table[0]), []
        bound = torch.cat([part.clamp_min(0.0).sum(1) for part in table.split(_STRIP)]).mul_(1 + _SLACK)
        left = n
        if mask is not None:
            left = int(mask[item].sum())
            bound.masked_fill_(~mask[item], -1.0)
        for t in range(int(counts[item])):
            stale, size, least = bound.clone(), min(chunk, left - t), 0.0
            candidates = bound.topk(size).indices
            while len(candidates):
                gains = _gains(table, covered, candidates, scratch).sum(1)
                least = max(least, float(gains.max()) * (1 - _SLACK))
                bound.index_copy_(0, candidates, gains.mul_(1 + _SLACK))
                stale.index_fill_(0, candidates, -1.0)
                candidates, size = (stale >= least).nonzero()[:, 0], 4 * size
                if len(candidates) > size:
                    candidates = stale.topk(size).indices
            candidates = (bound >= least).nonzero()[:, 0]
            if least == 0.0:  # nothing is left to gain
                chosen += candidates[: int(counts[item]) - t].tolist()
                break
            best = 0
            if len(candidates) > 1:  # they ascend, so ties go to the lowest
                best = int(_gains(table, covered, candidates, scratch).sum(1, dtype=torch.float64).float().argmax())
            current = int(candidates[best])
            chosen.append(current)
            bound[current] = -1.0
            torch.maximum(covered, table[current], out=covered)
        out[: len(chosen)] = torch.tensor(chosen, dtype=torch.int64, device="cpu")
    return picks


def _gains(table: Tensor, covered: Tensor, candidates: Tensor, scratch: Tensor) -> Tensor:
    """What each candidate would add to every row."""
    union = torch.index_select(table, 0, candidates, out=scratch[: len(candidates)])
    return torch.maximum(union, covered, out=union).sub_(covered)
