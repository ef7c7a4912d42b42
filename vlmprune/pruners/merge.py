from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmprune.contract import Keep, Positions, Pruner, Selection, Sizes, VisualTokens
from vlmprune.kernels import merge_tokens, nearest_target
from vlmprune.pruners._places import placed
from vlmprune.pruners._wrap import Wrapper

_BY_ITSELF = "{} merges what it drops by itself: use it without Merge"


@dataclass(init=False)
class Merge(Wrapper):
    """The choice of another method, with what it drops folded in: `Merge(DivPrune(keep=0.1))`.

    Every dropped token joins the kept token nearest by cosine (fp32, of what the language model would see there), and
    a kept token becomes the mean of itself and those that joined it. The kept indices are the inner method's, and the
    sequence stays as short. Line breaks join nobody, and nobody joins them. A method of several stages merges at each;
    a row that stands for several tokens counts once at the next.

    What leaves a KV cache later leaves for good.

    Raises:
        ValueError: the inner method merges by itself (some tell only at the first prompt).
    """

    name: ClassVar[str] = "merge"
    paper: ClassVar[str] = "wrapper"

    def __init__(self, pruner: Pruner, *, keep: Keep | None = None, positions: Positions | None = None) -> None:
        super().__init__(pruner, keep=keep, positions=positions)
        if "encoder_kept" in pruner.needs:
            raise ValueError(_BY_ITSELF.format(pruner.name))

    def selection_flops(self, sizes: Sizes) -> int | None:
        inner = self.pruner.selection_flops(sizes)
        return None if inner is None else inner + fold_flops(sizes)

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        choice = self.pruner.select(tokens, budget)
        if choice.features is not None:
            raise ValueError(_BY_ITSELF.format(self.pruner.name))
        return fold(tokens, choice.index)


def fold_flops(sizes: Sizes) -> int:
    """Products of `fold`: everybody's cosine to the kept tokens."""
    return 2 * sizes.tokens * sizes.keep * sizes.width


def fold(tokens: VisualTokens, index: Tensor) -> Selection:
    """The tokens at `index` (int64 [I, K], -1 for none) as means of themselves and the dropped ones nearest to them."""
    places = placed(tokens)
    joinable = places.gather(1, index.clamp(min=0))
    into = nearest_target(tokens.features.detach(), index, mask=tokens.valid, candidates=joinable)
    into = into.masked_fill(~places, -1)
    rows, size = merge_tokens(tokens.features, index, into)
    return Selection(index, rows, size > 1)
