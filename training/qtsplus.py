"""Train QTSplus's selector for a model: `python training/qtsplus.py --out FOLDER`.

The model is frozen. The loss is the answer's next-token loss and three terms on the predicted share rho of an item's N
tokens (arXiv 2511.11910): lambda_t (rho N)^2 / nmax^2 + lambda_m rho N / nmax + lambda_s (rho - its running mean)^2.
The best n = ceil(rho N) tokens are chosen as in use, and the gradient goes straight through the choice to a soft one,
sigmoid((log r - t) / tau) with t so that rho N are kept: the rest stays in the sequence at an attention bias of
log(1e-8), so that every token learns what its coming would change. In a share of the batches (`drawn`) n is drawn
instead of predicted, so that the scores also serve a `keep` of the user's.

Layers begin as the language model's: the scoring layer as the last, the i-th that rewrites as the i-th, but for their
FFN, which has another form and begins with no effect.

Without `--model` and `--data` it trains on the bundled model and scenes, minutes on one CPU core. For others see
`training/atp.py`. A batch holds all visual tokens through the language model, with gradients.
"""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import reduce, set_seed
from loop import descend, forever, held_out_means, loaders, notes
from questions import from_arguments, load
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from vlmprune.adapters import adapter_for
from vlmprune.contract import Item
from vlmprune.pruners.qtsplus import Block, Scorer, TokenSelector, best, threshold
from vlmprune.signals import question_columns

LEAST = 1e-8  # of a soft mask, so that its logarithm is finite


@dataclass
class Settings:
    """What a run can change.

    Attributes:
        model: checkpoint, hub id or folder; None: the bundled model.
        data: JSON Lines file; "digit-clips": drawn clips, for the bundled video model; None: drawn scenes.
        start: folder of a selector to go on from, or a published checkpoint.
        scenes: number of these, for training and for measuring.
        steps, batch, rate: of AdamW, cosine decay; `batch` is per process.
        scoring, reencode, most, share: of the selector; `most` is nmax, to which the budget terms are relative.
        temperature: tau of the soft choice.
        drawn: share of the batches whose number of tokens is drawn, log-uniformly from the range of shares.
        counts: numbers of tokens at which the held-out questions are asked in the end.
    """

    out: Path = Path("out/qtsplus")
    model: str | None = None
    data: str | None = None
    start: str | None = None
    scenes: tuple[int, int] = (600, 64)
    steps: int = 500
    batch: int = 24
    rate: float = 1e-3
    scoring: int = 1
    reencode: int = 1
    most: int = 72
    share: tuple[float, float] = (0.05, 0.5)
    temperature: float = 0.5
    drawn: float = 0.5
    lambda_t: float = 0.1
    lambda_m: float = 0.17
    lambda_s: float = 0.05
    counts: tuple[int, ...] = (36, 18, 9)
    seed: int = 3


