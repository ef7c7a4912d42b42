from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmprune.contract import Keep, Positions, Pruner, Selection, Sizes, VisualTokens
from vlmprune.pruners._top import top_indices
from vlmprune.pruners._weights import check_made_for, load_module, products, save_module, trained_module
from vlmprune.registry import register_pruner

CHANNELS = (32, 64, 128, 256, 512)
_SIGNALS = frozenset({"next_text_attention", "text_mask", "next_last_attention"})


def relevance_row(attention: Sequence[Tensor], gradients: Sequence[Tensor], row: Tensor) -> Tensor:
    """fp32 [B, S]: one row of the relevance map R, without the map.

    R starts as the identity and every layer l adds B_l R, B_l = mean over heads of relu(A_l * dA_l). So R is
    (I + B_L) ... (I + B_1), and its row follows from the row of the identity by u <- u + u B_l from the last layer to
    the first: O(L S^2) instead of O(L S^3), exactly.

    Args:
        attention: per layer, first to last, [B, H, S, S] after the softmax.
        gradients: the same of the target score.
        row: int64 [B], the column whose prediction is explained.
    """
    batch, length = len(row), attention[0].shape[-1]
    u = F.one_hot(row, length).to(torch.float32)
    for weights, gradient in zip(reversed(attention), reversed(gradients)):
        step = (weights.float() * gradient.float()).relu().mean(1)
        u = u + (u[:, None] @ step).view(batch, length)
    return u


