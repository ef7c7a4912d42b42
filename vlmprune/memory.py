"""What a model holds in memory: its weights, and its KV cache while it prefills and decodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.contract import Pruner
from vlmprune.flops import estimate_flops, format_bytes, resolve_config


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes held with all visual tokens (`*_full`) and with those a pruner keeps (`*_pruned`).

    Attributes:
        weights: parameters by module: vision tower, projector, language model (embeddings included), head.
        prefill_full, prefill_pruned: KV cache at the end of the prefill.
        decode_full, decode_pruned: KV cache after the last of the new tokens.

    Activations are not estimated: they depend on kernels and allocator. `vlmprune bench e2e` measures the peak.
    """

    weights: dict[str, int]
    prefill_full: int
    prefill_pruned: int
    decode_full: int
    decode_pruned: int

    @property
    def full(self) -> int:
        """Weights and KV cache at the end of decoding, unpruned."""
        return sum(self.weights.values()) + self.decode_full

    @property
    def pruned(self) -> int:
        """The same, pruned."""
        return sum(self.weights.values()) + self.decode_pruned

    def __str__(self) -> str:
        return (
            f"weights {format_bytes(sum(self.weights.values()))}, KV cache {format_bytes(self.prefill_full)} -> "
            f"{format_bytes(self.prefill_pruned)} after the prefill, {format_bytes(self.decode_full)} -> "
            f"{format_bytes(self.decode_pruned)} at the end"
        )


def estimate_memory(
    model_or_config: Any,
    *,
    text_tokens: int,
    visual_tokens: int | Sequence[int],
    pruner: Pruner | str | None = None,
    batch: int = 1,
    new_tokens: int = 1,
    element_bytes: int | None = None,
) -> MemoryEstimate:
    """Estimate what a run over `batch` prompts holds; arguments and errors are those of `estimate_flops`."""
    estimate = estimate_flops(
        model_or_config,
        text_tokens=text_tokens,
        visual_tokens=visual_tokens,
        pruner=pruner,
        batch=batch,
        new_tokens=new_tokens,
        element_bytes=element_bytes,
    )
    return MemoryEstimate(
        weights=weight_bytes(model_or_config),
        prefill_full=estimate.kv_bytes_full,
        prefill_pruned=estimate.kv_bytes_pruned,
        decode_full=estimate.kv_bytes_end_full,
        decode_pruned=estimate.kv_bytes_end_pruned,
    )


def weight_bytes(model_or_config: Any) -> dict[str, int]:
    """Bytes of the parameters by module; shared ones count once, quantised ones as packed.

    A model's own are counted; of a config (or the path of one) those of the model it describes, in its `dtype`
    (float32 if unset), which is laid out on the meta device: nothing is allocated.

    Raises:
        ValueError: an unsupported model, or a path without a config.
    """
    config = resolve_config(model_or_config)
    model = model_or_config if isinstance(model_or_config, nn.Module) else _meta_model(config)
    sizes = {"vision_tower": 0, "projector": 0, "language_model": 0, "lm_head": 0}
    for name, parameter in model.named_parameters():
        sizes[_module_of(name)] += _held(parameter)
    return sizes


def _meta_model(config: Any) -> nn.Module:
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, dtype=config.dtype or torch.float32)


def _module_of(name: str) -> str:
    parts = name.split(".")
    if any("projector" in part or part.startswith(("merger", "deepstack_merger")) for part in parts):
        return "projector"
    if {"vision_tower", "visual", "image_tower", "video_tower"} & set(parts):
        return "vision_tower"
    return "lm_head" if "lm_head" in parts else "language_model"


def _held(tensor: Tensor) -> int:
    """Bytes of a tensor, of the plain ones inside it where it is a packed subclass."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return tensor.numel() * tensor.element_size()
    names, _ = flatten()
    return sum(_held(getattr(tensor, name)) for name in names)
