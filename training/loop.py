"""What the trainers of small modules do alike: loaders, parameters, steps, the held-out questions and the notes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from questions import Questions, collate
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vlmprune.adapters import adapter_for


def loaders(settings: Any, processor: Any) -> tuple[DataLoader, DataLoader]:
    """Shuffled whole batches of the questions to train on, and those that are held out, in order."""
    gather = functools.partial(collate, processor)
    loader = DataLoader(
        Questions(settings.data, "train", settings.scenes[0], settings.seed),
        settings.batch,
        shuffle=True,
        drop_last=True,
        collate_fn=gather,
        generator=torch.Generator().manual_seed(settings.seed),
    )
    held = DataLoader(
        Questions(settings.data, "validation", settings.scenes[1], settings.seed), settings.batch, collate_fn=gather
    )
    return loader, held


def parameter_groups(model: nn.Module, modules: nn.Module, settings: Any) -> list[dict[str, Any]]:
    """For the optimiser: the modules and, with `settings.tune`, the language model; the rest of the model is frozen."""
    model.requires_grad_(False)
    groups = [{"params": list(modules.parameters()), "lr": settings.rate}]
    if settings.tune:
        language = adapter_for(model).language_model.requires_grad_(True)
        groups.append({"params": list(language.parameters()), "lr": settings.language_rate})
    return groups


def forever(loader: DataLoader) -> Iterator[dict[str, Tensor]]:
    while True:
        yield from loader


def descend(
    accelerator: Accelerator,
    run: Callable[[int], dict[str, Tensor]],
    clipped: nn.Module,
    optimizer: Any,
    decay: Any,
    *,
    steps: int,
    shown: Sequence[str],
    every: int = 50,
) -> None:
    """Gradient descent, `steps` steps long.

    Args:
        run: of the number of a step, what came of its batch: "loss", and what is to be shown.
        clipped: what the norm of the gradients is limited for, to 1.
        shown: parts whose means are printed `every` so many steps.
    """
    began = time.monotonic()
    seen: list[dict[str, float]] = []
    for step in range(steps):
        parts = run(step)
        optimizer.zero_grad()
        accelerator.backward(parts["loss"])
        accelerator.clip_grad_norm_(clipped.parameters(), 1.0)
        optimizer.step()
        decay.step()
        seen.append({name: parts[name].float().mean().item() for name in shown})
        if (step + 1) % every == 0:
            means = " ".join(f"{name} {sum(each[name] for each in seen) / len(seen):.3f}" for name in shown)
            pace = (time.monotonic() - began) / (step + 1)
            accelerator.print(f"{step + 1}/{steps}, {pace:.2f} s a step: {means}", flush=True)
            seen.clear()


def held_out_means(
    accelerator: Accelerator, held: DataLoader, run: Callable[[dict[str, Tensor]], dict[str, Tensor]], *names: str
) -> list[float]:
    """Of the parts `names` that `run` makes of a batch, the means over all held-out questions, of all processes."""
    found: list[list[Tensor]] = [[] for _ in names]
    for inputs in held:
        parts = run(inputs)
        for each, name in zip(found, names):
            each.append(accelerator.gather_for_metrics(parts[name].float()))
    return [torch.cat(each).mean().item() for each in found]


def notes(settings: Any, *without: str) -> dict[str, Any]:
    """Settings to write beside the weights: all but where these go, and `without`."""
    return {name: value for name, value in vars(settings).items() if name not in ("out", *without)}
