"""Train ATP's threshold modules for a model: `python training/atp.py --out FOLDER`.

Tokens stay in training: a soft mask M in (0, 1) is added as log M to the attention logits of visual keys in all layers
behind a module, multiplied over modules. The loss is the answer's next-token loss plus two budget losses (ATP-LLaVA,
arXiv 2412.00447, Eq. 12 to 14). The model is frozen unless `--tune` is given. Each batch names another average to the
modules, so that the finished ones serve a range of `keep`; what they really keep is measured at the end, with hard
masks, and stored with the weights.

Without `--model` and `--data` it trains on the bundled model and scenes, minutes on one CPU core. For others give a
checkpoint and a JSON Lines file of {"image" (or "video"): path, "question": text, "answer": text}, and start it with
`accelerate launch` for several processes. Settings may also stand in a JSON file (`--config`), by the same names.
Attention maps are needed, so the model runs with eager attention.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from loop import descend, forever, held_out_means, loaders, notes, parameter_groups
from questions import from_arguments, load
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vlmprune.adapters import adapter_for
from vlmprune.contract import Item
from vlmprune.pruners._schedule import layer_average, stage_layers
from vlmprune.pruners.atp import (
    LAYERS,
    ThresholdModules,
    cross_scores,
    hard_mask,
    normalise,
    self_scores,
    soft_mask,
    spatial_scores,
    statistics,
)

LEAST = 1e-6  # of a soft mask, so that its logarithm is finite


@dataclass
class Settings:
    """What a run can change.

    Attributes:
        model: checkpoint, hub id or folder; None: the bundled model.
        data: JSON Lines file; "digit-clips": drawn clips, for the bundled video model; None: drawn scenes.
        start: folder of modules to go on from.
        scenes: number of these, for training and for measuring.
        steps, batch, rate, language_rate: of AdamW, cosine decay; `batch` is per process.
        wanted: least and largest average share, behind the first module, that a batch asks for (log-uniform).
        temperature: of the masks, from first to last step.
        lambda_atp, lambda_target: weights of Eq. 13 and of the distance to the wanted average, in tokens.
        tune: train the language model as well.
    """

    out: Path = Path("out/atp")
    model: str | None = None
    data: str | None = None
    start: str | None = None
    scenes: tuple[int, int] = (600, 64)
    steps: int = 200
    batch: int = 24
    rate: float = 1e-2
    language_rate: float = 2e-5
    wanted: tuple[float, float] = (0.03, 0.5)
    temperature: tuple[float, float] = (30.0, 150.0)
    lambda_atp: float = 0.02
    lambda_target: float = 0.05
    hidden: int = 64
    tune: bool = False
    seed: int = 3


class SoftPruning:
    """Hooks that let threshold modules mask visual keys of a model of a supported family while it runs unpruned.

    Attributes:
        wanted: average share behind the first module that the next call is to ask for.
        temperature: of the masks; None: hard ones, as in inference.
        prompt: bool [B, S], columns that belong to the prompt, of the next call.
        left: after a call, each module's masks [I, N], multiplied over modules.
        statistics: what each module was told, [I, 10].
        counts: number of each item's tokens, float [I].
    """

    def __init__(self, model: nn.Module, modules: ThresholdModules) -> None:
        self.adapter, self.modules = adapter_for(model), modules
        self.wanted, self.temperature = 1.0, 10.0
        self.prompt: Tensor
        self.left: list[Tensor] = []
        self.statistics: list[Tensor] = []
        self.counts: Tensor
        self._items: list[Item] = []
        self._attention: Tensor
        self._bias: Tensor | None = None
        self.handles = [self.adapter.core.register_forward_pre_hook(self._before, with_kwargs=True)]
        for number, layer in enumerate(self.adapter.decoder_layers):
            if number + 1 in modules.layers:
                self.handles.append(layer.self_attn.register_forward_hook(self._keep_attention))
            if number >= modules.layers[0]:
                hook = functools.partial(self._before_layer, number)
                self.handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._items = self.adapter.items(self.adapter.bind(args, kwargs))
        self.left, self.statistics, self._bias = [], [], None
        device = self.prompt.device
        lengths = [item.length for item in self._items]
        self.counts = torch.tensor(lengths, dtype=torch.float32, device=device)
        self._row = torch.tensor([item.sample for item in self._items], device=device)
        width = max(lengths)
        columns = [
            torch.arange(item.start, item.stop) if item.columns is None else item.columns.cpu() for item in self._items
        ]
        self._columns = torch.stack([F.pad(each, (0, width - len(each)), value=-1) for each in columns]).to(device)
        self._spatial = torch.stack(
            [F.pad(spatial_scores(i.geometry), (0, width - i.length), value=-1.0) for i in self._items]
        ).to(device)
        real = self._columns >= 0
        visual = torch.zeros_like(self.prompt)
        visual[self._row[:, None].expand_as(real)[real], self._columns[real]] = True
        behind = torch.arange(self.prompt.shape[1], device=device) > self._columns.amax(1, keepdim=True)
        self._text = behind & (self.prompt & ~visual)[self._row]

    def _keep_attention(self, module: nn.Module, args: Any, output: Any) -> None:
        if output[1] is None:
            raise ValueError("training ATP needs attention maps: load the model with attn_implementation='eager'")
        self._attention = output[1].float().mean(1)

    def _before_layer(self, number: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if number in self.modules.layers:
            mask = self._module(self.modules.layers.index(number))
            log = mask.clamp(min=LEAST).log() if self.temperature else (1 - mask) * torch.finfo(mask.dtype).min / 2
            bias = torch.zeros(self.prompt.shape, dtype=log.dtype, device=log.device)
            real = self._columns >= 0
            rows = self._row[:, None].expand_as(real)[real]
            self._bias = bias.index_put((rows, self._columns[real]), log[real])
        given = kwargs["attention_mask"]
        return args, {**kwargs, "attention_mask": given + self._bias[:, None, None].to(given.dtype)}

    def _module(self, number: int) -> Tensor:
        """The masks [I, N] of this module and those before it."""
        columns = self._columns.clamp(min=0)
        maps = self._attention[self._row]
        maps = maps.gather(2, columns[:, None].expand(-1, maps.shape[1], -1))
        alive = self.left[-1] if self.left else (self._columns >= 0).float()
        visual = maps.gather(1, columns[..., None].expand(-1, -1, columns.shape[1]))
        own = self_scores((visual * alive[..., None]).sum(1), alive)
        cross = cross_scores(maps, self._text)
        redundancy = (normalise(own, alive) + normalise(cross, alive)) / 2
        wanted = torch.full_like(self.counts, self.wanted)
        items = statistics(own, cross, alive, self.counts, wanted)
        self.statistics.append(items)
        thresholds = self.modules.heads[number](items)
        if self.temperature:
            mask = alive * soft_mask(redundancy, self._spatial, thresholds, self.temperature)
        else:
            mask = hard_mask(redundancy, self._spatial, thresholds, alive).float()
        self.left.append(mask)
        return mask


class Training(nn.Module):
    """Model and modules as one, so that accelerate can wrap them together."""

    def __init__(self, model: nn.Module, modules: ThresholdModules, settings: Settings) -> None:
        super().__init__()
        self.model, self.atp, self.settings = model, modules, settings
        self.pruning = SoftPruning(model, modules)

    def forward(self, inputs: dict[str, Tensor], wanted: float, temperature: float | None) -> dict[str, Tensor]:
        """Losses, the mean share left behind each module, and what each item kept, [I].

        `right` says of each sample whether every token of the answer is.
        """
        pruning, modules = self.pruning, self.atp
        labels = inputs["labels"]
        pruning.wanted, pruning.temperature = wanted, temperature or 0.0
        pruning.prompt = (labels == -100) & inputs["attention_mask"].bool()
        replies = labels[:, 1:] != -100
        first = int(replies.any(0).nonzero()[0])
        kept = labels.shape[1] - first
        call = {name: value for name, value in inputs.items() if name != "labels"}
        logits = self.model(**call, use_cache=False, logits_to_keep=kept).logits[:, :-1].float()
        target, replies = labels[:, first + 1 :], replies[:, first:]
        answer = F.cross_entropy(logits[replies], target[replies])
        # Straight through: counted as in inference, with the gradient of the soft masks.
        counts = [mask.sum(1) + ((mask > 0.5).sum(1) - mask.sum(1)).detach() for mask in pruning.left]
        shares = [count / pruning.counts for count in counts]
        share = layer_average(1, shares, modules.layers, modules.depth)
        depth = sum(part.mean() * layer for part, layer in zip(shares, modules.layers))
        goal = modules.floor + wanted * (1 - modules.floor)
        target_loss = ((share - goal) * pruning.counts).mean().abs()
        loss = answer + self.settings.lambda_atp * depth + self.settings.lambda_target * target_loss
        right = ((logits.argmax(-1) == target) | ~replies).all(1)
        means = torch.stack([part.mean() for part in shares])
        return {
            "loss": loss,
            "answer": answer,
            "depth": depth,
            "target": target_loss,
            "shares": means,
            "kept": share,
            "right": right,
        }


def schedule(settings: Settings, step: int) -> tuple[float, float]:
    """Average share to ask for and temperature, both functions of the step alone."""
    low, high = map(math.log, settings.wanted)
    golden = (step * 0.6180339887) % 1.0  # even coverage of the range
    cold, hot = map(math.log, settings.temperature)
    return math.exp(low + (high - low) * golden), math.exp(cold + (hot - cold) * step / max(settings.steps - 1, 1))


def train(settings: Settings) -> ThresholdModules:
    """Train, measure and save; returns the modules."""
    accelerator = Accelerator()
    set_seed(settings.seed)
    model, processor = load(settings.model, settings.data)
    depth = len(adapter_for(model).decoder_layers)
    layers = stage_layers(LAYERS, depth)
    modules = ThresholdModules(layers, depth, settings.hidden)
    if settings.start:
        modules = ThresholdModules.load(settings.start).train().requires_grad_(True)
        if (modules.layers, modules.depth) != (layers, depth):
            raise ValueError(f"{settings.start!r} holds modules for another language model: start without it")
    optimizer = torch.optim.AdamW(parameter_groups(model, modules, settings), betas=(0.9, 0.98), weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps * accelerator.num_processes)
    loader, held = loaders(settings, processor)
    training, optimizer, decay, loader, held = accelerator.prepare(
        Training(model, modules, settings), optimizer, decay, loader, held
    )
    began, batches = time.monotonic(), forever(loader)
    if not settings.start:
        standardise(accelerator, training, modules, batches, settings)

    def run(step: int) -> dict[str, Tensor]:
        return training(next(batches), *schedule(settings, step))

    shown = ("answer", "target", "right")
    descend(accelerator, run, training, optimizer, decay, steps=settings.steps, shown=shown)
    minutes = (time.monotonic() - began) / 60
    reached = measure(accelerator, training, modules, held, settings)
    modules.reached = [(asked, kept) for asked, kept, _ in reached]
    if accelerator.is_main_process:
        held_out = {f"{kept:.4f}": round(right, 4) for _, kept, right in reached}
        language = accelerator.unwrap_model(training).model.config.get_text_config()
        made_for = {"model_type": model.config.model_type, "hidden_size": language.hidden_size}
        modules.save(
            settings.out, model=made_for, training=notes(settings), minutes=round(minutes, 1), held_out=held_out
        )
        if settings.tune:
            accelerator.unwrap_model(training).model.save_pretrained(settings.out / "language-model")
    return modules


@torch.no_grad()
def standardise(
    accelerator: Accelerator,
    training: nn.Module,
    modules: ThresholdModules,
    batches: Iterator[dict[str, Tensor]],
    settings: Settings,
) -> None:
    """Measure each module's statistics on a few batches, before anything is trained."""
    pruning, seen = accelerator.unwrap_model(training).pruning, []
    for step in range(8):
        training(next(batches), schedule(settings, step)[0], settings.temperature[0])
        seen.append([accelerator.gather(each) for each in pruning.statistics])
    for head, each in zip(modules.heads, zip(*seen)):
        head.standardise(torch.cat(each))


@torch.no_grad()
def measure(
    accelerator: Accelerator, training: nn.Module, modules: ThresholdModules, held: DataLoader, settings: Settings
) -> list[tuple[float, float, float]]:
    """(asked, kept, share of right answers) with hard masks, where a larger average asked for keeps more."""
    low, high = map(math.log, settings.wanted)
    rows: list[tuple[float, float, float]] = []
    for wanted in (math.exp(low + (high - low) * i / 6) for i in range(7)):
        run = functools.partial(training, wanted=wanted, temperature=None)
        kept, right = held_out_means(accelerator, held, run, "kept", "right")
        row = (modules.floor + wanted * (1 - modules.floor), kept, right)
        accelerator.print(f"asked {row[0]:.4f}, kept {row[1]:.4f}, right {row[2]:.4f}", flush=True)
        if not rows or row[1] > rows[-1][1]:
            rows.append(row)
    return rows


if __name__ == "__main__":
    train(from_arguments(Settings, __doc__))
