from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmprune.contract import Keep, Positions, Selection, Sizes, VisualTokens
from vlmprune.pruners._schedule import StagedPruner, truncate
from vlmprune.pruners._top import top_indices
from vlmprune.registry import register_pruner


@register_pruner
@dataclass(kw_only=True)
class CoreMatching(StagedPruner):
    """Keep the visual tokens whose feed-forward neurons fire together with those of the question's last word.

    Wang et al., "CoreMatching: A Co-adaptive Sparse Inference Framework with Token and Neuron Pruning for Comprehensive
    Acceleration of Vision-Language Models", ICML 2025, arXiv 2505.19235; its token half. Training-free. The neuron
    half, which gathers weight columns per request, is no matter of tokens.

    A token's score is the number of neurons of one layer's gated product (what enters `down_proj`) that are positive
    for both it and the last word of the question (`co_activation`), as in the official code. `match="core"` is the
    paper: instead of that word's, the core neurons of the prompt (its percentiles are not known: 40 % are taken for
    a token's and for the prompt's). The layer is the one before `layer_list`: a
    quarter of the depth, 8 of 32, where the code re-selects in layers 5 to 18 and zeroes keys and values instead of
    removing the tokens. Positions original.

    `keep` is the average over layers; the default keeps the 40 % that the code names as alternative. `elbow=True` is
    the published choice: scores above the point of the sorted curve farthest from its chord (`elbow_value`). Ties fall
    with it, so that equal scores would keep nothing: 5 % stay at least, and one token. The count then depends on the
    image, and `keep` only spares: with 1.0, or an image of no more tokens than a count, all stay.
    """

    keep: Keep = (9 + 23 * 0.4) / 32
    positions: Positions = "original"
    layer_list: tuple[int, ...] = (9,)
    ratios: tuple[float, ...] = (0.4,)
    elbow: bool = False
    match: Literal["word", "core"] = "word"

    name: ClassVar[str] = "corematching"
    paper: ClassVar[str] = "arXiv 2505.19235"
    stage: ClassVar[str] = "decoder"
    query_aware: ClassVar[bool] = True
    otherwise: ClassVar[str] = "use a method that ranks by attention, such as fastv"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.match not in ("word", "core"):
            raise ValueError(f'corematching\'s match is "word" or "core", got {self.match!r}')

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({self._overlap})

    @property
    def _overlap(self) -> str:
        return "activation_overlap" if self.match == "word" else "core_overlap"

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 32) -> Sequence[int | None]:
        if not self.elbow:
            return super().budget(counts, layer, depth)
        return self._undecided(counts, layer, depth)

    def selection_flops(self, sizes: Sizes) -> int:
        return 0

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        score = tokens.signal(self._overlap).masked_fill(~tokens.valid, -1)
        if not self.elbow:
            return Selection(top_indices(score, budget))
        kept = [elbow_indices(each[:count]) for each, count in zip(score, tokens.counts)]
        return Selection(pad_sequence(kept, batch_first=True, padding_value=-1))


def co_activation(activations: Tensor, query: Tensor) -> Tensor:
    """fp32 [..., N]: neurons positive in both a row of `activations` [..., N, F] and `query` [..., F]."""
    return ((activations > 0).float() @ (query > 0).float()[..., None])[..., 0]


def elbow_value(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The elbow of `scores` [n] sorted in descending order: its index there, int64 [], and its score, [].

    The point of the curve (i, y_i) with the largest distance to the line from the first to the last point; the first of
    equals.
    """
    y = scores.double().sort(descending=True).values
    x = torch.arange(len(y), dtype=y.dtype, device=y.device)
    # The cross product with the chord; its length divides all alike.
    index = (x * (y[-1] - y[0]) - (y - y[0]) * (len(y) - 1)).abs().argmax()
    return index, y[index].to(scores.dtype)


def elbow_indices(scores: Tensor) -> Tensor:
    """int64 [K], descending: tokens that score above the elbow of `scores` [n]; max(1, 5 %) of them at least."""
    _, value = elbow_value(scores)
    above = int((scores > value).sum())
    order = scores.sort(descending=True, stable=True).indices
    return order[: max(above, 1, truncate(0.05 * len(scores)))]
