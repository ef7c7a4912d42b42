from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.nn.utils.rnn import pad_sequence

from vlmprune.contract import Keep, Positions, Presets, Pruner, Selection, VisualTokens
from vlmprune.pruners._windows import SIDE, TIME, Windows
from vlmprune.pruners.scope import Given, given_scores
from vlmprune.registry import register_pruner

BLOCK = 1 << 26  # entries of windows' rows held at a time, 256 MiB in fp32


def scaled_dot(embeddings: Tensor, guide: Tensor) -> Tensor:
    """fp32 [..., N]: g . E_j / sqrt(Q) of embeddings [..., N, Q] and a guide [..., Q]."""
    return (embeddings.float() * guide.float()[..., None, :]).sum(-1) / embeddings.shape[-1] ** 0.5


def cosine_logits(embeddings: Tensor, guide: Tensor, scale: float) -> Tensor:
    """fp32 [..., N]: exp(scale) cos(g, E_j), as CLIP and SigLIP weigh it; their bias cancels in a softmax."""
    return cosine_similarity(embeddings.float(), guide.float()[..., None, :], dim=-1) * math.exp(scale)


def pool(features: Tensor, logits: Tensor, members: Tensor) -> Tensor:
    """fp32 [W, D]: sum_j A_j F_j of every window, A the softmax of its members' logits.

    Args:
        features: [N, D].
        logits: fp32 [N].
        members: int64 [W, E], -1 behind a window's last.
    """
    step = max(1, BLOCK // max(1, members.shape[1] * features.shape[1]))
    parts = []
    for some in members.split(step):
        there = some >= 0
        weights = logits[some.clamp(min=0)].masked_fill(~there, -torch.inf).softmax(1)
        rows = features[some.clamp(min=0)].float()
        parts.append((weights[:, None] @ rows)[:, 0])
    return torch.cat(parts)


def mean_instruction(tokens: VisualTokens) -> Tensor:
    """fp32 [I, D]: mean input embedding of the words of each item's question; 0 where there are none."""
    words, real = tokens.signal("instruction").float(), tokens.signal("instruction_mask")
    return (words * real[..., None]).sum(1) / real.sum(1).clamp(min=1)[:, None]


@register_pruner
@dataclass(kw_only=True)
class HIComLocal(Pruner):
    """Pool small windows of space and time, each token weighed by how well it fits the question.

    The local branch of HICom (arXiv 2503.16036, CVPR 2025) without its training: not the published model, a stand-in
    for `hicom`. Within each window A = softmax_j(g . E_j / sqrt(D)) and the row is sum_j A_j F_j. F and E are the
    projected tokens and g is the mean input embedding of the question's words, where HICom's own are SigLIP's patch and
    text embeddings; give CLIP's cosines as `relevance` to come closer. There are no global tokens.

    Published windows are 4 frames x 3 x 3 patches (an image: 3 x 3). With `kernel` they are exactly these, and the
    count follows from the grid: a `keep` of less than all then has no further say. Without it `keep` is exact, and
    makes the windows c (4, 3, 3) long with the c that it takes; the default, 1/36, gives the published ones on a video
    whose sides they divide. Windows that do not divide a side overlap by one (`axis_windows`). A row stands at its
    window's middle token. Line breaks stay only where `keep` has room for them after all places; positions as published
    compact.

    Attributes:
        kernel: frames, and rows and columns, of a window; None: what `keep` asks for.
        scale: logits are exp(scale) times cosines instead of scaled dot products.
        relevance: cosines from elsewhere, as `CDPruner` takes them (`patch_relevance` makes them of CLIP's patches);
            needs `scale`, CLIP's is about 4.6.
    """

    keep: Keep = 1 / (TIME * SIDE * SIDE)
    positions: Positions = "compact"
    kernel: tuple[int, int] | None = None
    scale: float | None = None
    relevance: Given | None = field(default=None, repr=False, compare=False)

    name: ClassVar[str] = "hicom_local"
    paper: ClassVar[str] = "after arXiv 2503.16036, without its training"
    query_aware: ClassVar[bool] = True
    # 32 frames of 27 x 27 patches in windows of 4 x 3 x 3
    presets: ClassVar[Presets] = {"local43": {648: {"kernel": (TIME, SIDE)}}}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kernel(self.name, self.kernel)
        if self.relevance is not None and self.scale is None:
            raise ValueError(
                "hicom_local weighs a given relevance by exp(scale): set scale= as well, CLIP's is about 4.6"
            )

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset() if self.relevance is not None else frozenset({"instruction", "instruction_mask"})

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 1) -> Sequence[int | None]:
        plain = super().budget(counts, layer, depth)
        return (
            plain if self.kernel is None else [count if keep == count else None for keep, count in zip(plain, counts)]
        )

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        logits = self._logits(tokens)
        chosen = [
            _local(tokens, item, keep, self.kernel, logits[item], tokens.features[item])
            for item, keep in enumerate(budget.tolist())
        ]
        index, rows, merged = (pad_sequence(list(each), batch_first=True) for each in zip(*chosen))
        counts = torch.tensor([len(each) for each, _, _ in chosen]).to(index.device, non_blocking=True)
        real = torch.arange(index.shape[1], device=index.device) < counts[:, None]
        return Selection(index.masked_fill(~real, -1), rows, merged)

    def _logits(self, tokens: VisualTokens) -> Tensor:
        """fp32 [I, N]."""
        if self.relevance is not None:
            assert self.scale is not None
            given = given_scores(tokens, self.relevance, self.name)
            return given * math.exp(self.scale)
        guide = mean_instruction(tokens)
        if self.scale is None:
            return scaled_dot(tokens.features, guide)
        return cosine_logits(tokens.features, guide, self.scale)


def check_kernel(name: str, kernel: tuple[int, int] | None) -> None:
    """Raise ValueError, with one sentence, on anything but None or two counts of at least 1."""
    if kernel is None:
        return
    good = isinstance(kernel, Sequence) and not isinstance(kernel, str) and len(kernel) == 2
    if not good or not all(type(side) is int and side >= 1 for side in kernel):
        raise ValueError(f"{name} needs kernel=(frames, rows and columns), such as ({TIME}, {SIDE}), got {kernel!r}")


def _local(
    tokens: VisualTokens, item: int, keep: int, kernel: tuple[int, int] | None, logits: Tensor, features: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One item's windows: int64 [K] indices, [K, D] rows in the dtype of `features`, bool [K] which were merged."""
    geometry, device = tokens.geometry[item], features.device
    places = int((~geometry.placeless).sum())
    count = min(keep, places)
    windows = Windows.of_count(geometry, count) if kernel is None else Windows.of_kernel(geometry, *kernel)
    spare = keep - count if kernel is None else 0
    loose = geometry.placeless.nonzero().flatten()[:spare]
    index = torch.cat([windows.middle, loose]).to(device, non_blocking=True)
    merged = torch.cat([(windows.members >= 0).sum(1) > 1, torch.zeros(len(loose), dtype=torch.bool)])
    rows = pool(features, logits, windows.members.to(device, non_blocking=True)).to(features.dtype)
    rows = torch.cat([rows, features[index[len(windows) :]]])
    return index, rows, merged.to(device, non_blocking=True)
