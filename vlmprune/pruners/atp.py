from __future__ import annotations

import bisect
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmprune.contract import Geometry, Keep, Positions, Pruner, Selection, Sizes, VisualTokens
from vlmprune.pruners._schedule import layer_average, stage_counts, stage_layers, stage_ratios
from vlmprune.pruners._top import top_indices
from vlmprune.pruners._weights import check_made_for, load_module, save_module, trained_module
from vlmprune.registry import register_pruner

LAYERS = (5, 15, 25)  # modules behind layers 4, 14 and 24 of 32
RATIOS = (0.5, 0.2, 0.05)  # mean 0.25, the published 144 of 576
AVERAGE = layer_average(1, RATIOS, LAYERS, 32)
SAMPLING = 3.0  # lambda_sample of Eq. 5
STRIDES = (2, 4, 8)
STATISTICS = 10
_SIGNALS = frozenset({"visual_attention", "text_attention", "text_mask"})


def self_scores(received: Tensor, alive: Tensor) -> Tensor:
    """Eq. 3, fp32 [I, N]: mean attention that a token gets from the visual tokens that can see it.

    Args:
        received: fp32 [I, N], sum over the item's own tokens of their attention to it ("visual_attention").
        alive: fp32 [I, N] in [0, 1], how much each token is there: 1 or 0, or a soft mask in training.
    """
    seen_by = alive.flip(1).cumsum(1).flip(1)  # causal: itself and those behind it
    return received * alive / seen_by.clamp(min=1)


def cross_scores(attention: Tensor, rows: Tensor) -> Tensor:
    """Eq. 4, fp32 [I, N]: mean over text rows (bool [I, T]) of their attention [I, T, N]; 0 where there is no text."""
    rows = rows[..., None].to(attention.dtype)
    return (attention * rows).sum(1) / rows.sum(1).clamp(min=1)


def normalise(scores: Tensor, alive: Tensor) -> Tensor:
    """Scores [I, N] of the tokens that are there, brought to [0, 1] item by item; equal scores become 0.5."""
    here = alive > 0.5
    low = scores.masked_fill(~here, torch.inf).amin(1, keepdim=True)
    high = scores.masked_fill(~here, -torch.inf).amax(1, keepdim=True)
    spread = high - low
    scaled = ((scores - low) / spread.clamp(min=torch.finfo(scores.dtype).tiny)).clamp(0, 1)
    return torch.where(spread > 0, scaled, 0.5) * here


def statistics(own: Tensor, cross: Tensor, alive: Tensor, originally: Tensor, wanted: Tensor) -> Tensor:
    """fp32 [I, 10]: what a module knows of an item. Scale-free, so that it carries over between token counts.

    Of both scores ([I, N], not normalised): mean and deviation of the normalised ones, logarithms of the largest over
    the mean and of the sum; then the logarithms of the share of tokens left (of `originally`, [I]) and of the share
    `wanted` [I] on average behind the first module.
    """
    count = alive.sum(1).clamp(min=1)
    parts = []
    for scores in (own, cross):
        scaled = normalise(scores, alive)
        mean = (scaled * alive).sum(1) / count
        deviation = ((scaled - mean[:, None]).square() * alive).sum(1).div(count).clamp(min=1e-12).sqrt()
        total = (scores * alive).sum(1)
        parts += [mean, deviation, _log((scores * alive).amax(1) * count / total.clamp(min=1e-12)), _log(total)]
    return torch.stack([*parts, _log(count / originally), _log(wanted)], 1)


def spatial_scores(geometry: Geometry) -> Tensor:
    """Eq. 5, fp32 [N] on the CPU: 1 - lambda / stride**2 on the coarsest grid that a token lies on, -1 off all grids.

    Grids of strides 2, 4 and 8 from the first row and column of each plane, in original coordinates at every module.
    """
    scores = torch.full((len(geometry),), -1.0, device="cpu")
    for stride in STRIDES:
        scores[on_grid(geometry, stride)] = 1 - SAMPLING / stride**2
    return scores


