from __future__ import annotations

import copy
import json
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
from vlmprune.pruners._weights import check_made_for, check_width, load_module, load_part, save_module, trained_module
from vlmprune.registry import register_pruner

PREFIX = "model.qts_plus.selector."
HIDDEN = 256  # of the budget's MLP
TINY = 1e-8


def relevance(queries: Tensor, keys: Tensor, words: Tensor, valid: Tensor) -> Tensor:
    """r, fp32 [I, N]: the largest weight that any head of any question token gives a visual token.

    The softmax is over the item's visual tokens, in fp32, without positions. 0 for padding, and where there is no
    question.

    Args:
        queries: [I, M, H, d] of the question's tokens.
        keys: [I, N, G, d] of the visual tokens; G key heads serve H query heads.
        words, valid: bool [I, M] and [I, N], which of them are real.
    """
    best = torch.zeros(valid.shape, dtype=torch.float32, device=keys.device)
    if not queries.shape[1]:
        return best
    grouped = queries.unflatten(2, (keys.shape[2], -1)).float()
    for group in range(keys.shape[2]):  # a few heads at a time: [I, H / G, M, N] is the largest table there is
        logits = torch.einsum("imhd,ind->ihmn", grouped[:, :, group], keys[:, :, group].float())
        weights = (logits * keys.shape[3] ** -0.5).masked_fill(~valid[:, None, None], -torch.inf).softmax(-1)
        weights = weights.masked_fill(~words[:, None, :, None], 0)
        best = torch.maximum(best, weights.flatten(1, 2).amax(1))
    return best


def entropy(scores: Tensor) -> Tensor:
    """H, fp32 [I], of scores r [I, N] brought to sum 1; in nats, at least 0."""
    share = scores / (scores.sum(1, keepdim=True) + TINY)
    return -(share * (share + TINY).log()).sum(1).clamp(max=0)


