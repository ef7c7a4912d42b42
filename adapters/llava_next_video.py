"""LLaVA-NeXT-Video: images as in LLaVA-NeXT, videos as pooled frames one after the other."""

from __future__ import annotations

from typing import Any

from vlmprune.adapters.llava_next import LlavaNextAdapter
from vlmprune.contract import Geometry


class LlavaNextVideoAdapter(LlavaNextAdapter):
    """A plane a frame, its patches pooled by `spatial_pool_stride`."""

    family = "LLaVA-NeXT-Video"
    model_types = ("llava_next_video",)
    modalities = ("image", "video")

    def geometries(self, modality: str, call: dict[str, Any]) -> list[Geometry]:
        if modality == "image":
            return super().geometries(modality, call)
        pixels = call.get("pixel_values_videos")
        if pixels is None:
            return []
        side, pooled = self.side, self.side // self.config.spatial_pool_stride
        video = Geometry.grid(pooled, pooled, planes=pixels.shape[1], kind="video", patches=(side, side))
        return [video] * len(pixels)
