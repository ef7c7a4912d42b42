from __future__ import annotations

import functools
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from vlmprune.contract import Keep, Positions, Presets, Pruner, Selection, Sizes, VisualTokens
from vlmprune.pruners._contextual import (
    Merge,
    Query,
    check_choices,
    contextual_count,
    decoder_stage,
    encoder_needs,
    encoder_stage,
    encoder_stage_flops,
)
from vlmprune.pruners._schedule import nearest_power, stage_layers
from vlmprune.registry import register_pruner


class Stage(NamedTuple):
    """What is left behind a stage: so many dominant tokens (the CLS row among them) and contextual ones."""

    layer: int
    dominant: int
    contextual: int


@register_pruner
@dataclass(kw_only=True)
class VisionDrop(Pruner):
    """Keep what visual tokens attend to and fold the rest into a few, behind the encoder and at three decoder layers.

    Xu et al., "Rethinking Visual Token Reduction in LVLMs under Cross-modal Misalignment", AAAI 2026, arXiv 2506.22283.
    Training-free, blind to the question. Every stage keeps the tokens of largest score (dominant); of the others, at
    even distances, some become targets, and each of the rest joins the target whose key is most similar (cosine).

    - Behind the encoder, before the projector (layer 0): score = attention of CLS, mean over heads, in the layer that
      makes the features; keys of that layer. The CLS row is one of the dominant tokens and goes through the projector.
    - Before decoder layers 8, 16 and 24 of 32: score = attention received from the item's own tokens in the layer that
      follows, causal, softmax over all keys, mean over heads and over these tokens; its keys behind RoPE; the merge is
      of hidden states.

    `keep` is the average over the decoder layers. The published schedule for 32 of LLaVA-1.5's 576 tokens has 48 / 35 /
    26 / 19 at its four groups of layers, about 1.5 times the average and then 0.73 of the stage before. Other averages
    follow the same recipe, with a milder ratio where the first stage would need more tokens than there are; 1/8 of the
    tokens behind the encoder and 2/13 later are contextual, as published.

    As in the official code, a contextual token is its target *plus* the mean of those that join it. Unlike it: a
    contextual token stands where its target stood, the CLS row at the first place that its picture does not keep,
    instead of behind and before all others; several pictures (thumbnail and tiles, frames) are each reduced alone
    behind the encoder, by size, and go through the decoder as one item; a stage with nothing to merge, or fewer tokens
    than targets, works; keys are shared by their group of heads (GQA); scores are in fp32. Towers without CLS rank by
    the attention received from all patches, as the paper does.

    Attributes:
        stages: decoder layers of 32 before which it chooses; none: behind the encoder alone.
        ratio: tokens behind a stage, of those behind the one before. The authors start video at 3 times the average,
            which is about 0.25.
        contextual: share of the kept tokens that are contextual, behind the encoder and later.
        query: "cls" or "all" (attention received from all patches); "auto": CLS where there is one.
        merge: "sum" (published) or "average": a contextual token is the mean of target and joiners.
        renormalise: in the decoder, softmax over the item's own tokens alone, a strict reading of the paper's visual
            subspace; the official code takes it over all keys.
        rotated: in the decoder, whether keys are compared behind RoPE, as in the official code.
        keep_cls: whether a kept CLS row takes one of the places.
    """

    keep: Keep = 0.0556
    positions: Positions = "compact"
    stages: tuple[int, ...] = (8, 16, 24)
    ratio: float = 0.73
    contextual: tuple[float, float] = (1 / 8, 2 / 13)
    query: Query = "auto"
    merge: Merge = "sum"
    renormalise: bool = False
    rotated: bool = True
    keep_cls: bool = True

    name: ClassVar[str] = "visiondrop"
    paper: ClassVar[str] = "arXiv 2506.22283"
    stage: ClassVar[str] = "boundary, decoder"
    otherwise: ClassVar[str] = 'set query="auto", which ranks by the attention received where there is no CLS token'
    presets: ClassVar[Presets] = {"llava-1.5": {32: {"keep": 32}}}  # of no other are the stages known

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self.query, self.merge)
        if list(self.stages) != sorted(set(self.stages)) or not all(0 < layer < 32 for layer in self.stages):
            raise ValueError(f"stages must be ascending layers of a 32-layer decoder, 1 to 31, got {self.stages!r}")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be in (0, 1], got {self.ratio!r}")
        if len(self.contextual) != 2 or not all(0 <= share < 1 for share in self.contextual):
            raise ValueError(f"contextual must be two shares in [0, 1) of the kept tokens, got {self.contextual!r}")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        needs = encoder_needs(self.query, self.keep_cls)
        return needs | set(self._late) if self.stages else needs

    @property
    def _late(self) -> tuple[str, str]:
        """Signals of the stages in the decoder: scores and keys."""
        scores = "next_inner_attention" if self.renormalise else "next_visual_attention"
        return scores, "next_keys" if self.rotated else "next_plain_keys"

    def layers(self, depth: int) -> tuple[int, ...]:
        return (0, *stage_layers(self.stages, depth))

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 32) -> list[int]:
        layers = self.layers(depth)
        return [stage_sizes(count, self.keep, layers, self.ratio, depth)[layers.index(layer)] for count in counts]

    def schedule(self, count: int, depth: int = 32) -> list[Stage]:
        """What is left of an item's `count` tokens behind each stage in a decoder of `depth` layers."""
        layers = self.layers(depth)
        sizes = stage_sizes(count, self.keep, layers, self.ratio, depth)
        before = (count, *sizes[:-1])
        late = [self._contextual(kept, at) if kept < came else 0 for at, kept, came in zip(layers, sizes, before)]
        return [Stage(layer, kept - merged, merged) for layer, kept, merged in zip(layers, sizes, late)]

    def selection_flops(self, sizes: Sizes) -> int:
        share = functools.partial(self._contextual, layer=sizes.layer)
        if sizes.layer == 0:
            return encoder_stage_flops(sizes, share)
        return 2 * sizes.tokens * share(sizes.keep) * sizes.decoder_key

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        share = functools.partial(self._contextual, layer=tokens.layer)
        if tokens.layer == 0:
            return encoder_stage(tokens, budget, share, query=self.query, merge=self.merge, keep_cls=self.keep_cls)
        scores, keys = map(tokens.signal, self._late)
        return decoder_stage(tokens, scores, keys, budget, share, self.merge)

    def _contextual(self, kept: int, layer: int) -> int:
        share = self.contextual[layer > 0]
        return contextual_count(kept, round(share * kept)) if share else 0


@functools.lru_cache(maxsize=4096, typed=True)  # typed: keep 1 is a token, keep 1.0 all of them
def stage_sizes(count: int, keep: Keep, layers: tuple[int, ...], ratio: float, depth: int) -> tuple[int, ...]:
    """Tokens of `count` left behind each stage, so that the average over all `depth` layers is nearest to `keep`.

    Behind stage s are `first * ratio^s`; where `first` would exceed `count`, it is `count` and the ratio grows, to 1 at
    keep 1.0.

    Args:
        layers: decoder layers before which tokens go, the first of them 0.
    """
    target = min(keep, count) if isinstance(keep, numbers.Integral) else keep * count
    if target >= count:
        return (count,) * len(layers)
    lengths = [stop - start for start, stop in zip(layers, (*layers[1:], depth))]

    def sizes(power: float) -> tuple[int, ...]:
        first, shrink = count / max(power, 1), ratio ** min(power, 1)
        return tuple(round(first * shrink**stage) for stage in range(len(layers)))

    def average(sizes: Sequence[int]) -> float:
        return sum(length * size for length, size in zip(lengths, sizes)) / depth

    return tuple(nearest_power(sizes, average, target))
