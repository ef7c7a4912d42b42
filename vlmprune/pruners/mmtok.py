from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmprune.contract import Keep, Positions, Presets, Pruner, Selection, Sizes, VisualTokens
from vlmprune.kernels import coverage_select, gram_flops, pairwise_cosine
from vlmprune.pruners._places import fill_up, placed
from vlmprune.pruners.scope import PerTile
from vlmprune.registry import register_pruner

_TABLE = 1 << 28  # entries of the N x N tables held at a time: 1 GiB in fp32

_INSTRUCTIONS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
_LEFT_OUT = """
    a an the
    am is are was were be been being has have had having do does did doing done
    i me my mine myself you your yours yourself yourselves he him his himself she her hers herself
    it its itself we us our ours ourselves they them their theirs themselves
    what which who whom whose when where why how
    and or but so if then question answer
    to for with by from at into onto upon
"""
_STOP_WORDS = frozenset(_LEFT_OUT.split())


@register_pruner
@dataclass(kw_only=True)
class MMTok(Pruner):
    """Keep the visual tokens that together cover the words of the question and all visual tokens best.

    Dong et al., "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs", ICLR 2026, arXiv 2508.18264.
    Training-free. Two tables of cosines, each row a softmax over the visual tokens: question words against projected
    tokens, and tokens against tokens on the features before the projector. Greedy facility location over both rows
    reaches at least 1 - 1/e of the best coverage (monotone submodular). See `coverage_tables` and `mmtok_select`.

    Published per crop on LLaVA-NeXT (`PerTile(MMTok(...))` here) and jointly over all images of a prompt on Qwen; an
    item is a pool of its own here. Published positions compact (M-RoPE families: original). The words are the
    question's own tokens. The official LLaVA code filters them; to do the same, embed `question_words(...)` with the
    model's tokenizer and embedding table and give them as `text`.

    Unlike the official code: everything after the inputs in fp32 (a zero row is similar to nothing instead of NaN), no
    token is ever picked twice, a ratio rounds half to even, line breaks are neither candidates nor rows, and the
    letterbox of padded pictures stays a candidate (`mmtok_select` can exclude tokens; the runtime does not know it).

    Args:
        text_temperature: softmax temperature of the word rows (tau_t).
        visual_temperature: of the token rows (tau_v).
        alpha: weight of the token rows. At 0 the words alone decide, and once each has its best token the rest goes by
            index.
        text: [M, D], embeddings of words to cover instead of the question's, the same for every item. An answer of
            another model can be appended to them (the paper's optional agent).
    """

    keep: Keep = 64
    positions: Positions = "compact"
    text_temperature: float = 0.02
    visual_temperature: float = 0.2
    alpha: float = 0.5
    text: Tensor | None = field(default=None, repr=False, compare=False)

    name: ClassVar[str] = "mmtok"
    paper: ClassVar[str] = "arXiv 2508.18264"
    query_aware: ClassVar[bool] = True
    presets: ClassVar[Presets] = {
        "llava-1.5": {tokens: {"keep": tokens} for tokens in (64, 128, 192)},
        # Per crop: 32, 64 or 128 of each one's 576.
        "llava-next": {tokens: {"keep": tokens / 2880} for tokens in (160, 320, 640)},
        "qwen2.5-vl": {
            share: {"keep": share, "text_temperature": 0.01, "positions": "original"} for share in (0.2, 0.1, 0.05)
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.text_temperature > 0 and self.visual_temperature > 0):
            raise ValueError("mmtok needs text_temperature and visual_temperature above 0")
        if not self.alpha >= 0:
            raise ValueError(f"mmtok needs alpha >= 0, got {self.alpha!r}")
        if self.text is not None and (self.text.dim() != 2 or not self.text.is_floating_point()):
            raise ValueError(f"mmtok's text must be word embeddings [M, D], got {list(self.text.shape)}")

    @classmethod
    def preset(cls, name: str, average_tokens: float | None = None, **fields: Any) -> Pruner:
        pruner = super().preset(name, average_tokens, **fields)
        return PerTile(pruner) if name == "llava-next" else pruner

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        words = () if self.text is not None else ("instruction", "instruction_mask")
        return frozenset({"encoder_features", *words})

    def selection_flops(self, sizes: Sizes) -> int | None:
        words = sizes.words if self.text is None else len(self.text)
        return 2 * words * sizes.tokens * sizes.width + gram_flops(sizes.tokens, sizes.encoder_width)

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        if self.text is None:
            text, text_mask = tokens.signal("instruction"), tokens.signal("instruction_mask")
        else:
            if self.text.shape[1] != tokens.features.shape[-1]:
                raise ValueError(
                    f"mmtok's text has {self.text.shape[1]} columns, the language model's embeddings "
                    f"{tokens.features.shape[-1]}: embed the words with model.get_input_embeddings()"
                )
            text, text_mask = self.text.to(tokens.features).expand(len(tokens.counts), -1, -1), None
        index = mmtok_select(
            tokens.features,
            tokens.signal("encoder_features"),
            budget,
            text=text,
            text_mask=text_mask,
            mask=placed(tokens),
            text_temperature=self.text_temperature,
            visual_temperature=self.visual_temperature,
            alpha=self.alpha,
        )
        return Selection(fill_up(index, tokens, budget))


@torch.no_grad()
def mmtok_select(
    features: Tensor,
    encoder_features: Tensor,
    k: Tensor,
    *,
    text: Tensor,
    text_mask: Tensor | None = None,
    mask: Tensor | None = None,
    exclude: Tensor | None = None,
    text_temperature: float = 0.02,
    visual_temperature: float = 0.2,
    alpha: float = 0.5,
    backend: str = "auto",
) -> Tensor:
    """Greedy maximum of f(S) = sum of max over S of each row of [P; alpha Q], in the order of selection.

    Args:
        features: [I, N, D] projected visual tokens V.
        encoder_features: [I, N, C] the same before the projector, V'.
        k: int64 [I], picks of each item.
        text: [I, M, D] word embeddings T.
        text_mask: bool [I, M], which of them are words; None: all.
        mask: bool [I, N], which rows are visual tokens; None: all.
        exclude: bool [I, N], tokens that may not be picked (padding of the picture) but count in every softmax.
        text_temperature, visual_temperature, alpha: as in `MMTok`.
        backend: of the kernels.

    Returns:
        int64 [I, K], -1 behind an item's last; an item with fewer candidates than its `k` yields all of them.
    """
    items, n = features.shape[:2]
    valid = torch.ones(items, n, dtype=torch.bool, device=features.device) if mask is None else mask
    words = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if text_mask is None else text_mask
    candidates = valid if exclude is None else valid & ~exclude
    width = min(int(k.max()), n)
    picks = []
    # Items need not be held together, and their tables are the largest thing here.
    for part in torch.arange(items, device="cpu").split(max(1, _TABLE // max(1, n * n))):
        some = slice(int(part[0]), int(part[-1]) + 1)
        words_table, tokens_table = coverage_tables(
            features[some],
            encoder_features[some],
            text[some],
            words[some],
            valid[some],
            text_temperature,
            visual_temperature,
            backend,
        )
        chosen = coverage_select(
            tokens_table,
            k[some],
            text=words_table,
            visual_weight=alpha,
            mask=candidates[some],
            max_k=width,
            backend=backend,
        )
        picks.append(torch.nn.functional.pad(chosen, (0, width - chosen.shape[1]), value=-1))
    return torch.cat(picks)


def coverage_tables(
    features: Tensor,
    encoder_features: Tensor,
    text: Tensor,
    text_mask: Tensor,
    mask: Tensor,
    text_temperature: float,
    visual_temperature: float,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """P = softmax(cos(T, V) / tau_t) / m, fp32 [I, M, N], and Q = softmax(cos(V', V') / tau_v) / n, fp32 [I, N, N].

    The softmax is over the n visual tokens of an item, m its words; rows and columns of neither are zero. An item
    without words has P = 0.
    """
    words = pairwise_cosine(text, features, mask=text_mask, y_mask=mask, backend=backend)
    tokens = pairwise_cosine(encoder_features, mask=mask, backend=backend)
    return _calibrate(words, text_temperature, text_mask, mask), _calibrate(tokens, visual_temperature, mask, mask)


def _calibrate(similarity: Tensor, temperature: float, rows: Tensor, columns: Tensor) -> Tensor:
    """softmax(similarity / temperature) over `columns`, divided by the number of `rows`; in place, to save memory."""
    similarity.div_(temperature).masked_fill_(~columns[:, None], -torch.inf)
    similarity.sub_(similarity.amax(-1, keepdim=True)).exp_()
    similarity.div_(similarity.sum(-1, keepdim=True).mul_(rows.sum(1).clamp(min=1)[:, None, None]))
    return similarity.masked_fill_(~rows[..., None], 0.0)


def question_words(text: str) -> str:
    """The words of a question that MMTok's official LLaVA code covers: without placeholders, answer format, stop words.

    >>> question_words("What is the color of the dog on the left?")
    'color of dog on left'
    """
    text = re.sub(r"^(\s*<image>\s*)+", "", text)
    question = text
    for instruction in _INSTRUCTIONS:
        question = question.replace(instruction, "")
    words = [word for word in re.findall(r"\b\w+\b", question) if word.lower() not in _STOP_WORDS]
    return " ".join(words) if words else text.strip()