def labels(relevance: Tensor, valid: Tensor) -> Tensor:
    """fp32 [I, N], what the mapper is to say: the lower half of each item's relevance set to 0, the rest sums to 1.

    An item without any relevance gets equal shares.
    """
    count = valid.sum(1, keepdim=True)
    order = relevance.masked_fill(~valid, torch.inf).sort(dim=1, stable=True).indices.argsort(1)
    upper = (relevance * ((order >= count // 2) & valid)).clamp(min=0)
    total = upper.sum(1, keepdim=True)
    return torch.where(total > 0, upper / total.clamp(min=torch.finfo(upper.dtype).tiny), valid / count)


def divergence(label: Tensor, logits: Tensor, valid: Tensor) -> Tensor:
    """KL(label || softmax of the logits over an item's tokens), mean over items; all [I, N]."""
    log = logits.masked_fill(~valid, -torch.inf).log_softmax(1).masked_fill(~valid, 0)
    return (torch.xlogy(label, label) - label * log).sum(1).mean()


class Mapper(nn.Module):
    """Five depthwise-separable 1-D convolutions and a pointwise one: from attention to relevance, any number of tokens.

    Args:
        channels: behind each block.
        kernel: width of the depthwise convolutions, odd.
    """

    def __init__(self, channels: Sequence[int] = CHANNELS, kernel: int = 5) -> None:
        super().__init__()
        self.channels, self.kernel = tuple(channels), kernel
        wide = (1, *self.channels)
        self.deep = nn.ModuleList(nn.Conv1d(c, c, kernel, padding=kernel // 2, groups=c) for c in wide[:-1])
        self.point = nn.ModuleList(nn.Conv1d(a, b, 1) for a, b in itertools.pairwise(wide))
        self.last = nn.Conv1d(wide[-1], 1, 1)

    def forward(self, attention: Tensor, valid: Tensor) -> Tensor:
        """Logits fp32 [I, N] from non-negative scores [I, N]; padding (False in `valid`) has no say and gets 0."""
        here = valid[:, None].float()
        # Scale-free: mean 1 over an item's tokens.
        total = (attention * valid).sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        x = (attention * valid / total * valid.sum(1, keepdim=True))[:, None]
        for deep, point in zip(self.deep, self.point):
            x = F.gelu(point(deep(x))) * here
        return (self.last(x) * here).squeeze(1)

    def save(self, folder: str | Path, **notes: Any) -> None:
        """Write `model.safetensors` (fp16) and `config.json`; `notes` go into the latter."""
        save_module(
            self, folder, torch.float16, method="explain", channels=list(self.channels), kernel=self.kernel, **notes
        )

    @classmethod
    def load(cls, folder: str | Path) -> Mapper:
        """Read what `save` wrote, on the CPU, in fp32.

        Raises:
            ValueError: no such folder, or weights that do not fit its config.
        """
        return load_module(
            folder, "explain", "training/explain.py", lambda config: cls(config["channels"], config["kernel"])
        )


class _FirstLayer(Pruner):
    """What both methods read: the first layer's attention from text to visual tokens, before anything has run."""

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 1) -> Sequence[int | None]:
        if isinstance(self.keep, numbers.Integral):
            return [min(int(self.keep), count) for count in counts]
        return [min(count, max(1, math.floor(self.keep * count + 0.5))) for count in counts]

    def _attention(self, tokens: VisualTokens) -> Tensor:
        """fp32 [I, N]: mean over the text behind the item; where there is none, the row of the prompt's last token."""
        rows = tokens.signal("text_mask")
        text = (tokens.signal("next_text_attention") * rows[..., None]).sum(1) / rows.sum(1, keepdim=True).clamp(min=1)
        return torch.where(rows.any(1, keepdim=True), text, tokens.signal("next_last_attention"))


@register_pruner
@dataclass(kw_only=True)
class FirstLayerAttention(_FirstLayer):
    """Keep the visual tokens that the question attends to most in the first decoder layer, before any layer runs.

    A training-free stand-in for `explain` (arXiv 2506.01097), whose input it ranks by; not a published method. Aware of
    the question. Attention is the mean over heads and over the text behind the image, softmax over all keys, from the
    first layer's queries and keys alone. `smooth` averages it over so many neighbours in raster order first.
    """

    keep: Keep = 0.5
    positions: Positions = "original"
    smooth: int = 1

    name: ClassVar[str] = "first_layer_attention"
    paper: ClassVar[str] = "after arXiv 2506.01097, without its training"
    needs: ClassVar[frozenset[str]] = _SIGNALS
    query_aware: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.smooth, bool) or not isinstance(self.smooth, int) or self.smooth < 1 or self.smooth % 2 == 0:
            raise ValueError(f"smooth must be an odd number of tokens, got {self.smooth!r}")

    def selection_flops(self, sizes: Sizes) -> int:
        return 0

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        scores = self._attention(tokens).float()
        if self.smooth > 1:
            both = torch.stack([scores * tokens.valid, tokens.valid.float()], 1)
            total, count = F.avg_pool1d(both, self.smooth, stride=1, padding=self.smooth // 2).unbind(1)
            scores = total / count.clamp(min=1e-6)
        return Selection(top_indices(scores.masked_fill(~tokens.valid, -1), budget))


@register_pruner
@dataclass(kw_only=True)
class Explain(_FirstLayer):
    """Keep the visual tokens that would explain the answer, as guessed from the first layer's attention.

    "Generic Token Compression in Multimodal Large Language Models from an Explainability Perspective", arXiv
    2506.01097. Trained, aware of the question. A light 1-D convolutional network maps the attention from text to visual
    tokens in the first decoder layer to the relevance that gradient-weighted attention of all layers would give them
    for the answer (`relevance_row`; the lower half of it set to 0); the highest stay, round(keep N), at least one.

    No code or weights are public: `weights` is a folder written by `training/explain.py`, for one language model and
    prompt template, or the mapper itself. Without weights there is `first_layer_attention`. The paper leaves open, and
    was decided here: kernels of 5, GELU, no norms, mean over heads, original positions, and the last token's row where
    no text follows the image.
    """

    keep: Keep = 0.5
    positions: Positions = "original"
    weights: str | Path | Mapper | None = None

    name: ClassVar[str] = "explain"
    paper: ClassVar[str] = "arXiv 2506.01097"
    needs: ClassVar[frozenset[str]] = _SIGNALS
    query_aware: ClassVar[bool] = True
    trained: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._mapper = trained_module(
            self.name, Mapper, self.weights, "training/explain.py wrote", "first_layer_attention"
        )

    def check_model(self, config: Any) -> None:
        check_made_for(self.name, "training/explain.py", self._mapper, config)

    def selection_flops(self, sizes: Sizes) -> int:
        return sizes.tokens * products(self._mapper)

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        attention = self._attention(tokens).float()
        with torch.no_grad():
            logits = self._mapper.to(attention.device)(attention, tokens.valid)
        return Selection(top_indices(logits.masked_fill(~tokens.valid, -torch.inf), budget))
