"""LLaVA-NeXT-Video: images as in LLaVA-NeXT, videos as pooled frames one after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
        side, stride = self.side, self.config.spatial_pool_stride
        pooled = side // stride
        video = Geometry.grid(
            pooled,
            pooled,
            planes=pixels.shape[1],
            kind="video",
            patches=(side, side),
            sources=blocks(pooled, pooled, stride, side),
        )
        return [video] * len(pixels)

    def takes_tokens(self, geometry: Geometry) -> bool:
        return geometry.kind == "video"


def blocks(rows: int, cols: int, size: int, width: int) -> Tensor:
    """int64 [rows * cols, size * size]: patches, of a picture `width` patches wide, of each block of size x size."""
    corner = torch.arange(rows, device="cpu")[:, None] * size * width + torch.arange(cols, device="cpu") * size
    inside = torch.arange(size, device="cpu")[:, None] * width + torch.arange(size, device="cpu")
    return corner.flatten()[:, None] + inside.flatten()
