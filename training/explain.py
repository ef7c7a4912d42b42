"""Train the mapper of `vlmprune.Explain` for a model: `python training/explain.py --out FOLDER`.

Labels are the relevance of every visual token for the right answer (arXiv 2506.01097): answers are replayed with eager
attention, the log-probability of each answer token is differentiated with respect to all attention maps, and
`relevance_row` gathers them. Only questions that the model answers are used. The mapper then learns, from the first
layer's attention alone, to say what the labels say.

Without `--model` and `--data` it works on the bundled model and scenes, minutes on one CPU core; for others see
`training/atp.py`. Memory grows with layers x heads x length^2 of one batch.
"""

from __future__ import annotations

import functools
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from loop import notes
from questions import Questions, collate, from_arguments, load
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, TensorDataset

from vlmprune.adapters import adapter_for
from vlmprune.pruners.explain import CHANNELS, Mapper, divergence, labels, relevance_row


@dataclass
class Settings:
    """What a run can change; `scenes` are for training and for measuring, `label_batch` is of questions replayed."""

    out: Path = Path("out/explain")
    model: str | None = None
    data: str | None = None
    scenes: tuple[int, int] = (500, 64)
    label_batch: int = 24
    epochs: int = 60
    batch: int = 128
    rate: float = 1e-3
    channels: tuple[int, ...] = CHANNELS
    seed: int = 3


class Maps:
    """Keeps every decoder layer's attention map [B, H, S, S] of the last call, inside the graph."""

    def __init__(self, model: nn.Module) -> None:
        self.maps: list[Tensor] = []
        layers = adapter_for(model).decoder_layers
        self.handles = [layer.self_attn.register_forward_hook(self._keep) for layer in layers]

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        if output[1] is None:
            raise ValueError("attention maps are needed: load the model with attn_implementation='eager'")
        self.maps.append(output[1])

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def relevance(model: nn.Module, maps: Maps, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Relevance of every column [B, S], the first layer's mean attention from the text behind the image [B, S], and
    which samples the model answers in full."""
    adapter = adapter_for(model)
    call = {name: value for name, value in inputs.items() if name != "labels"}
    items = adapter.items(adapter.bind((), call))
    maps.maps.clear()
    logits = model(**call, use_cache=False).logits[:, :-1].float()
    target = inputs["labels"][:, 1:]
    asked = target != -100
    right = ((logits.argmax(-1) == target) | ~asked).all(1)
    log = logits.log_softmax(-1).gather(2, target.clamp(min=0)[..., None])[..., 0]
    first = int(asked.any(0).nonzero()[0])
    total = torch.zeros(target.shape[0], inputs["labels"].shape[1], device=log.device)
    for column in range(first, target.shape[1]):
        there = asked[:, column]
        gradients = torch.autograd.grad(log[there, column].sum(), maps.maps, retain_graph=True)
        row = torch.full((len(there),), column, device=log.device)
        found = relevance_row([each.detach() for each in maps.maps], gradients, row)
        total += found * there[:, None]
    text = (inputs["labels"] == -100) & inputs["attention_mask"].bool()
    for item in items:
        text[item.sample, : item.stop] = False
    rows = text[..., None].float()
    seen = (maps.maps[0].detach().float().mean(1) * rows).sum(1) / rows.sum(1).clamp(min=1)
    return total / asked.sum(1, keepdim=True), seen, right


def examples(model: nn.Module, loader: DataLoader) -> TensorDataset:
    """First-layer attention, label and validity, [M, N] each, of all items of the questions that the model answers."""
    adapter, maps = adapter_for(model), Maps(model)
    inputs_, labels_ = [], []
    for inputs in loader:
        found, seen, right = relevance(model, maps, inputs)
        for item in adapter.items(adapter.bind((), {k: v for k, v in inputs.items() if k != "labels"})):
            if right[item.sample]:
                inputs_.append(seen[item.sample, item.where].cpu())
                labels_.append(found[item.sample, item.where].cpu())
    maps.remove()
    maps.maps.clear()
    if not inputs_:
        raise ValueError("the model answers none of these questions: there is nothing to explain")
    valid = pad_sequence([torch.ones(len(each), dtype=torch.bool) for each in inputs_], batch_first=True)
    table = pad_sequence(labels_, batch_first=True)
    return TensorDataset(pad_sequence(inputs_, batch_first=True), labels(table, valid), valid)


def fingerprint(model: nn.Module) -> str:
    """Of the first layer's query and key weights, on which the mapper's input depends."""
    attention: Any = adapter_for(model).decoder_layers[0].self_attn
    digest = hashlib.sha256()
    for weight in (attention.q_proj.weight, attention.k_proj.weight):
        digest.update(weight.detach().cpu().to(torch.float16).numpy().tobytes())
    return digest.hexdigest()[:16]


def train(settings: Settings) -> Mapper:
    """Label, train, measure and save; returns the mapper."""
    accelerator = Accelerator()
    set_seed(settings.seed)
    model, processor = load(settings.model, settings.data)
    model.to(accelerator.device)
    gather = functools.partial(collate, processor)
    began = time.monotonic()
    tables = []
    for split, scenes in zip(("train", "validation"), settings.scenes):
        loader = DataLoader(
            Questions(settings.data, split, scenes, settings.seed), settings.label_batch, collate_fn=gather
        )
        tables.append(examples(model, accelerator.prepare(loader)))
        accelerator.print(
            f"{split}: {len(tables[-1])} labels, {(time.monotonic() - began) / 60:.1f} minutes", flush=True
        )
    mapper = Mapper(settings.channels)
    optimizer = torch.optim.Adam(mapper.parameters(), settings.rate)
    generator = torch.Generator().manual_seed(settings.seed)
    loader = DataLoader(tables[0], settings.batch, shuffle=True, generator=generator)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    mapper, optimizer, loader = accelerator.prepare(mapper, optimizer, loader)
    for epoch in range(settings.epochs):
        for attention, label, valid in loader:
            loss = divergence(label, mapper(attention, valid), valid)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        decay.step()
        if (epoch + 1) % 10 == 0 or epoch + 1 == settings.epochs:
            with torch.no_grad():
                attention, label, valid = (each.to(accelerator.device) for each in tables[1].tensors)
                held = divergence(label, mapper(attention, valid), valid).item()
                plain = divergence(label, attention.clamp(min=1e-9).log(), valid).item()
            accelerator.print(
                f"epoch {epoch + 1}: loss {loss.item():.3f}, held out {held:.3f} (attention itself {plain:.3f}), "
                f"{(time.monotonic() - began) / 60:.1f} minutes",
                flush=True,
            )
    mapper = accelerator.unwrap_model(mapper)
    if accelerator.is_main_process:
        made_for = {
            "model_type": model.config.model_type,
            "first_layer": fingerprint(model),
            "chat_template": hashlib.sha256((processor.chat_template or "").encode()).hexdigest()[:16],
        }
        held_out = {"divergence": round(held, 4), "of_attention_itself": round(plain, 4)}
        mapper.save(settings.out, model=made_for, training=notes(settings), held_out=held_out)
    return mapper


if __name__ == "__main__":
    train(from_arguments(Settings, __doc__))
