"""Train the modules of a method that condenses visual tokens: `training/condense.py --method hicom --out FOLDER`.

For HICom (arXiv 2503.16036) and VQToken (arXiv 2503.16980). The language model answers from what the method makes of
the visual tokens, in a session like any other, and the answers' next-token loss reaches the modules through the rows.
The model is frozen unless `--tune` is given: both papers train it along. Each batch keeps another share of the tokens,
so that the finished modules serve a range of `keep`. At the end answers on held-out data are counted, next to
`divprune`, `uniform`, `random` and the method's stand-in without training at as many tokens, and stored with the
weights.

Without `--model` and `--data` it trains on the bundled model and scenes, minutes on one CPU core. For others give a
checkpoint and a JSON Lines file of {"image" (or "video"): path, "question": text, "answer": text}, and start it with
`accelerate launch` for several processes. Settings may also stand in a JSON file (`--config`), by the same names.
"""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from loop import descend, forever, held_out_means, loaders, notes, parameter_groups
from questions import from_arguments, load
from torch import Tensor, nn
from torch.utils.data import DataLoader

import vlmprune
from vlmprune.adapters import adapter_for
from vlmprune.pruners.hicom import HIComModules
from vlmprune.pruners.vqtoken import VQAttention

MODULES: dict[str, type[HIComModules] | type[VQAttention]] = {"hicom": HIComModules, "vqtoken": VQAttention}
OTHERS = {
    "hicom": ("hicom_local", "divprune", "uniform", "random"),
    "vqtoken": ("kmeans_tokens", "divprune", "uniform", "random"),
}


@dataclass
class Settings:
    """What a run can change.

    Attributes:
        method: "hicom" or "vqtoken".
        model: checkpoint, hub id or folder; None: the bundled model.
        data: JSON Lines file; "digit-clips": drawn clips, for the bundled video model; None: drawn scenes.
        start: folder of modules to go on from.
        scenes: number of these, for training and for measuring.
        steps, batch, rate, language_rate: of AdamW, cosine decay behind a linear rise; `batch` is per process.
        keep: least and largest share of the tokens that a batch keeps (log-uniform).
        shares: shares to measure at.
        width, heads: of the modules.
        tune: train the language model as well.
    """

    method: str = "hicom"
    out: Path = Path("out/condense")
    model: str | None = None
    data: str | None = None
    start: str | None = None
    scenes: tuple[int, int] = (600, 64)
    steps: int = 600
    batch: int = 24
    rate: float = 2e-3
    language_rate: float = 2e-5
    keep: tuple[float, float] = (0.05, 0.5)
    shares: tuple[float, ...] = (0.5, 0.25, 0.125, 0.0625)
    width: int = 64
    heads: int = 4
    tune: bool = False
    seed: int = 3


class Condensed(nn.Module):
    """A model that sees what a pruner leaves, with the pruner's modules, so that accelerate can wrap them together."""

    def __init__(self, model: nn.Module, modules: nn.Module | None) -> None:
        super().__init__()
        self.model, self.modules_ = model, modules

    def forward(self, inputs: dict[str, Tensor], pruner: vlmprune.Pruner) -> dict[str, Tensor]:
        """The answers' "loss", and whether every token of each sample's answer is "right"."""
        with vlmprune.prune(self.model, pruner) as session:
            out = self.model(**inputs, use_cache=False)
            columns = session.last.columns if session.last.changed else None
        labels = inputs["labels"]
        if columns is not None:
            columns = columns.to(labels.device)
            labels = labels.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, -100)
        target, said = labels[:, 1:], out.logits[:, :-1].argmax(-1)
        return {"loss": out.loss, "right": ((said == target) | (target == -100)).all(1)}


def share_of(step: int, low: float, high: float) -> float:
    """The share of step `step`, log-uniform, a function of the step alone."""
    golden = (step * 0.6180339887) % 1.0  # even coverage of the range
    return math.exp(math.log(low) + (math.log(high) - math.log(low)) * golden)


def train(settings: Settings) -> nn.Module:
    """Train, measure and save; returns the modules.

    Raises:
        ValueError: an unknown method, or modules to go on from that are another model's.
    """
    if settings.method not in MODULES:
        raise ValueError(f"method must be one of {', '.join(MODULES)}, not {settings.method!r}")
    accelerator = Accelerator()
    set_seed(settings.seed)
    model, processor = load(settings.model, settings.data)
    model.set_attn_implementation("sdpa")
    kind, hidden = MODULES[settings.method], adapter_for(model).text_config.hidden_size
    modules: nn.Module = kind(hidden, width=settings.width, heads=settings.heads)
    if settings.start:
        started = kind.load(settings.start)
        if started.hidden != hidden:
            raise ValueError(f"{settings.start!r} holds modules for another language model: start without it")
        modules = started.train().requires_grad_(True)
    pruner = vlmprune.create_pruner(settings.method, weights=modules)
    optimizer = torch.optim.AdamW(parameter_groups(model, modules, settings), betas=(0.9, 0.98), weight_decay=0.01)
    total = settings.steps * accelerator.num_processes
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * (1 + math.cos(math.pi * step / total)) / 2
    )
    loader, held = loaders(settings, processor)
    condensed, optimizer, decay, loader, held = accelerator.prepare(
        Condensed(model, modules), optimizer, decay, loader, held
    )
    began, batches = time.monotonic(), forever(loader)

    def run(step: int) -> dict[str, Tensor]:
        return condensed(next(batches), replace(pruner, keep=share_of(step, *settings.keep)))

    descend(accelerator, run, modules, optimizer, decay, steps=settings.steps, shown=("loss", "right"))
    minutes = (time.monotonic() - began) / 60
    modules.eval()
    held_out = measure(accelerator, condensed, pruner, held, settings)
    if accelerator.is_main_process:
        made_for = {"model_type": model.config.model_type, "hidden_size": hidden}
        finished: HIComModules | VQAttention = modules  # type: ignore[assignment]
        told = notes(settings, "method")
        finished.save(settings.out, model=made_for, training=told, minutes=round(minutes, 1), held_out=held_out)
        if settings.tune:
            accelerator.unwrap_model(condensed).model.save_pretrained(settings.out / "language-model")
    return modules


@torch.no_grad()
def measure(
    accelerator: Accelerator, condensed: nn.Module, pruner: vlmprune.Pruner, held: DataLoader, settings: Settings
) -> dict[str, dict[str, float]]:
    """By method and share, the share of questions answered right; "all" are all tokens."""
    table: dict[str, dict[str, float]] = {}
    for method in ("all", settings.method, *OTHERS[settings.method]):
        for share in (1.0,) if method == "all" else settings.shares:
            if method in ("all", settings.method):
                asked = replace(pruner, keep=share)
            else:
                asked = vlmprune.create_pruner(method, keep=share)
            (right,) = held_out_means(accelerator, held, functools.partial(condensed, pruner=asked), "right")
            table.setdefault(method, {})[str(share)] = round(right, 4)
        shown = ", ".join(f"{share}: {100 * hit:.1f}" for share, hit in table[method].items())
        accelerator.print(f"{method}: {shown}", flush=True)
    return table


if __name__ == "__main__":
    train(from_arguments(Settings, __doc__))
