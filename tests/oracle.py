"""The slow truth: the unpruned model, in which dropped tokens are masked for every later query.

Shares no code with the runtime. It runs the whole sequence at full length, without a cache, at every step, and gives
every decoder layer a mask and positions of its own.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

Dropped = dict[int, torch.Tensor]
"""Layer -> bool [B, S]: columns that are gone from that layer on (0: from the start)."""
Merged = dict[int, list[tuple[int, int, torch.Tensor]]]
"""Layer -> rows ([D] at a sample and column) that replace what enters it (0: the model's inputs)."""

Evicted = dict[int, torch.Tensor]
"""Layer -> int64 [B, S]: the first column whose query no longer sees this one; past the end for never."""


def everything_visible(inputs: dict[str, Any]) -> Dropped:
    return {0: torch.zeros_like(inputs["input_ids"], dtype=torch.bool)}


def _layer_hook(
    model: Any,
    layer: int,
    inputs: dict[str, Any],
    dropped: Dropped,
    policy: str,
    rows: list[Any],
    until: torch.Tensor | None,
) -> Any:
    real = inputs["attention_mask"].bool()
    gone = dropped[max(stage for stage in dropped if stage <= layer)]
    alive = real & ~gone
    length = real.shape[1]
    steps = torch.arange(length)
    allowed = (steps[None, :] <= steps[:, None])[None] & alive[:, None, :]
    if until is not None:
        late = torch.nn.functional.pad(until, (0, length - until.shape[1]), value=length)
        allowed = allowed & (steps[None, :, None] < late[:, None, :])
    text = model.config.get_text_config()
    size = getattr(text, "sliding_window", None)
    types = getattr(text, "layer_types", None)
    if size and (types is None or types[layer] == "sliding_attention"):
        allowed = allowed & (steps[:, None] - steps[None, :] < size)[None]
    positions = ((alive if policy == "compact" else real).long().cumsum(-1) - 1).clamp(min=0)
    language_model = model.model.language_model

    def write(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = _replaced(args[0], rows)
        mask = torch.zeros(allowed.shape, dtype=hidden.dtype).masked_fill(~allowed, torch.finfo(hidden.dtype).min)
        changed = {"attention_mask": mask[:, None]}
        if policy == "compact":
            changed["position_embeddings"] = language_model.rotary_emb(hidden, positions)
        return (hidden, *args[1:]), {**kwargs, **changed}

    return write


def _replaced(hidden: torch.Tensor, rows: list[tuple[int, int, torch.Tensor]]) -> torch.Tensor:
    hidden = hidden.clone() if rows else hidden
    for sample, column, row in rows:
        hidden[sample, column] = row
    return hidden


def _rows_hook(rows: list[tuple[int, int, torch.Tensor]]) -> Any:
    def write(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "inputs_embeds": _replaced(kwargs["inputs_embeds"], rows)}

    return write


@torch.no_grad()
def run(
    model: Any,
    inputs: dict[str, Any],
    dropped: Dropped,
    policy: str,
    steps: int,
    forced: torch.Tensor,
    merged: Merged,
    evicted: Evicted | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Prefill logits [B, S, V], and logits [B, V] of the prefill's last token and of each of `steps` decode steps.

    Step t is fed `forced[:, t]`.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    gone, scores = dict(dropped), []
    prefill = None
    language_model = model.model.language_model
    for step in range(steps + 1):
        full = {**inputs, "input_ids": ids, "attention_mask": mask, "use_cache": False}
        with ExitStack() as hooks:
            hook = language_model.register_forward_pre_hook(_rows_hook(merged.get(0, [])), with_kwargs=True)
            hooks.callback(hook.remove)
            for number, layer in enumerate(language_model.layers):
                rows = merged.get(number, []) if number else []
                write = _layer_hook(model, number, full, gone, policy, rows, (evicted or {}).get(number))
                hook = layer.register_forward_pre_hook(write, with_kwargs=True)
                hooks.callback(hook.remove)
            if policy == "original" and "mm_token_type_ids" not in full:  # M-RoPE: the model's own
                full["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = model(**full).logits
        if prefill is None:
            prefill = logits
        # A prompt may end in an image: its answer starts from the last token that is left.
        alive = mask.bool() & ~gone[max(gone)]
        last = torch.where(alive, torch.arange(alive.shape[1]), -1).amax(1)
        scores.append(logits[torch.arange(len(logits)), last])
        if step < steps:
            ids = torch.cat([ids, forced[:, step : step + 1]], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            if (types := inputs.get("mm_token_type_ids")) is not None:
                inputs = {**inputs, "mm_token_type_ids": torch.cat([types, torch.zeros_like(types[:, :1])], 1)}
            gone = {stage: torch.cat([g, torch.zeros_like(g[:, :1])], 1) for stage, g in gone.items()}
    return prefill, scores


@torch.no_grad()
def generate(model: Any, inputs: dict[str, Any], dropped: Dropped, policy: str, **options: Any) -> Any:
    """The same call of generate(), every token of it by the oracle: the whole sequence again at every step.

    `dropped` has a row for each row that generate() makes of the prompts (num_beams, num_return_sequences).
    """
    rows, length = dropped[0].shape
    prompts = inputs["attention_mask"].repeat_interleave(rows // len(inputs["attention_mask"]), 0)

    def layer_hook(layer: int) -> Any:
        def write(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            further = (0, args[0].shape[1] - length)
            full = {"attention_mask": torch.nn.functional.pad(prompts, further, value=1)}
            gone = {stage: torch.nn.functional.pad(columns, further) for stage, columns in dropped.items()}
            return _layer_hook(model, layer, full, gone, policy, [], None)(module, args, kwargs)

        return write

    with ExitStack() as hooks:
        for number, layer in enumerate(model.model.language_model.layers):
            hooks.callback(layer.register_forward_pre_hook(layer_hook(number), with_kwargs=True).remove)
        return model.generate(**inputs, **options, use_cache=False)