def on_grid(geometry: Geometry, stride: int) -> Tensor:
    """bool [N]: tokens whose row and column are multiples of `stride`."""
    return ~geometry.placeless & (geometry.row % stride == 0) & (geometry.col % stride == 0)


def soft_mask(redundancy: Tensor, spatial: Tensor, thresholds: tuple[Tensor, Tensor], temperature: float) -> Tensor:
    """Eq. 9 to 11, fp32 [I, N] in (0, 1): the larger of both criteria's sigmoids; thresholds are [I] each."""
    first, second = ((s - t[:, None]) * temperature for s, t in zip((redundancy, spatial), thresholds))
    return torch.maximum(first.sigmoid(), second.sigmoid())


def hard_mask(redundancy: Tensor, spatial: Tensor, thresholds: tuple[Tensor, Tensor], alive: Tensor) -> Tensor:
    """bool [I, N]: tokens above either threshold; of an item that has none, the best by redundancy score."""
    here = alive > 0.5
    kept = here & ((redundancy > thresholds[0][:, None]) | (spatial > thresholds[1][:, None]))
    best = redundancy.masked_fill(~here, -1).argmax(1, keepdim=True)
    alone = torch.zeros_like(kept).scatter(1, best, True) & here
    return kept | (alone & ~kept.any(1, keepdim=True))


