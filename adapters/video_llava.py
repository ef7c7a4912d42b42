"""Video-LLaVA: images as in LLaVA-1.5; a video's frames pass a tower of their own, and keep their CLS tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch.utils.hooks import RemovableHandle

from vlmprune.adapters.llava import LlavaAdapter
from vlmprune.adapters.tower import FROM_PROJECTOR, Tower
from vlmprune.contract import Geometry


class VideoLlavaAdapter(LlavaAdapter):
    """A plane a frame, a CLS token in front of each; the frames of all videos are encoded in one tensor."""

    family = "Video-LLaVA"
    model_types = ("video_llava",)
    modalities = ("image", "video")

    def geometries(self, modality: str, call: dict[str, Any]) -> list[Geometry]:
        if modality == "image":
            # The name up to transformers 5.22.
            pixels = call.get("pixel_values", call.get("pixel_values_images"))
            return super().geometries(modality, {**call, "pixel_values": pixels})
        pixels = call.get("pixel_values_videos")
        if pixels is None:
            return []
        patch = self.config.vision_config.patch_size
        rows, cols = pixels.shape[-2] // patch, pixels.shape[-1] // patch
        return [Geometry.grid(rows, cols, planes=pixels.shape[1], prefix=1, kind="video")] * len(pixels)

    def brought(self, modality: str, call: dict[str, Any]) -> list[tuple[Geometry, int]]:
        found = super().brought(modality, call)
        if modality == "image" or not found or (call.get("mm_encoder_outputs") or {}).get("video") is None:
            return found
        # Encoded beforehand they are rows of frames, not of videos.
        frames = len(found[0][0].grids)
        return [(geometry, number // frames) for geometry, number in found[::frames]]

    @property
    def signals(self) -> frozenset[str]:
        return super().signals - {"encoder_kept"}

    @functools.cached_property
    def tower(self) -> Tower:
        return Towers({"image": self.tower_in("image_tower"), "video": self.tower_in("video_tower")})


class Towers(Tower):
    """Towers of the same make, one for each modality, before one projector."""

    def __init__(self, towers: dict[str, Tower]) -> None:
        self.towers = towers
        first = towers["image"]
        super().__init__(first.projector, first.layers, first.attentions, first.feature_layer, first.prefix)

    def watch(self, signals: Iterable[str]) -> list[RemovableHandle]:
        wanted = frozenset(signals)
        handles = super().watch(wanted)
        self._turn_to("video")
        return [*handles, *super().watch(wanted - FROM_PROJECTOR)]

    def read(self, modality: str, signal: str) -> Any:
        self._turn_to(modality)
        return super().read(modality, signal)

    def _turn_to(self, modality: str) -> None:
        self.layers, self.attentions = self.towers[modality].layers, self.towers[modality].attentions
