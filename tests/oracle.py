"""The slow truth: the unpruned model, in which dropped tokens are masked for every later query.

Shares no code with the runtime. It runs the whole sequence at full length, without a cache, at every step.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def rows_replaced(model: Any, rows: list[tuple[int, int, torch.Tensor]]):
    """Write merged rows ([D] at a sample and column) over the language model's inputs."""

    def write(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        embeds = kwargs["inputs_embeds"].clone()
        for sample, column, row in rows:
            embeds[sample, column] = row
        return args, {**kwargs, "inputs_embeds": embeds}

    inner = model.model if hasattr(model.model, "language_model") else model
    handle = inner.language_model.register_forward_pre_hook(write, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def masks_and_positions(inputs: dict[str, Any], dropped: torch.Tensor, policy: str) -> tuple[torch.Tensor, torch.Tensor]:
    """2-D mask without the dropped columns (bool [B, S]), and position ids [B, S] under a policy."""
    mask = inputs["attention_mask"].bool()
    counted = mask & ~dropped if policy == "compact" else mask
    positions = (counted.long().cumsum(-1) - 1).clamp(min=0)
    return (mask & ~dropped).long(), positions


@torch.no_grad()
def run(
    model: Any,
    inputs: dict[str, Any],
    dropped: torch.Tensor,
    policy: str,
    steps: int,
    forced: torch.Tensor,
    merged: list[tuple[int, int, torch.Tensor]],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Prefill logits [B, S, V], and logits [B, V] of the prefill's last token and of each of `steps` decode steps.

    Step t is fed `forced[:, t]`.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    gone, scores = dropped, []
    prefill = None
    for step in range(steps + 1):
        full = {**inputs, "input_ids": ids, "attention_mask": mask}
        hole, positions = masks_and_positions(full, gone, policy)
        full.update(attention_mask=hole, position_ids=positions, use_cache=False)
        with rows_replaced(model, merged):
            logits = model(**full).logits
        if prefill is None:
            prefill = logits
        # A prompt may end in an image: its answer starts from the last token that is left.
        last = torch.where(hole.bool(), torch.arange(hole.shape[1]), -1).amax(1)
        scores.append(logits[torch.arange(len(logits)), last])
        if step < steps:
            ids = torch.cat([ids, forced[:, step : step + 1]], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            gone = torch.cat([gone, torch.zeros_like(gone[:, :1])], 1)
    return prefill, scores