class ThresholdHead(nn.Module):
    """Eq. 6 to 8: from an item's statistics [I, 10] its two thresholds, [I] each, in (0, 1).

    Statistics are first brought to zero mean and unit deviation by constants that `standardise` measures.
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(STATISTICS))
        self.register_buffer("scale", torch.ones(STATISTICS))
        self.mix = nn.Linear(STATISTICS, hidden)
        self.redundancy = nn.Linear(hidden, 1)
        self.spatial = nn.Linear(hidden, 1)
        nn.init.constant_(self.redundancy.bias, -2.0)
        nn.init.constant_(self.spatial.bias, 3.0)  # at first only the coarsest grid is near

    def standardise(self, items: Tensor) -> None:
        """Measure the constants on statistics [M, 10]; those that do not vary are only centred."""
        deviation, self.centre = torch.std_mean(items.detach(), 0)
        self.scale = torch.where(deviation > 1e-3, deviation, 1.0)

    def forward(self, items: Tensor) -> tuple[Tensor, Tensor]:
        mixed = nn.functional.gelu(self.mix((items - self.centre) / self.scale))
        return self.redundancy(mixed).sigmoid().squeeze(1), self.spatial(mixed).sigmoid().squeeze(1)


class ThresholdModules(nn.Module):
    """The trained part of ATP: one `ThresholdHead` for each of `layers` in a language model of `depth` layers.

    Attributes:
        reached: (asked, measured) pairs, ascending: which average the modules kept, on held-out data, when their input
            named another. `ask` reads it backwards, so that `keep` means what was measured.
    """

    def __init__(
        self, layers: Sequence[int], depth: int, hidden: int = 64, reached: Sequence[tuple[float, float]] = ()
    ) -> None:
        super().__init__()
        self.layers, self.depth, self.hidden = tuple(layers), depth, hidden
        self.reached = [(float(asked), float(measured)) for asked, measured in reached]
        self.heads = nn.ModuleList(ThresholdHead(hidden) for _ in self.layers)

    @property
    def floor(self) -> float:
        """The average over all layers that those before the first module make up."""
        return self.layers[0] / self.depth

    def share(self, keep: float) -> float:
        """An average over all layers as the average over those behind the first module."""
        return (keep - self.floor) / (1 - self.floor)

    def ask(self, keep: float) -> float:
        """Which average to name to the modules so that they keep `keep` on average.

        Raises:
            ValueError: an average for which they were not trained.
        """
        if not self.reached:
            return keep
        asked, measured = zip(*self.reached)
        if not measured[0] <= keep <= measured[-1]:
            raise ValueError(
                f"these weights of atp were trained for keep between {measured[0]:.3f} and {measured[-1]:.3f}, or 1.0, "
                f"not {keep:.3g}: choose one of these, or train others with training/atp.py"
            )
        at = min(max(bisect.bisect_left(measured, keep), 1), len(measured) - 1)
        width = measured[at] - measured[at - 1]
        return asked[at - 1] + (asked[at] - asked[at - 1]) * (keep - measured[at - 1]) / width

    def save(self, folder: str | Path, **notes: Any) -> None:
        """Write `model.safetensors` and `config.json`; `notes` go into the latter."""
        save_module(
            self,
            folder,
            method="atp",
            layers=list(self.layers),
            depth=self.depth,
            hidden=self.hidden,
            reached=[list(pair) for pair in self.reached],
            **notes,
        )

    @classmethod
    def load(cls, folder: str | Path) -> ThresholdModules:
        """Read what `save` wrote, on the CPU, in evaluation mode.

        Raises:
            ValueError: no such folder, or weights that do not fit its config.
        """
        return load_module(
            folder,
            "atp",
            "training/atp.py",
            lambda config: cls(config["layers"], config["depth"], config["hidden"], config["reached"]),
        )


class _Scored(Pruner):
    """Scores that both forms of ATP share."""

    def _scores(self, tokens: VisualTokens) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """fp32 [I, N] each: S_self, S_cross, S_red, S_sp and which tokens there are."""
        alive = tokens.valid.float()
        own = self_scores(tokens.signal("visual_attention").float(), alive)
        cross = cross_scores(tokens.signal("text_attention").float(), tokens.signal("text_mask"))
        spatial = _padded([spatial_scores(shape) for shape in tokens.shapes], tokens, -1.0)
        redundancy = (normalise(own, alive) + normalise(cross, alive)) / 2
        return own, cross, redundancy, spatial, alive


@register_pruner
@dataclass(kw_only=True)
class ATP(_Scored):
    """Drop the visual tokens that fail both of two learned thresholds, per image, question and layer.

    Ye et al., "ATP-LLaVA: Adaptive Token Pruning for Large Vision Language Models", CVPR 2025, arXiv 2412.00447.
    Trained, aware of the question. Before decoder layers 5, 15 and 25 of 32 a small module reads two scores of each
    token, the attention it got in the layer before from visual tokens (Eq. 3) and from text (Eq. 4), and predicts a
    threshold for their mean and one for the spatial score of Eq. 5 (Eq. 6 to 8). A token above either stays, with its
    position (Eq. 9 to 11 at infinite temperature).

    There is no official code and the weights are not public: `weights` is a folder written by `training/atp.py`
    (safetensors and json, a few kB), trained for one language model, or the modules themselves;
    `vlmprune.bundled.atp_weights()` is that of the bundled model. Without weights there is `atp-calibrated`. The paper
    leaves open, and was decided here: S_self after the softmax, over the tokens that can see a token; both scores
    scaled to [0, 1] item by item; grids of three strides for S_sp, so that its threshold chooses a density; a module's
    input are ten statistics of the scores; the average wanted is one of them, so that one training serves a range of
    `keep`.

    `keep` is the average over decoder layers and over the data that the weights were trained on; an item keeps more or
    fewer. At least one token stays behind each module.
    """

    keep: Keep = AVERAGE
    positions: Positions = "original"
    weights: str | Path | ThresholdModules | None = None

    name: ClassVar[str] = "atp"
    paper: ClassVar[str] = "arXiv 2412.00447"
    stage: ClassVar[str] = "decoder"
    needs: ClassVar[frozenset[str]] = _SIGNALS
    query_aware: ClassVar[bool] = True
    trained: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._modules = trained_module(
            self.name, ThresholdModules, self.weights, "training/atp.py wrote", "atp-calibrated"
        )

    def check_model(self, config: Any) -> None:
        check_made_for(self.name, "training/atp.py", self._modules, config)

    def layers(self, depth: int) -> tuple[int, ...]:
        if depth != self._modules.depth:
            raise ValueError(
                f"these weights of atp are for a language model of {self._modules.depth} layers, this one has {depth}: "
                "train others with training/atp.py, or use atp-calibrated"
            )
        return self._modules.layers

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 32) -> list[int | None]:
        whole = isinstance(self.keep, numbers.Integral)
        left: list[int | None] = []
        for count in counts:
            everything = self.keep >= count if whole else self.keep == 1
            if not everything:
                self._modules.ask(self._ratio(count))
            left.append(count if everything else None)
        return left

    def _ratio(self, count: int) -> float:
        return self.keep / count if isinstance(self.keep, numbers.Integral) else float(self.keep)

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        own, cross, redundancy, spatial, alive = self._scores(tokens)
        originally = [len(shape) for shape in tokens.shapes]
        asked = [self._modules.share(self._modules.ask(self._ratio(count))) for count in originally]
        whole, wanted = torch.tensor([originally, asked], device="cpu").to(alive.device, non_blocking=True)
        head = self._modules.to(alive.device).heads[self.layers(tokens.depth).index(tokens.layer)]
        with torch.no_grad():
            thresholds = head(statistics(own, cross, alive, whole, wanted))
        return Selection(_indices(hard_mask(redundancy, spatial, thresholds, alive)))


@register_pruner
@dataclass(kw_only=True)
class ATPCalibrated(_Scored):
    """ATP's scores and layers without its training: constant thresholds, measured on a calibration set by `calibrate`.

    Not the paper's model: a training-free stand-in for `atp` (arXiv 2412.00447), aware of the question through the same
    scores. Each stage keeps the densest stride grid (2, 4 or 8) that fits its share and, of the others, the tokens
    whose mean score exceeds `thresholds`, one for each stage. The published average of 0.25 over the modules is split
    into 0.5, 0.2 and 0.05 of the tokens; other `keep` raise these to a common power. How many tokens an item keeps then
    follows from the spread of its scores alone; the average over the calibration set is the wanted one.

    With `thresholds=None` each item keeps exactly the scheduled counts, by the same scores: the fixed schedule that
    adaptive thresholds are to be compared with. `grid=False` leaves the stride grids out.
    """

    keep: Keep = AVERAGE
    positions: Positions = "original"
    thresholds: tuple[float, ...] | None = None
    grid: bool = True

    name: ClassVar[str] = "atp-calibrated"
    paper: ClassVar[str] = "after arXiv 2412.00447, without its training"
    stage: ClassVar[str] = "decoder"
    needs: ClassVar[frozenset[str]] = _SIGNALS
    query_aware: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.thresholds is not None:
            self.thresholds = tuple(float(each) for each in self.thresholds)

    def layers(self, depth: int) -> tuple[int, ...]:
        layers = stage_layers(LAYERS, depth)
        if self.thresholds is not None and len(self.thresholds) != len(layers):
            raise ValueError(
                f"atp-calibrated has {len(layers)} stages in a language model of {depth} layers, but thresholds for "
                f"{len(self.thresholds)}: calibrate it on this model"
            )
        return layers

    def scheduled(self, count: int, layer: int, depth: int) -> int:
        """Tokens of an item of `count` that the schedule leaves behind the stage before `layer`."""
        layers = stage_layers(LAYERS, depth)
        return stage_counts(count, self.keep, layers, stage_ratios(LAYERS, RATIOS, depth), depth)[layers.index(layer)]

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 32) -> Sequence[int | None]:
        scheduled = [self.scheduled(count, layer, depth) for count in counts]
        if self.thresholds is None:
            return scheduled
        return [count if left == count else None for left, count in zip(scheduled, counts)]

    def selection_flops(self, sizes: Sizes) -> int:
        return 0

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        _, _, redundancy, _, alive = self._scores(tokens)
        wanted = [self.scheduled(len(shape), tokens.layer, tokens.depth) for shape in tokens.shapes]
        grid = _padded([self._grid(shape, left) for shape, left in zip(tokens.shapes, wanted)], tokens, False)
        if self.thresholds is None:
            return Selection(top_indices((redundancy + 2 * grid).masked_fill(alive < 0.5, -1), budget))
        limit = torch.full_like(alive[:, 0], self.thresholds[self.layers(tokens.depth).index(tokens.layer)])
        return Selection(_indices(hard_mask(redundancy, grid.float(), (limit, torch.full_like(limit, 0.5)), alive)))

    def _grid(self, shape: Geometry, left: int) -> Tensor:
        for stride in STRIDES if self.grid else ():
            if int((cells := on_grid(shape, stride)).sum()) <= left:
                return cells
        return torch.zeros(len(shape), dtype=torch.bool, device="cpu")


@dataclass(kw_only=True)
class _Probe(ATPCalibrated):
    """Applies the thresholds that are known and writes down the scores at the first stage without one."""

    known: tuple[float, ...] = ()
    seen: list[tuple[Tensor, int]] = field(default_factory=list)

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 32) -> Sequence[int | None]:
        self.scheduled(1 if not counts else counts[0], layer, depth)
        return [None] * len(counts)

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        stages = self.layers(tokens.depth)
        at = stages.index(tokens.layer)
        if at < len(self.known):
            thresholds = (*self.known, *[0.0] * (len(stages) - len(self.known)))
            fields = {"keep": self.keep, "positions": self.positions, "grid": self.grid}
            return ATPCalibrated(**fields, thresholds=thresholds).select(tokens, budget)  # type: ignore[arg-type]
        if at == len(self.known):
            redundancy = self._scores(tokens)[2]
            for row, (shape, index) in enumerate(zip(tokens.shapes, tokens.index)):
                left = self.scheduled(len(shape), tokens.layer, tokens.depth)
                grid = self._grid(shape, left)[index.cpu()]
                scores = redundancy[row, : len(index)].cpu()[~grid]
                self.seen.append((scores, left - int(grid.sum())))
        return Selection(_indices(tokens.valid))


def calibrate(pruner: ATPCalibrated, run: Callable[[Pruner], object], stages: int) -> ATPCalibrated:
    """`pruner` with thresholds so that, over a calibration set, each stage keeps its scheduled share on average.

    Args:
        run: attaches the pruner it is given and runs the model over the calibration set, 64 to 256 prompts; called once
            a stage.
        stages: number of stages in that model, `len(pruner.layers(depth))`.

    Raises:
        ValueError: `run` pruned nothing.
    """
    known: tuple[float, ...] = ()
    for _ in range(stages):
        probe = _Probe(keep=pruner.keep, positions=pruner.positions, grid=pruner.grid, known=known)
        run(probe)
        if not probe.seen:
            raise ValueError("nothing was measured: run must prefill prompts with images under the pruner it is given")
        known = (*known, threshold_for([scores for scores, _ in probe.seen], sum(left for _, left in probe.seen)))
    return replace(pruner, thresholds=known)


def threshold_for(scores: Sequence[Tensor], wanted: int) -> float:
    """The threshold that `wanted` of all scores ([n] a sample, any lengths) exceed; as near as ties allow."""
    pooled = torch.cat([each.double() for each in scores]).sort(descending=True).values
    if wanted <= 0:
        return 1.0
    if wanted >= len(pooled):
        return -1.0
    return float(pooled[wanted - 1] + pooled[wanted]) / 2


def _padded(each: list[Tensor], tokens: VisualTokens, fill: float | bool) -> Tensor:
    """[I, N]: per-token values of all original tokens (on the CPU) at those that are left, padded with `fill`."""
    device, width = tokens.features.device, tokens.features.shape[1]
    rows = [values.to(device, non_blocking=True)[index] for values, index in zip(each, tokens.index)]
    return torch.stack([nn.functional.pad(row, (0, width - len(row)), value=fill) for row in rows])


def _indices(mask: Tensor) -> Tensor:
    """int64 [I, N]: places of True in each row of bool [I, N], then -1."""
    place = torch.arange(mask.shape[1], device=mask.device)
    index = torch.where(mask, place, mask.shape[1]).sort(dim=1).values
    return index.masked_fill(index == mask.shape[1], -1)


def _log(value: Tensor) -> Tensor:
    return value.clamp(min=1e-6).log()
