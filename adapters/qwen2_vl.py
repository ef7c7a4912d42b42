"""Qwen2-VL and Qwen2.5-VL: images of any size, 2 x 2 patches a token, M-RoPE."""

from __future__ import annotations

from typing import Any

from vlmprune.adapters.base import Adapter
from vlmprune.contract import Geometry


class Qwen2VLAdapter(Adapter):
    """A plane a frame (of `temporal_patch_size` pictures); an image has one.

    Positions have a time, a row and a column: nothing renumbers them.
    """

    family = "Qwen2-VL"
    model_types = ("qwen2_vl", "qwen2_5_vl")
    modalities = ("image", "video")
    positions = frozenset({"original"})

    def geometries(self, modality: str, call: dict[str, Any]) -> list[Geometry]:
        pixels = call.get("pixel_values" if modality == "image" else "pixel_values_videos")
        if pixels is None:
            return []
        merge = self.config.vision_config.spatial_merge_size
        return [
            Geometry.grid(rows // merge, cols // merge, planes=frames, kind=modality, patches=(rows, cols))  # type: ignore[arg-type]
            for frames, rows, cols in call[f"{modality}_grid_thw"].tolist()
        ]