def threshold(logits: Tensor, wanted: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """t, fp32 [I], with sum over an item's tokens of sigmoid((logits - t) / temperature) = `wanted`.

    By bisection, then one step of Newton's that carries the gradient to `logits` and `wanted`.

    Args:
        logits: fp32 [I, N]; `wanted`: fp32 [I], above 0 and below the item's number of tokens.
    """

    def kept(at: Tensor) -> Tensor:
        return (((logits - at[:, None]) / temperature).sigmoid() * valid).sum(1)

    with torch.no_grad():
        reach = 40 * temperature
        low = logits.masked_fill(~valid, torch.inf).amin(1) - reach
        high = logits.masked_fill(~valid, -torch.inf).amax(1) + reach
        for _ in range(60):
            middle = (low + high) / 2
            more = kept(middle) > wanted
            low, high = torch.where(more, middle, low), torch.where(more, high, middle)
        share = ((logits - high[:, None]) / temperature).sigmoid()
        slope = (share * (1 - share) * valid).sum(1).clamp(min=TINY) / temperature
    return high + (kept(high) - wanted) / slope


class RMSNorm(nn.Module):
    """Rows over their root mean square, which is taken in fp32, times a weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, rows: Tensor) -> Tensor:
        wide = rows.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(rows.dtype) * self.weight


class Scorer(nn.Module):
    """Queries and keys of a layer of cross-attention from the question to the visual tokens."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.q_norm, self.kv_norm = RMSNorm(width), RMSNorm(width)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, kv_heads * self.size)

    def project(self, question: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [I, M, H, d] and keys [I, N, G, d]."""
        queries = self.q_proj(self.q_norm(question)).unflatten(-1, (self.heads, self.size))
        return queries, self.k_proj(self.kv_norm(rows)).unflatten(-1, (self.kv_heads, self.size))


class _FFN(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Block(Scorer):
    """Attention from one set of rows to another and an FFN, each added to the rows; no positions."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__(width, heads, kv_heads)
        self.v_proj = nn.Linear(width, kv_heads * self.size)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.ffn_norm, self.ffn = RMSNorm(width), _FFN(width)

    def forward(self, rows: Tensor, others: Tensor, bias: Tensor | None) -> Tensor:
        """[I, M, D] of rows [I, M, D] that attend to `others` [I, N, D]; `bias` [I, N] is added to the logits."""
        queries, keys = self.project(rows, others)
        values = self.v_proj(self.kv_norm(others)).unflatten(-1, (self.kv_heads, self.size))
        each = self.heads // self.kv_heads
        q, k, v = (part.transpose(1, 2) for part in (queries, keys, values))
        k, v = k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)
        mask = None if bias is None else bias[:, None, None].to(q.dtype)
        rows = rows + self.o_proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return rows + self.ffn.net(self.ffn_norm(rows))


class _Core(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self.core = block

    def forward(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        return self.core(rows, rows, bias)


class _Budget(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width + 3, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 1))

    def forward(self, known: Tensor) -> Tensor:
        """fp32 [I] of fp32 [I, D + 3]."""
        return self.mlp(known).squeeze(1)


class TokenSelector(nn.Module):
    """The trained part of QTSplus: what scores visual tokens, says how many stay, and rewrites these.

    Its tensors bear the names of published checkpoints, behind their prefix. Values, output projection and FFN of the
    last scoring layer have no influence on anything and are left out.

    Args:
        width: D, of the language model's rows.
        heads, kv_heads: of every layer.
        depth: layers of the language model that it belongs to.
        scoring, reencode: layers that score, at least 1, and that rewrite.
        most: of an item's tokens that the predicted budget keeps ("nmax").
        share: least and largest share that it keeps ("rho").
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        depth: int,
        *,
        scoring: int = 1,
        reencode: int = 1,
        most: int = 2560,
        share: Sequence[float] = (0.05, 0.5),
    ) -> None:
        super().__init__()
        self.width, self.heads, self.kv_heads, self.depth = width, heads, kv_heads, depth
        self.most, self.share = most, tuple(share)
        if not (scoring >= 1 and reencode >= 0 and most >= 1 and 0 < self.share[0] <= self.share[1] <= 1):
            raise ValueError(
                f"a selector has scoring layers, a largest count of at least 1 and shares in (0, 1], not {scoring=}, "
                f"{reencode=}, {most=}, {share=}"
            )
        if width % heads or heads % kv_heads:
            raise ValueError(f"{width} columns do not divide among {heads} heads, or these among {kv_heads} of keys")
        sizes = (width, heads, kv_heads)
        self.scoring_layers = nn.ModuleList([*(Block(*sizes) for _ in range(scoring - 1)), Scorer(*sizes)])
        self.budget = _Budget(width)
        self.reencode_layers = nn.ModuleList(_Core(Block(*sizes)) for _ in range(reencode))

    def scores(self, question: Tensor, rows: Tensor, words: Tensor, valid: Tensor) -> Tensor:
        """`relevance` of the visual tokens, fp32 [I, N].

        Args:
            question: [I, M, D], input embeddings of its tokens.
            rows: [I, N, D], visual tokens as the language model sees them.
            words, valid: bool [I, M] and [I, N], which of them are real.
        """
        layers: list[Any] = list(self.scoring_layers)
        *before, last = layers
        for layer in before:
            question = layer(question, rows, _bias(valid))
        queries, keys = last.project(question, rows)
        return relevance(queries, keys, words, valid)

    def shares(self, question: Tensor, scores: Tensor, words: Tensor, valid: Tensor) -> Tensor:
        """rho, fp32 [I]: the share of an item's tokens to keep, from the question's mean and the scores [I, N]."""
        mean = (question.float() * words[..., None]).sum(1) / words.sum(1, keepdim=True).clamp(min=1)
        count = valid.sum(1, keepdim=True).float().log()
        known = torch.cat([mean, count, scores.amax(1, keepdim=True), entropy(scores)[:, None]], 1)
        low, high = self.share
        return low + (high - low) * self.budget(known).sigmoid()

    def counts(self, shares: Tensor, valid: Tensor) -> Tensor:
        """n, int64 [I]: min(max(1, ceil(rho N)), most)."""
        return (shares * valid.sum(1)).ceil().clamp(1, self.most).long()

    def rewrite(self, rows: Tensor, there: Tensor | None) -> Tensor:
        """Re-encode rows [I, K, D]: bidirectional attention among an item's own, without positions.

        Args:
            there: bool [I, K], which rows are real; or an fp32 bias on the attention they get. None: all.
        """
        for layer in self.reencode_layers:
            rows = layer(rows, _bias(there))
        return rows

    def save(self, folder: str | Path, **notes: Any) -> None:
        """Write `model.safetensors` (fp16) and `config.json`; `notes` go into the latter."""
        save_module(
            self,
            folder,
            torch.float16,
            method="qtsplus",
            width=self.width,
            heads=self.heads,
            kv_heads=self.kv_heads,
            depth=self.depth,
            scoring=len(self.scoring_layers),
            reencode=len(self.reencode_layers),
            most=self.most,
            share=list(self.share),
            **notes,
        )

    @classmethod
    def load(cls, folder: str | Path) -> TokenSelector:
        """Read what `save` wrote, or the selector alone of a published checkpoint, on the CPU, in evaluation mode.

        A published checkpoint is a whole model as transformers saves it, whose `config.json` has fields `qts_plus_*`;
        of its shards only what stands behind `model.qts_plus.selector.` is read.

        Raises:
            ValueError: neither of both, or tensors that are missing or do not fit the config.
        """
        try:
            config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            config = {}
        if isinstance(config, dict) and any(name.startswith("qts_plus") for name in config):
            selector = load_part(folder, PREFIX, cls._published(folder, config))
            selector.budget.float()
            return selector
        return load_module(folder, "qtsplus", "training/qtsplus.py", cls._saved)

    @classmethod
    def _saved(cls, config: dict[str, Any]) -> TokenSelector:
        fields = {name: config[name] for name in ("scoring", "reencode", "most", "share")}
        return cls(config["width"], config["heads"], config["kv_heads"], config["depth"], **fields)

    @classmethod
    def _published(cls, folder: str | Path, config: dict[str, Any]) -> TokenSelector:
        text = {**(config.get("text_config") or {}), **config}
        try:
            width, heads = text["hidden_size"], text["num_attention_heads"]
            if text.get("vision_embed_size", width) != width:
                raise ValueError(
                    f"it scores rows {text['vision_embed_size']} wide, which a projector of its own takes, and not the "
                    f"{width} wide ones of the language model"
                )
            with torch.device("meta"):
                return cls(
                    width,
                    heads,
                    text.get("num_key_value_heads") or heads,
                    text["num_hidden_layers"],
                    scoring=text.get("qts_plus_scoring_layers", 1),
                    reencode=text.get("qts_plus_reencode_layers", 1) if text.get("qts_plus_reencode", True) else 0,
                    most=text.get("qts_plus_nmax", 2560),
                    share=(text.get("qts_plus_rho_min", 0.05), text.get("qts_plus_rho_max", 0.5)),
                )
        except (KeyError, TypeError, ValueError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"the config.json of {str(folder)!r} describes no QTSplus selector: {what}") from error


class _Counted(Pruner):
    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 1) -> Sequence[int | None]:
        if isinstance(self.keep, numbers.Integral):
            return [min(int(self.keep), count) for count in counts]
        return [min(count, max(1, math.ceil(self.keep * count - 1e-9))) if count else 0 for count in counts]


@register_pruner
@dataclass(kw_only=True)
class QTSplus(_Counted):
    """Score visual tokens by the question with trained cross-attention, predict how many it needs, rewrite these.

    "Seeing the Forest and the Trees: Query-Aware Tokenizer for Long-Video Multimodal Language Models", arXiv
    2511.11910. Trained, aware of the question. A token's score is the largest weight that any head of any token of the
    question gives it; a small MLP reads the question, the number of tokens and the scores' maximum and entropy and
    predicts the share rho to keep; the best n = min(max(1, ceil(rho N)), nmax) stay, in order, and layers of attention
    among them rewrite their rows. A `keep` other than None takes the place of the prediction: ceil(keep N), or a count.

    `weights` is a folder: one that `training/qtsplus.py` wrote, or a published checkpoint (a whole model, of which the
    selector alone is read: language model and vision tower in use should be those it was trained with, which further
    fine-tuning changes); or the selector itself, as it is at the first call. Without weights there is
    `qtsplus-training-free`.

    Differences. Positions are renumbered, as in the official code, but not on M-RoPE families (Qwen-VL): there the
    official code numbers all tokens of the prompt 0, 1, 2, ... on all three axes, which is all that published weights
    have seen, while this package keeps the original three. So official Qwen2.5-VL weights run at positions that they
    were not trained with. Each image or video is an item with a budget of its own, where official code
    joins a prompt's videos into one set. Items of a batch are rewritten each by itself; official code pads shorter ones
    with copies of their last token, without a mask. The share is computed in fp32.
    """

    keep: Keep = None  # type: ignore[assignment]  # as predicted
    positions: Positions = "compact"
    weights: str | Path | TokenSelector | None = None
    reencode: bool = True

    name: ClassVar[str] = "qtsplus"
    paper: ClassVar[str] = "arXiv 2511.11910"
    needs: ClassVar[frozenset[str]] = frozenset({"instruction", "instruction_mask"})
    query_aware: ClassVar[bool] = True
    trained: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        source = "training/qtsplus.py wrote or of a QTSplus checkpoint"
        self._selector = trained_module(self.name, TokenSelector, self.weights, source, "qtsplus-training-free")
        self._placed: tuple[torch.device, torch.dtype, TokenSelector] | None = None

    def check_model(self, config: Any) -> None:
        check_made_for(self.name, "training/qtsplus.py", self._selector, config)

    def layers(self, depth: int) -> tuple[int, ...]:
        if depth != self._selector.depth:
            raise ValueError(
                f"these weights of qtsplus are for a language model of {self._selector.depth} layers, this one has "
                f"{depth}: train others with training/qtsplus.py, or use qtsplus-training-free"
            )
        return (0,)

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 1) -> Sequence[int | None]:
        return [None] * len(counts) if self.keep is None else super().budget(counts, layer, depth)

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        question, words, valid = tokens.signal("instruction"), tokens.signal("instruction_mask"), tokens.valid
        check_width("qtsplus", "training/qtsplus.py", self._selector.width, tokens)
        selector = self._on(tokens.features)
        with torch.no_grad():
            scores = selector.scores(question, tokens.features, words, valid)
            if self.keep is None:
                budget = selector.counts(selector.shares(question, scores, words, valid), valid).cpu()
            index = best(scores, budget, valid)
            if not (self.reencode and selector.reencode_layers):
                return Selection(index)
            rows = tokens.features.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, selector.width))
            rows = selector.rewrite(rows, index >= 0 if len(index) > 1 else None)
        return Selection(index, rows, merged=torch.zeros_like(index, dtype=torch.bool))

    def _on(self, features: Tensor) -> TokenSelector:
        """The selector where the features are and as precise as they are."""
        if self._placed is None or self._placed[:2] != (features.device, features.dtype):
            made = copy.deepcopy(self._selector).to(features.device)
            for layers in (made.scoring_layers, made.reencode_layers):
                layers.to(features.dtype)
            self._placed = (features.device, features.dtype, made)
        return self._placed[2]

    def selection_flops(self, sizes: Sizes) -> int:
        selector, width, words, n = self._selector, sizes.width, sizes.words, sizes.tokens
        narrow = width // selector.heads * selector.kv_heads
        score = 2 * width * (words * width + n * narrow + words * n)
        # Before the last one: values, the sum over them, the output projection and the FFN as well.
        more = 2 * width * (n * narrow + words * n + 9 * words * width)
        share = 2 * HIDDEN * (width + 4) if self.keep is None else 0
        layers, kept = len(selector.reencode_layers) * self.reencode, sizes.keep
        layer = 2 * kept * width * (10 * width + 2 * narrow) + 4 * kept * kept * width
        blocks = len(selector.scoring_layers) - 1
        return blocks * (score + more) + score + share + layers * layer


@register_pruner
@dataclass(kw_only=True)
class QTSplusTrainingFree(_Counted):
    """QTSplus's scores by the language model's own last layer, with no training: its accuracy is not QTSplus's.

    A stand-in for `qtsplus` (arXiv 2511.11910), aware of the question. Queries of the question's embeddings and keys of
    the visual tokens come from the last decoder layer, where the official code copies its scoring layer from to begin
    training, with that layer's input norm for both and without rotation. The share is fixed (the default is the 11 %
    that the paper keeps), nothing is rewritten, and positions are original.
    """

    keep: Keep = 0.11
    positions: Positions = "original"

    name: ClassVar[str] = "qtsplus-training-free"
    paper: ClassVar[str] = "after arXiv 2511.11910, without its training"
    needs: ClassVar[frozenset[str]] = frozenset({"instruction_queries", "instruction_keys", "instruction_mask"})
    query_aware: ClassVar[bool] = True

    def selection_flops(self, sizes: Sizes) -> int:
        return 2 * sizes.words * sizes.tokens * sizes.decoder_heads * sizes.decoder_key

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        queries, keys = tokens.signal("instruction_queries"), tokens.signal("instruction_keys")
        return Selection(
            best(relevance(queries, keys, tokens.signal("instruction_mask"), tokens.valid), budget, tokens.valid)
        )


def best(scores: Tensor, budget: Tensor, valid: Tensor) -> Tensor:
    """int64 [I, K]: the `budget` [I] largest scores of each item, in ascending order, then -1."""
    index = top_indices(scores.masked_fill(~valid, -1), budget)
    end = scores.shape[1]
    index = index.masked_fill(index < 0, end).sort(dim=1).values
    return index.masked_fill(index == end, -1)


def _bias(there: Tensor | None) -> Tensor | None:
    if there is None or there.is_floating_point():
        return there
    return torch.zeros(there.shape, device=there.device).masked_fill(~there, -torch.inf)
