from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.contract import Keep, Presets, Selection, Sizes, VisualTokens
from vlmprune.pruners._schedule import outer_and_inner, stage_layers
from vlmprune.pruners._segments import ATTENTION, BLOCK, apportion, clusters, distance_flops, means, scenes, total_of
from vlmprune.pruners._top import top_indices
from vlmprune.pruners._video import FrameMethod, first_true
from vlmprune.registry import register_pruner


@register_pruner
@dataclass(kw_only=True)
class FlashVID(FrameMethod):
    """Keep attended and diverse tokens of each frame, grow the others into trees over time, cluster these, cut late.

    "FlashVID: Efficient Video Large Language Models via Training-free Tree-based Spatiotemporal Token Merging", ICLR
    2026, arXiv 2602.08024. Training-free; the cut inside the decoder listens to the question.

    At the boundary, `selected` of a frame's budget goes to ADTS: greedy max-min diversity, where the distance to a
    candidate is 1 - cosine, times its vision attention and, with `events`, its mean product with the frames of its
    scene. The rest goes to TSTM: every token that is left joins the most similar one of the frame before, anywhere in
    it, if their cosine exceeds `similarity` (raised where a scene would be left with fewer tokens than its budget); a
    tree becomes one token at its root, and density-peak clustering of each frame's roots makes as many as there is
    budget for. Before layer `layer`, the share `inner` that the last token attends to most stays.

    `keep` is the average over the layers; the budget at the boundary follows from it, 1.25 times `keep` for the
    published layers. It is exact here: frames get equal shares (the first ones the remainder), and roots are clustered
    to a scene's budget by largest remainders; the official code rounds up several times.

    Corrected against the official code: a tree is the mean of all its members, and a cluster that of its trees weighted
    by their size (there sizes are lost, and a still scene grows in norm with every frame); no token is both selected
    and merged; none is selected twice where products are negative; a frame of few roots is clustered by density all
    the same; at most as many scenes as frames.

    Attributes:
        selected: share of the budget at the boundary that is ADTS (alpha).
        similarity: least cosine of a link.
        least_scenes, threshold: scenes there are at least, and the cosine of neighbouring frames below which one ends.
        events: whether ADTS weighs candidates by their scene (published for LLaVA, not for Qwen-VL).
        layer, inner: the cut in the decoder of `model_depth` layers (scaled to others) and the share it leaves, rounded
            up.
    """

    keep: Keep = 0.1
    selected: float = 0.7
    similarity: float = 0.8
    least_scenes: int = 8
    threshold: float = 0.9
    events: bool = True
    layer: int = 20
    inner: float = 0.3
    model_depth: int = 28

    name: ClassVar[str] = "flashvid"
    paper: ClassVar[str] = "arXiv 2602.08024"
    stage: ClassVar[str] = "boundary, decoder"
    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION, "last_attention"})
    query_aware: ClassVar[bool] = True
    presets: ClassVar[Presets] = {  # "llava": OneVision and Video
        "llava": {0.1: {}},
        "qwen2.5-vl": {0.1: {"events": False, "least_scenes": 4}},
        "qwen3-vl": {0.1: {"events": False, "least_scenes": 4, "layer": 28, "inner": 0.1, "model_depth": 36}},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.selected <= 1 and 0 <= self.inner <= 1):
            raise ValueError(f"flashvid needs selected and inner in [0, 1], got {self.selected!r} and {self.inner!r}")
        if self.least_scenes < 1:
            raise ValueError(f"flashvid needs least_scenes of at least 1, got {self.least_scenes!r}")
        if not 1 <= self.layer < self.model_depth:
            raise ValueError(f"flashvid needs a layer from 1 to {self.model_depth - 1}, got {self.layer!r}")

    def layers(self, depth: int) -> tuple[int, ...]:
        return (0, *stage_layers((self.layer,), depth, self.model_depth))

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 28) -> list[int]:
        cut = self.layers(depth)[-1]
        return [outer_and_inner(count, self.keep, cut, self.inner, depth)[layer > 0] for count in counts]

    def selection_flops(self, sizes: Sizes) -> int:
        if sizes.layer:
            return 0
        size = sizes.tokens // sizes.frames
        alike = 2 * size**2 * sizes.width
        eventful = 2 * sizes.tokens * sizes.width * self.events
        return eventful + (2 * sizes.frames - 1) * alike + 2 * sizes.frames * distance_flops(size, sizes.width)

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        if tokens.layer:
            return Selection(top_indices(tokens.signal("last_attention").masked_fill(~tokens.valid, -1), budget))
        return super().select(tokens, budget)

    def choose(self, frames: Tensor, keep: int, part: Callable[[str], Tensor]) -> tuple[Tensor, Tensor | None]:
        count, size = frames.shape[:2]
        shares = torch.tensor([keep // count + (number < keep % count) for number in range(count)], device="cpu")
        firsts = (shares * self.selected - 1e-6).ceil().long()
        each, few = shares.to(frames.device, non_blocking=True), firsts.to(frames.device, non_blocking=True)
        scene = scenes(frames, self.threshold, self.least_scenes)
        weight = part(ATTENTION).float()
        if self.events:
            weight = weight * eventfulness(frames, scene)
        picked = diverse(frames, weight, few, int(firsts.max()))
        root = trees(frames, ~picked, scene, self.similarity, size - each)
        rows, members = (x.unflatten(1, (count, size))[0] for x in means(frames.flatten(0, 1)[None], root.view(1, -1)))
        roots = ~picked & (members > 0)
        centre, into = clusters(rows, roots, apportion(roots.sum(1), total_of(each - few, scene), scene))
        rows, _ = means(rows, into.masked_fill(~roots, -1), members)
        index = first_true((picked | centre).flatten(), keep)
        return index, rows.flatten(0, 1)[index]


@torch.no_grad()
def eventfulness(frames: Tensor, scene: Tensor) -> Tensor:
    """fp32 [T, n]: product of each token with the mean of its scene, shifted so that none is negative."""
    means = frames.float().mean(dim=1)
    whole = torch.zeros_like(means).index_add(0, scene, means)[scene]
    length = total_of(torch.ones_like(scene), scene)
    score = (frames.float() @ (whole / length[:, None])[..., None])[..., 0]
    return score - score.amin().clamp(max=0)


@torch.no_grad()
def diverse(frames: Tensor, weight: Tensor, counts: Tensor, most: int) -> Tensor:
    """ADTS: bool [T, n], the `counts` [T] (at most `most`) tokens of each frame picked by max-min diversity.

    The distance of token j to others is (1 - cosine) * weight[j]; the first pick is farthest from its nearest
    neighbour. A picked token is no candidate again.

    Args:
        frames: [T, n, D].
        weight: fp32 [T, n], not negative.
    """
    block = max(1, BLOCK // frames.shape[1] ** 2)
    parts = zip(frames.split(block), weight.split(block), counts.split(block))
    return torch.cat([_diverse(x, w, c, most) for x, w, c in parts])


def _diverse(frames: Tensor, weight: Tensor, counts: Tensor, most: int) -> Tensor:
    unit = normalize(frames.float(), dim=-1)
    distance = (1 - unit @ unit.mT) * weight[:, None]
    distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    farthest = distance.amin(1)
    picked = torch.zeros_like(weight, dtype=torch.bool)
    nearest = torch.full_like(weight, torch.inf)
    for step in range(min(most, weight.shape[1])):
        current = (farthest if step == 0 else nearest.masked_fill(picked, -torch.inf)).argmax(1, keepdim=True)
        picked = picked | torch.zeros_like(picked).scatter(1, current, (counts > step)[:, None])
        nearest = torch.minimum(nearest, distance.gather(1, current[..., None].expand(-1, -1, weight.shape[1]))[:, 0])
    return picked


@torch.no_grad()
def trees(frames: Tensor, left: Tensor, scene: Tensor, similarity: float, most: Tensor) -> Tensor:
    """TSTM: int64 [T, n], flat index of the root of each token's tree.

    Args:
        frames: [T, n, D].
        left: bool [T, n], tokens that may link; others are roots without a tree.
        scene: int64 [T], ascending; links stay inside.
        similarity: cosine that a link exceeds.
        most: int64 [T]; a scene has at most as many links as these add up to over its frames.
    """
    count, size = left.shape
    own = torch.arange(count * size, device=frames.device).view(count, size)
    value, parent = _links(frames, left, scene)
    strength = value.flatten()
    # Where a scene has too many links, only those stay that exceed the last of the best so many.
    of_scene = scene.repeat_interleave(size, output_size=count * size)
    order = strength.argsort(descending=True, stable=True)
    order = order[of_scene[order].argsort(stable=True)]
    begin = torch.searchsorted(scene, scene) * size
    allowed = total_of(most, scene)
    last = strength[order[(begin + allowed - 1).clamp(min=0)]]
    last = torch.where(allowed > 0, last, torch.inf)
    strong = value > similarity
    linked = strong & ((total_of(strong.sum(1), scene) <= allowed)[:, None] | (value > last[:, None]))
    roots = [own[0]]
    for step in range(1, count):
        roots.append(torch.where(linked[step], roots[-1][parent[step]], own[step]))
    return torch.stack(roots)


def _links(frames: Tensor, left: Tensor, scene: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine, fp32 [T, n], and place of the most similar token of the frame before; -inf where there can be none."""
    unit = normalize(frames.float(), dim=-1)
    value = [unit.new_full((1, left.shape[1]), -torch.inf)]
    place = [torch.zeros_like(left[:1], dtype=torch.int64)]
    block = max(1, BLOCK // left.shape[1] ** 2)
    for now, before, open_slots in zip(unit[1:].split(block), unit[:-1].split(block), left[:-1].split(block)):
        best = (now @ before.mT).masked_fill_(~open_slots[:, None], -torch.inf).max(2)
        value.append(best.values)
        place.append(best.indices)
    first = torch.cat([torch.ones_like(scene[:1]), scene.diff()]) > 0
    return torch.cat(value).masked_fill(~left | first[:, None], -torch.inf), torch.cat(place)
