from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from vlmprune.contract import Keep, Positions, Presets, Pruner, Selection, Sizes, VisualTokens
from vlmprune.kernels import dpp_flops, dpp_select, gram_flops, pairwise_cosine
from vlmprune.pruners._places import fill_up, pictures, placed, remaining
from vlmprune.pruners.scope import Given, PerFrame, PerTile, given_scores
from vlmprune.registry import register_pruner

Scope = Literal["per_image", "per_crop"]


@register_pruner
@dataclass(kw_only=True)
class CDPruner(Pruner):
    """Keep tokens that are relevant to the question and differ from each other: greedy MAP of a conditional DPP.

    Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", NeurIPS
    2025, arXiv 2506.10967. Training-free. The kernel is diag(r) S diag(r) with S the cosines between visual tokens and
    r their relevance, min-max normalised: see `instruction_relevance`, `normalise` and `cdpruner_select`.

    Without `relevance`, r is the cosine of each token with the mean input embedding of the question's words, as
    published for models without a text tower of their own (Qwen2.5-VL, InternVL; the question alone, without system
    prompt and template). For LLaVA the paper uses CLIP's image-text cosines: give them as `relevance`, with `sign=-1`
    as in the official code, whose authors found CLIP's to be inverted. Published per crop on LLaVA-NeXT and per frame
    on video (`PerTile`, `PerFrame`). Published positions compact (M-RoPE families: original).

    Unlike the official code: minimum and maximum are an item's own, not the batch's; a constant relevance counts as 1;
    once the picks span the item (duplicates, more picks than dimensions) the rest goes by relevance instead of NaN;
    line breaks are no candidates; a ratio rounds half to even.

    Args:
        theta: weight of the relevance in [0, 1), r <- exp(r theta / (2 (1 - theta))); 0 is the plain DPP. None: r
            itself, as in the released code.
        sign: +1, or -1 where high similarity means low relevance.
        relevance_norm: minimum and maximum over the item ("per_image") or each of its pictures ("per_crop").
        relevance: similarity of every token with the question, from elsewhere: [I, N], one row for each item of the
            prompts in order, in the order of its tokens; or a function that gives it for the items (of those that
            lose tokens) in a `VisualTokens`, such as `patch_relevance` makes of CLIP's patch scores.
    """

    keep: Keep = 64
    positions: Positions = "compact"
    theta: float | None = None
    sign: int = 1
    relevance_norm: Scope = "per_image"
    relevance: Given | None = field(default=None, repr=False, compare=False)

    name: ClassVar[str] = "cdpruner"
    paper: ClassVar[str] = "arXiv 2506.10967"
    query_aware: ClassVar[bool] = True
    presets: ClassVar[Presets] = {
        "llava-1.5": {tokens: {"keep": tokens, "sign": -1} for tokens in (64, 32, 128)},
        # Per crop: 64, 32 or 128 of each one's 576.
        "llava-next": {tokens: {"keep": tokens / 2880, "sign": -1} for tokens in (320, 160, 640)},
        "llava-video": {tokens: {"keep": tokens / 169} for tokens in (32, 16, 64)},  # of each frame's 169
        "qwen2.5-vl": {tokens: {"keep": tokens, "positions": "original"} for tokens in (256, 128, 512)},  # of 1296
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.theta is not None and not 0 <= self.theta < 1:
            raise ValueError(f"cdpruner needs theta in [0, 1) or None, got {self.theta!r}")
        if self.sign not in (1, -1):
            raise ValueError(f"cdpruner's sign is 1 or -1, got {self.sign!r}")
        if self.relevance_norm not in get_args(Scope):
            raise ValueError(f'cdpruner\'s relevance_norm is "per_image" or "per_crop", got {self.relevance_norm!r}')

    @classmethod
    def preset(cls, name: str, average_tokens: float | None = None, **fields: Any) -> Pruner:
        pruner = super().preset(name, average_tokens, **fields)
        if isinstance(pruner, CDPruner) and pruner.sign < 0 and pruner.relevance is None:
            raise ValueError(f"cdpruner's preset {name!r} needs relevance=, the image-text similarity of CLIP")
        if name == "llava-video":
            return PerFrame(pruner)
        return PerTile(pruner) if name == "llava-next" else pruner

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset() if self.relevance is not None else frozenset({"instruction", "instruction_mask"})

    def selection_flops(self, sizes: Sizes) -> int | None:
        question = 0 if self.relevance is not None else 2 * sizes.tokens * sizes.width
        return question + gram_flops(sizes.tokens, sizes.width) + dpp_flops(sizes.tokens, sizes.keep)

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        mask = placed(tokens)
        groups = None
        if self.relevance_norm == "per_crop":
            groups = remaining(tokens, [pictures(shape).clamp(min=0) for shape in tokens.shapes])
        relevance = normalise(self.sign * self._relevance(tokens), mask, theta=self.theta, groups=groups)
        index = cdpruner_select(tokens.features, relevance, budget, mask=mask)
        return Selection(fill_up(index, tokens, budget))

    def _relevance(self, tokens: VisualTokens) -> Tensor:
        if self.relevance is None:
            words, real = tokens.signal("instruction").float(), tokens.signal("instruction_mask")
            mean = (words * real[..., None]).sum(1, keepdim=True) / real.sum(1).clamp(min=1)[:, None, None]
            return instruction_relevance(tokens.features.float(), mean)
        return given_scores(tokens, self.relevance, self.name)


def patch_relevance(scores: Tensor, grid: tuple[int, int]) -> Callable[[VisualTokens], Tensor]:
    """`relevance` out of scores of patches: `CDPruner(relevance=patch_relevance(*scorer.patches(images, question)))`.

    Every token reads the score at its middle, bilinear between those of the patches; line breaks get 0. The patches
    must cover the picture that the model sees (no crop), and a plane of tokens must show the whole of it: that holds
    for all families but InternVL with several tiles.

    Args:
        scores: [J, P], row j for the j-th image or frame of the prompts, in order, P patches in raster order.
        grid: (rows, columns) of the patches.

    Raises:
        ValueError: when called for items that do not have J images and frames.
    """
    rows, cols = grid
    if scores.dim() != 2 or scores.shape[1] != rows * cols:
        raise ValueError(f"patch scores must be [J, {rows * cols}] for a grid of {rows} x {cols}: {list(scores.shape)}")
    maps = scores.float().view(-1, 1, rows, cols)

    def relevance(tokens: VisualTokens) -> Tensor:
        frames = [len(shape.grids) if shape.kind == "video" else 1 for shape in tokens.shapes]
        if sum(frames) != len(maps):
            raise ValueError(
                f"there are patch scores of {len(maps)} pictures, and the prompts have {sum(frames)} images and frames"
            )
        tables, first = [], 0
        for shape, count in zip(tokens.shapes, frames):
            size = torch.tensor(shape.grids, device="cpu")[shape.plane]
            # grid_sample's coordinates: -1 and 1 are the picture's edges.
            place = torch.stack([shape.col + 0.5, shape.row + 0.5], 1) / size.flip(1) * 2 - 1
            table = torch.zeros(len(shape), device="cpu")
            for number in range(count):
                here = ~shape.placeless & ((shape.plane == number) | (count == 1))
                picture = maps[first + number, None].cpu()
                table[here] = grid_sample(
                    picture, place[here][None, None], mode="bilinear", padding_mode="border", align_corners=False
                )[0, 0, 0]
            tables.append(table)
            first += count
        return remaining(tokens, tables)

    return relevance


@torch.no_grad()
def instruction_relevance(embeds: Tensor, text: Tensor) -> Tensor:
    """r_i = mean over m of cos(E_i, Q_m): fp32 [I, N] of embeddings E [I, N, C] and Q [I, M, C] in one space."""
    return pairwise_cosine(embeds, text).mean(2)


@torch.no_grad()
def normalise(
    relevance: Tensor, mask: Tensor | None = None, *, theta: float | None = None, groups: Tensor | None = None
) -> Tensor:
    """Relevance [I, N] to (r - min + 1e-6) / (max - min), over each item or each of its groups; fp32 [I, N].

    Args:
        mask: bool [I, N], the tokens that count; None: all. Others get 0.
        theta: then r <- exp(alpha r) with alpha = theta / (2 (1 - theta)); None: not.
        groups: int64 [I, N], from 0 to N - 1: minimum and maximum over the tokens of the same group.
    """
    relevance = relevance.float()
    mask = torch.ones_like(relevance, dtype=torch.bool) if mask is None else mask
    groups = torch.zeros_like(relevance, dtype=torch.int64) if groups is None else groups
    empty = torch.full_like(relevance, torch.inf)
    low = empty.scatter_reduce(1, groups, relevance.masked_fill(~mask, torch.inf), "amin").gather(1, groups)
    high = (-empty).scatter_reduce(1, groups, relevance.masked_fill(~mask, -torch.inf), "amax").gather(1, groups)
    scaled = torch.where(high > low, (relevance - low + 1e-6) / (high - low), 1.0)
    if theta is not None:
        scaled = (scaled * (theta / (2 * (1 - theta)))).exp()
    return scaled.masked_fill(~mask, 0.0)


@torch.no_grad()
def cdpruner_select(
    features: Tensor, relevance: Tensor, k: Tensor, *, mask: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Greedy MAP of the DPP with kernel K = diag(r) S diag(r), S the cosines of `features`, in the order of selection.

    Args:
        features: [I, N, D].
        relevance: fp32 [I, N], as `normalise` gives it.
        k: int64 [I], picks of each item.
        mask: bool [I, N], which rows are candidates; None: all.
        backend: of the kernels.

    Returns:
        int64 [I, K], -1 behind an item's last.
    """
    similarity = pairwise_cosine(features, mask=mask, backend=backend)
    return dpp_select(similarity, k, quality=relevance, mask=mask, backend=backend)
