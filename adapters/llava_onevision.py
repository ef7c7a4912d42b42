"""LLaVA-OneVision: images as in LLaVA-NeXT but at most so many tiles' worth of tokens, videos as pooled frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmprune.adapters.llava_next import LlavaNextAdapter
from vlmprune.contract import Geometry


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """A plane a frame and one line break behind the last; a prompt's images are tiled only where it has just one."""

    family = "LLaVA-OneVision"
    model_types = ("llava_onevision",)
    modalities = ("image", "video")

    def geometries(self, modality: str, call: dict[str, Any]) -> list[Geometry]:
        if modality == "image":
            return super().geometries(modality, call)
        pixels = call.get("pixel_values_videos")
        if pixels is None:
            return []
        side, pooled = self.side, -(-self.side // 2)
        # Pooling interpolates between the two patches next to a token's middle, each way.
        middle = ((torch.arange(pooled, device="cpu") + 0.5) * side / pooled - 0.5).clamp(0, side - 1)
        near = torch.stack([middle.floor(), middle.ceil()], dim=1).long()
        sources = near[:, None, :, None] * side + near[None, :, None, :]
        video = Geometry.grid(
            pooled,
            pooled,
            planes=pixels.shape[1],
            suffix=1,
            kind="video",
            patches=(side, side),
            sources=sources.reshape(pooled * pooled, 4),
        )
        return [video] * len(pixels)

    def tiled(self, call: dict[str, Any], count: int) -> list[bool]:
        per_sample = call.get("batch_num_images")
        if per_sample is None:
            return [True] * count
        return [n == 1 for n in torch.as_tensor(per_sample, device="cpu").tolist() for _ in range(n)]

    def pack(self, features: Tensor, size: tuple[int, int], newline: Tensor, call: dict[str, Any]) -> Tensor:
        # forward() does not hand on its `vision_aspect_ratio`, get_image_features() heeds its own.
        ratio = call.get("vision_aspect_ratio") if "input_ids" not in call else None
        return self.core.pack_image_features(  # type: ignore[operator]
            [features],
            torch.tensor([size], device="cpu"),
            image_newline=newline,
            vision_aspect_ratio=ratio or self.config.vision_aspect_ratio,
        )[0][0]
