"""LLaVA-1.5: a CLIP or SigLIP tower, a two-layer projector, any Llama-shaped language model."""

from __future__ import annotations

from typing import Any

from vlmprune.adapters.base import Adapter, split_items

from vlmprune.contract import Geometry, Item


class LlavaAdapter(Adapter):
    """One fixed grid of patches an image, in raster order, straight into the sequence."""

    family = "LLaVA-1.5"
    model_types = ("llava",)
    towers = ("clip_vision_model", "siglip_vision_model")

    def check(self) -> None:
        tower = self.config.vision_config.model_type
        if tower not in self.towers:
            raise ValueError(f"LLaVA with a {tower!r} tower is not supported: use one with {' or '.join(self.towers)}.")

    def items(self, call: dict[str, Any]) -> list[Item]:
        pixels, counts = call.get("pixel_values"), self.image_counts(call)
        if pixels is None and counts is None:
            return []
        vision = self.config.vision_config
        height, width = (vision.image_size, vision.image_size) if pixels is None else pixels.shape[-2:]
        rows, cols = height // vision.patch_size, width // vision.patch_size
        strategy = call.get("vision_feature_select_strategy") or self.config.vision_feature_select_strategy
        # A CLIP tower puts a CLS token first, SigLIP has none; "default" drops the first token, "full" keeps it.
        geometry = Geometry.grid(rows, cols, prefix=int(vision.model_type == "clip_vision_model"))
        if strategy == "default":
            geometry = geometry.after(1)
        if pixels is not None:
            counts = [len(geometry)] * len(pixels)
        assert counts is not None
        return split_items(self.placeholders(call, self.config.image_token_id), counts, [geometry] * len(counts))
