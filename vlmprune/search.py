"""Searches for schedules and thresholds that a method takes as given: offline, over a quality that a callable measures.

G-Search and P-Sigmoid (arXiv 2412.00556) find how many visual tokens each decoder layer needs; the result is a
`Schedule` for the method "gsearch".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from vlmprune.pruners.gsearch import GSearch, Query, Schedule, sigmoid_ratios
from vlmprune.session import prune

Quality = Callable[[Sequence[float]], float]
"""Of a share of visual tokens for every decoder layer, how good the model is with it; more is better."""


def greedy_search(
    quality: Quality,
    depth: int,
    *,
    tolerance: float = 0.02,
    step: float = 1 / 64,
    start: int = 2,
    group: int = 2,
    allow_zero: bool = False,
) -> tuple[float, ...]:
    """G-Search: from shallow to deep, the smallest share of tokens that a layer and all behind it can do with.

    A share is the smallest on the grid of `step` at which `quality` is within `tolerance` of that with all tokens,
    found by bisection: quality is taken to grow with the share. Then no layer's share can be lowered while those before
    it stay, and lowering an earlier one never makes room in a later one.

    Args:
        quality: of one share for each layer, the first `start` of them 1, none above the one before.
        depth: decoder layers.
        tolerance: loss of quality, always against all tokens.
        step: of the grid; 1 must be a multiple of it.
        start: first layer to see fewer tokens.
        group: layers that are searched as one.
        allow_zero: whether a layer may be left without visual tokens.

    Returns:
        The shares, one for each layer.

    Raises:
        ValueError: a step that does not divide 1, or a start outside the model.
    """
    parts = round(1 / step)
    if parts < 1 or not math.isclose(parts * step, 1.0):
        raise ValueError(f"1 must be a multiple of step, got {step}")
    if not 1 <= start < depth:
        raise ValueError(f"start must be a layer from 1 to {depth - 1}, got {start}")
    ratios = [1.0] * depth
    wanted = quality(tuple(ratios)) - tolerance
    high = parts
    for layer in range(start, depth, max(1, group)):
        low = -1 if allow_zero else 0
        while high - low > 1:
            middle = (low + high) // 2
            if quality((*ratios[:layer], *[middle / parts] * (depth - layer))) >= wanted:
                high = middle
            else:
                low = middle
        ratios[layer:] = [high / parts] * (depth - layer)
    return tuple(ratios)


def tune_sigmoid(
    quality: Quality,
    depth: int,
    keep: float,
    *,
    evaluations: int = 30,
    start: int = 2,
    seed: int = 0,
) -> tuple[tuple[float, ...], dict[str, float]]:
    """P-Sigmoid: of the sigmoids that average `keep`, the one of best quality.

    Log kappa in [log 2, log 200] and floor in [0, keep] by Bayesian optimisation: five points of a Sobol sequence, then
    the point of largest expected improvement under a Gaussian process (scikit-learn's). Without scikit-learn the Sobol
    sequence goes on. The same seed gives the same schedule.

    Returns:
        The shares, one for each layer, and what made them: kappa, floor and quality.

    Raises:
        ValueError: the layers before `start` alone exceed `keep`.
    """
    sobol = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed)

    def ratios(point: Tensor) -> tuple[tuple[float, ...], float, float]:
        kappa = 2.0 * 100.0 ** float(point[0])
        floor = keep * float(point[1])
        return sigmoid_ratios(depth, keep, kappa=kappa, floor=floor, start=start), kappa, floor

    points: list[Tensor] = []
    found: list[float] = []
    for number in range(evaluations):
        candidates = sobol.draw(256) if number >= 5 else sobol.draw(1)
        points.append(candidates[_most_promising(points, found, candidates, seed)] if number >= 5 else candidates[0])
        found.append(quality(ratios(points[-1])[0]))
    best = max(range(evaluations), key=found.__getitem__)
    shares, kappa, floor = ratios(points[best])
    return shares, {"kappa": kappa, "floor": floor, "quality": found[best]}


def _most_promising(points: Sequence[Tensor], found: Sequence[float], candidates: Tensor, seed: int) -> int:
    """Index of the candidate with the largest expected improvement; the first without scikit-learn."""
    try:
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import Matern, WhiteKernel
    except ImportError:
        return 0
    kernel = Matern(length_scale=0.3, length_scale_bounds="fixed", nu=2.5) + WhiteKernel(1e-3, "fixed")
    model = GaussianProcessRegressor(kernel, normalize_y=True, random_state=seed)
    model.fit(torch.stack(list(points)).numpy(), list(found))
    mean, deviation = (torch.from_numpy(each) for each in model.predict(candidates.numpy(), return_std=True))
    normal = torch.distributions.Normal(0.0, 1.0)
    gain = mean - max(found)
    z = gain / deviation.clamp(min=1e-12)
    return int((gain * normal.cdf(z) + deviation * normal.log_prob(z).exp()).argmax())


def calibrate(
    average: Callable[[float], float], keep: float, *, low: float, high: float, evaluations: int = 16
) -> float:
    """The level at which a method with thresholds keeps `keep` on average, by bisection of its logarithm.

    Args:
        average: of a level > 0, the average share kept on samples; it must not grow with the level. For instance, the
            mean of `session.last.average_keep` over some prompts with `MustDrop(level=...)`.
        keep: the share wanted.
        low, high: where to look, 0 < low < high.

    Returns:
        The level, among those tried, whose average is nearest to `keep`.
    """
    if not 0 < low < high:
        raise ValueError(f"calibrate needs 0 < low < high, got {low} and {high}")
    tried: dict[float, float] = {}
    for _ in range(evaluations):
        level = math.sqrt(low * high)
        tried[level] = average(level)
        low, high = (level, high) if tried[level] > keep else (low, level)
    return min(tried, key=lambda level: abs(tried[level] - keep))


class KLQuality:
    """Minus the mean divergence of a pruned model's next-token distributions from the full model's: needs no labels.

    The full model answers every prompt greedily, once. For a schedule, the pruned model is led along these answers, and
    KL(full || pruned) averaged over their tokens; 0 is the best there is.

    Args:
        model: as for `vlmprune.prune`.
        prompts: inputs of `generate()`, one mapping a batch.
        max_new_tokens: longest answer. The full model's log-probabilities are held on the CPU: 4 bytes for each word of
            the vocabulary and token of the answers.
        query: as for `GSearch`.
    """

    def __init__(
        self, model: Any, prompts: Sequence[Mapping[str, Any]], *, max_new_tokens: int = 16, query: Query = "text"
    ) -> None:
        if not prompts:
            raise ValueError("KLQuality needs at least one prompt")
        self.model, self.prompts, self.query = model, list(prompts), query
        self.evaluations = 0
        ends = model.generation_config.eos_token_id
        ends = torch.tensor([] if ends is None else [ends] if isinstance(ends, int) else ends, device="cpu")
        self._answers: list[tuple[Tensor, Tensor, Tensor]] = []
        for inputs in self.prompts:
            ids, logits = self._generate(inputs, max_new_tokens)
            ended = torch.isin(ids, ends).cumsum(1) - torch.isin(ids, ends).long()
            self._answers.append((ids, logits.log_softmax(-1), ended == 0))

    def __call__(self, ratios: Sequence[float]) -> float:
        self.evaluations += 1
        total, count = 0.0, 0
        with prune(self.model, GSearch(schedule=Schedule(tuple(ratios)), query=self.query)):
            for inputs, (ids, full, real) in zip(self.prompts, self._answers):
                _, logits = self._generate(inputs, ids.shape[1], ids)
                each = (full.exp() * (full - logits.log_softmax(-1))).sum(-1)
                total, count = total + float(each[real].sum()), count + int(real.sum())
        return -total / count

    def _generate(self, inputs: Mapping[str, Any], tokens: int, forced: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The answer, int64 [B, A], and its logits, fp32 [B, A, V], on the CPU."""
        length = inputs["input_ids"].shape[1]
        lead = [] if forced is None else [_Forced(forced, length)]
        out = self.model.generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            logits_processor=lead,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return out.sequences[:, length:].cpu(), torch.stack(out.logits, 1).float().cpu()


class _Forced(LogitsProcessor):
    """Leads generation along `answer` [B, A] behind the prompt's `length` tokens."""

    def __init__(self, answer: Tensor, length: int) -> None:
        self.answer, self.length = answer, length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.answer[:, input_ids.shape[1] - self.length, None].to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)
