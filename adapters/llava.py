"""LLaVA-1.5: a CLIP or SigLIP tower, a two-layer projector, any Llama-shaped language model."""

from __future__ import annotations

import functools
from typing import Any

from vlmprune.adapters.base import Adapter
from vlmprune.adapters.reduction import Reduction
from vlmprune.adapters.tower import Tower
from vlmprune.contract import Geometry, Pruner

TOWERS = ("clip_vision_model", "siglip_vision_model")


class LlavaAdapter(Adapter):
    """One fixed grid of patches an image, in raster order, straight into the sequence."""

    family = "LLaVA-1.5"
    model_types = ("llava",)

    def check(self) -> None:
        tower = self.config.vision_config.model_type
        if tower not in TOWERS:
            raise ValueError(f"{self.family} with a {tower!r} tower is not supported: use {' or '.join(TOWERS)}.")

    def geometries(self, modality: str, call: dict[str, Any]) -> list[Geometry]:
        pixels = call.get("pixel_values")
        if pixels is None:
            return []
        vision = self.config.vision_config
        height, width = pixels.shape[-2:]
        strategy = call.get("vision_feature_select_strategy") or self.config.vision_feature_select_strategy
        # A CLIP tower puts a CLS token first, SigLIP has none; "default" drops the first token, "full" keeps it.
        prefix = int(vision.model_type == "clip_vision_model")
        geometry = Geometry.grid(height // vision.patch_size, width // vision.patch_size, prefix=prefix)
        return [geometry.after(1) if strategy == "default" else geometry] * len(pixels)

    @property
    def signals(self) -> frozenset[str]:
        feature_layer = self.config.vision_feature_layer
        return super().signals | ({"encoder_kept"} if isinstance(feature_layer, int) else frozenset())

    def reduction(self, pruner: Pruner) -> list[Any]:
        layers = pruner.encoder_layers(self.tower.feature_layer + 1)
        if not layers:
            return []
        module: Any = self.core.vision_tower
        feature = self.config.vision_feature_layer
        return Reduction(self.tower, module, feature, layers, pruner.reduce, pruner.proportional).watch()

    @functools.cached_property
    def tower(self) -> Tower:
        return self.tower_in("vision_tower")

    def tower_in(self, name: str) -> Tower:
        """The tower that `core` holds by this name."""
        module: Any = getattr(self.core, name)
        layers = getattr(module, "vision_model", module).encoder.layers
        feature_layer = self.config.vision_feature_layer
        last = feature_layer if isinstance(feature_layer, int) else feature_layer[-1]
        return Tower(
            self.core.multi_modal_projector,  # type: ignore[arg-type]
            layers,
            [layer.self_attn for layer in layers],
            # Hidden state 0 is what enters the first layer.
            last + len(layers) if last < 0 else last - 1,
            prefix=int(self.config.vision_config.model_type == "clip_vision_model"),
        )
