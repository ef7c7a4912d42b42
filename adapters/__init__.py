"""Model families: one adapter a file, found by the model's `config.model_type`."""

from __future__ import annotations

from typing import Any

from torch import nn
from vlmprune.adapters.base import Adapter
from vlmprune.adapters.llava import LlavaAdapter

FAMILIES: tuple[type[Adapter], ...] = (LlavaAdapter,)


def unwrap(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def adapter_for(model: Any) -> Adapter:
    """The adapter of a loaded model.

    Raises:
        ValueError: no adapter serves this class; the message lists the supported families.
    """
    model = unwrap(model)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    for family in FAMILIES:
        parts = hasattr(model, "language_model") or hasattr(getattr(model, "model", None), "language_model")
        if isinstance(model, nn.Module) and kind in family.model_types and parts:
            return family(model)
    known = ", ".join(f"{family.family} ({', '.join(family.model_types)})" for family in FAMILIES)
    raise ValueError(f"{type(model).__name__} is not a supported vision-language model; supported families: {known}.")


__all__ = ["FAMILIES", "Adapter", "adapter_for", "unwrap"]