class Selection:
    """Hooks that let a selector choose and rewrite tokens of a model of a supported family while it runs unpruned.

    Attributes:
        prompt: columns that belong to the prompts, in front of the answers, of the next call.
        shown: bool [B, S], False for padding, of the next call.
        wanted: tokens to keep of each item; None: as many as predicted.
        temperature: of the soft choice; 0: hard, as in use, without gradients.
        shares, lengths: after a call, fp32 [I]: what was predicted, and tokens of each item.
        kept: after a call, bool [I, N].
    """

    def __init__(self, model: nn.Module, selector: TokenSelector) -> None:
        self.adapter, self.selector = adapter_for(model), selector
        self.prompt, self.temperature = 0, 0.0
        self.wanted: int | None = None
        self.shown: Tensor
        self.shares: Tensor
        self.lengths: Tensor
        self.kept: Tensor
        self._items: list[Item] = []
        self._ids: Tensor | None = None
        self.handles = [
            self.adapter.core.register_forward_pre_hook(self._before_core, with_kwargs=True),
            self.adapter.language_model.register_forward_pre_hook(self._before_language_model, with_kwargs=True),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _before_core(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        call = self.adapter.bind(args, kwargs)
        self._items, self._ids = self.adapter.items(call), call["input_ids"].cpu()

    def _before_language_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        embeds, items, selector = kwargs["inputs_embeds"], self._items, self.selector
        device, ids, shown = embeds.device, self._ids, self.shown.cpu()
        assert ids is not None
        words = question_columns(self.adapter, ids[:, : self.prompt], items, shown[:, : self.prompt])
        places = [torch.arange(item.start, item.stop) if item.columns is None else item.columns for item in items]
        row = torch.tensor([item.sample for item in items])
        columns = pad_sequence([place.cpu() for place in places], batch_first=True, padding_value=-1).to(device)
        asked = pad_sequence([words[item.sample] for item in items], batch_first=True, padding_value=-1).to(device)
        row, valid, real = row.to(device)[:, None], columns >= 0, asked >= 0
        rows = embeds[row, columns.clamp(min=0)] * valid[..., None]
        question = embeds[row, asked.clamp(min=0)] * real[..., None]

        scores = selector.scores(question, rows, real, valid)
        self.lengths = valid.sum(1)
        self.shares = selector.shares(question, scores, real, valid)
        if self.wanted is None:
            expected, count = self.shares * self.lengths, selector.counts(self.shares.detach(), valid)
        else:
            count = self.lengths.clamp(max=self.wanted)
            expected = count.float()
        index = best(scores.detach(), count.cpu(), valid)
        chosen = torch.zeros(valid.shape[0], valid.shape[1] + 1, dtype=torch.bool, device=device)
        self.kept = chosen.scatter(1, index.masked_fill(index < 0, valid.shape[1]), True)[:, :-1]
        if self.temperature:
            log = scores.clamp(min=LEAST).log()
            at = threshold(log, torch.minimum(expected, self.lengths - 0.5), valid, self.temperature)
            soft = ((log - at[:, None]) / self.temperature).sigmoid()
            mask = soft + (self.kept.float() - soft).detach()
            bias = (LEAST + (1 - LEAST) * mask).log()
        else:
            bias = torch.zeros(valid.shape, device=device).masked_fill(~self.kept, -torch.inf)
        lowest = torch.finfo(embeds.dtype).min / 4
        bias = bias.clamp(min=lowest).masked_fill(~valid, lowest)
        rewritten = selector.rewrite(rows, bias)
        there = (row.expand_as(columns)[valid], columns[valid])
        embeds = embeds.index_put(there, rewritten[valid].to(embeds.dtype))
        shown = self.shown.to(device)
        keys = torch.zeros(shown.shape, device=device).masked_fill(~shown, lowest).index_put(there, bias[valid])
        causal = torch.full((shown.shape[1],) * 2, lowest, device=device).triu(1)
        changed = {"inputs_embeds": embeds, "attention_mask": (causal + keys[:, None, None]).to(embeds.dtype)}
        if "compact" in self.adapter.positions:
            left = shown.index_put(there, self.kept[valid])
            changed["position_ids"] = (left.cumsum(1) - 1).clamp(min=0)
        return args, {**kwargs, **changed}


class Training(nn.Module):
    """Model and selector as one, so that accelerate can wrap them together."""

    def __init__(self, model: nn.Module, selector: TokenSelector, settings: Settings) -> None:
        super().__init__()
        self.model, self.selector, self.settings = model, selector, settings
        self.selection = Selection(model, selector)
        self.usual: Tensor
        self.register_buffer("usual", torch.tensor(math.nan))  # running mean of the predicted shares

    def forward(self, inputs: dict[str, Tensor], wanted: int | None, temperature: float) -> dict[str, Tensor]:
        """Losses, and of each item what was predicted and kept, [I]; `right`: whether a whole answer is."""
        labels = inputs["labels"]
        replies = labels[:, 1:] != -100
        first = int(replies.any(0).nonzero()[0])
        selection, settings = self.selection, self.settings
        selection.wanted, selection.temperature = wanted, temperature
        selection.prompt, selection.shown = first + 1, inputs["attention_mask"].bool()
        call = {name: value for name, value in inputs.items() if name != "labels"}
        logits = self.model(**call, use_cache=False, logits_to_keep=labels.shape[1] - first).logits[:, :-1].float()
        target, replies = labels[:, first + 1 :], replies[:, first:]
        answer = F.cross_entropy(logits[replies], target[replies])
        shares = selection.shares
        if self.training and wanted is None:
            mean = reduce(shares.detach().mean(), "mean")  # over processes
            self.usual.copy_(torch.where(self.usual.isnan(), mean, 0.9 * self.usual + 0.1 * mean))
        tokens = shares * selection.lengths / self.selector.most
        budget = settings.lambda_t * tokens.square() + settings.lambda_m * tokens
        budget = (budget + settings.lambda_s * (shares - self.usual.nan_to_num()).square()).mean()
        right = ((logits.argmax(-1) == target) | ~replies).all(1)
        loss = answer + budget if wanted is None else answer
        return {"loss": loss, "answer": answer, "share": shares, "kept": selection.kept.sum(1), "right": right}


def begin_as(layer: Scorer, source: Any) -> None:
    """Copy a decoder layer's attention and norms; what has another shape there stays as it is."""
    attention = source.self_attn
    pairs = [(layer.q_norm, source.input_layernorm), (layer.kv_norm, source.input_layernorm)]
    pairs += [(layer.q_proj, attention.q_proj), (layer.k_proj, attention.k_proj)]
    if isinstance(layer, Block):
        pairs += [(layer.v_proj, attention.v_proj), (layer.o_proj, attention.o_proj)]
        pairs += [(layer.ffn_norm, source.post_attention_layernorm)]
    with torch.no_grad():
        for mine, its in pairs:
            if mine.weight.shape == its.weight.shape:
                mine.weight.copy_(its.weight)
                if getattr(mine, "bias", None) is not None:
                    mine.bias.copy_(its.bias) if its.bias is not None else mine.bias.zero_()
        if isinstance(layer, Block):
            nn.init.zeros_(layer.ffn.net[2].weight)
            nn.init.zeros_(layer.ffn.net[2].bias)


def selector_for(model: nn.Module, settings: Settings) -> TokenSelector:
    """A new selector with the layers of the model's own, or that of `start`."""
    adapter = adapter_for(model)
    text, layers = adapter.text_config, adapter.decoder_layers
    if settings.start:
        selector = TokenSelector.load(settings.start).float().train().requires_grad_(True)
        if (selector.width, selector.depth) != (text.hidden_size, len(layers)):
            raise ValueError(f"{settings.start!r} holds a selector for another language model: start without it")
        return selector
    heads = text.num_attention_heads
    selector = TokenSelector(
        text.hidden_size,
        heads,
        text.num_key_value_heads or heads,
        len(layers),
        scoring=settings.scoring,
        reencode=settings.reencode,
        most=settings.most,
        share=settings.share,
    )
    for layer in selector.scoring_layers:
        begin_as(layer, layers[-1])
    for number, layer in enumerate(selector.reencode_layers):
        begin_as(layer.core, layers[min(number, len(layers) - 1)])
    return selector


def drawn(settings: Settings, step: int, tokens: int) -> int | None:
    """Tokens to keep of items of about `tokens` in this step, or None for the predicted number; of the step alone."""
    if math.floor((step + 1) * settings.drawn) == math.floor(step * settings.drawn):
        return None
    low, high = map(math.log, settings.share)
    golden = (step * 0.6180339887) % 1.0  # even coverage of the range
    return max(1, round(tokens * math.exp(low + (high - low) * golden)))


def train(settings: Settings) -> TokenSelector:
    """Train, measure and save; returns the selector."""
    accelerator = Accelerator()
    set_seed(settings.seed)
    model, processor = load(settings.model, settings.data)
    model.set_attn_implementation("sdpa")
    model.requires_grad_(False)
    selector = selector_for(model, settings)
    optimizer = torch.optim.AdamW(selector.parameters(), settings.rate, betas=(0.9, 0.98), weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps * accelerator.num_processes)
    loader, held = loaders(settings, processor)
    training, optimizer, decay, loader, held = accelerator.prepare(
        Training(model, selector, settings), optimizer, decay, loader, held
    )
    training.train()
    model.eval()
    began, batches = time.monotonic(), forever(loader)

    def run(step: int) -> dict[str, Tensor]:
        # About as many as an item of the batch before had.
        tokens = round(accelerator.unwrap_model(training).selection.lengths.float().mean().item()) if step else 0
        return training(next(batches), drawn(settings, step, tokens) if tokens else None, settings.temperature)

    shown = ("answer", "share", "kept", "right")
    descend(accelerator, run, training, optimizer, decay, steps=settings.steps, shown=shown, every=25)
    minutes = (time.monotonic() - began) / 60
    reached = measure(accelerator, training, held, settings)
    if accelerator.is_main_process:
        made_for = {"model_type": model.config.model_type, "positions": "compact"}
        if "compact" not in adapter_for(model).positions:
            made_for["positions"] = "original"
        selector.save(
            settings.out, model=made_for, training=notes(settings), minutes=round(minutes, 1), held_out=reached
        )
    return selector


@torch.no_grad()
def measure(
    accelerator: Accelerator, training: nn.Module, held: DataLoader, settings: Settings
) -> list[dict[str, float | str]]:
    """Tokens kept on average and share of right answers on held-out questions: as predicted, and at `counts`."""
    training.eval()
    rows: list[dict[str, float | str]] = []
    for wanted in (None, *settings.counts):
        run = functools.partial(training, wanted=wanted, temperature=0.0)
        mean, share = held_out_means(accelerator, held, run, "kept", "right")
        accelerator.print(f"{wanted or 'predicted'}: kept {mean:.2f}, right {share:.4f}", flush=True)
        rows.append({"asked": wanted or "predicted", "kept": round(mean, 2), "right": round(share, 4)})
    return rows


if __name__ == "__main__":
    train(from_arguments(Settings, __doc__))
