"""Model families: one adapter a file, found by the model's `config.model_type`."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from vlmprune.adapters.base import Adapter
from vlmprune.adapters.internvl import InternVLAdapter
from vlmprune.adapters.llava import LlavaAdapter
from vlmprune.adapters.llava_next import LlavaNextAdapter
from vlmprune.adapters.llava_next_video import LlavaNextVideoAdapter
from vlmprune.adapters.llava_onevision import LlavaOnevisionAdapter
from vlmprune.adapters.qwen2_vl import Qwen2VLAdapter
from vlmprune.adapters.qwen3_vl import Qwen3VLAdapter
from vlmprune.adapters.video_llava import VideoLlavaAdapter

FAMILIES: tuple[type[Adapter], ...] = (
    LlavaAdapter,
    LlavaNextAdapter,
    LlavaNextVideoAdapter,
    LlavaOnevisionAdapter,
    VideoLlavaAdapter,
    Qwen2VLAdapter,
    Qwen3VLAdapter,
    InternVLAdapter,
)


_processors: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def introduce(model: Any, processor: Any) -> None:
    """Tell which processor writes a model's prompts: what is a video, InternVL's prompts say in words alone."""
    if isinstance(model := unwrap(model), nn.Module):
        _processors[model] = processor


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
            return family(model, _processors.get(model))
    known = ", ".join(f"{family.family} ({', '.join(family.model_types)})" for family in FAMILIES)
    raise ValueError(f"{type(model).__name__} is not a supported vision-language model; supported families: {known}.")


__all__ = ["FAMILIES", "Adapter", "adapter_for", "introduce", "unwrap"]
