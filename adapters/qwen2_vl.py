"""Qwen2-VL and Qwen2.5-VL: images of any size, 2 x 2 patches a token, M-RoPE."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from vlmprune.adapters.base import Adapter
from vlmprune.adapters.tower import PackedTower, Tower
from vlmprune.contract import Geometry


class Qwen2VLAdapter(Adapter):
    """A plane a frame (of `temporal_patch_size` pictures); an image has one.

    Positions have a time, a row and a column: nothing renumbers them.
    """

    family = "Qwen2-VL"
    model_types = ("qwen2_vl", "qwen2_5_vl")
    modalities = ("image", "video")
    positions = frozenset({"original"})
    clocked = True

    def geometries(self, modality: str, call: dict[str, Any]) -> list[Geometry]:
        pixels = call.get("pixel_values" if modality == "image" else "pixel_values_videos")
        if pixels is None:
            return []
        merge = self.config.vision_config.spatial_merge_size
        return [
            Geometry.grid(
                rows // merge,
                cols // merge,
                planes=frames,
                kind=modality,  # type: ignore[arg-type]
                patches=(rows, cols),
                # The tower takes patches block by block.
                sources=torch.arange(rows * cols, device="cpu").view(-1, self.group),
            )
            for frames, rows, cols in call[f"{modality}_grid_thw"].tolist()
        ]

    @property
    def group(self) -> int:  # type: ignore[override]
        return self.config.vision_config.spatial_merge_size**2

    @functools.cached_property
    def tower(self) -> Tower:
        visual: Any = self.core.visual
        return PackedTower(visual, [block.attn for block in visual.blocks], visual.spatial_merge_size)

    def project(self, rows: Tensor) -> Tensor:
        patches = rows.reshape(-1, rows.shape[-1] // self.group)
        return self.tower.projector(patches).view(*rows.shape[:-1], -1)

    def stream_positions(self, call: dict[str, Any]) -> Tensor:
        ids = call["input_ids"].cpu()
        ids = torch.cat([ids, torch.zeros_like(ids[:, :1])], dim=1)
        kinds = torch.zeros_like(ids, dtype=torch.int32)
        for number, modality in enumerate(self.modalities, 1):
            kinds[:, :-1] += number * (ids[:, :-1] == getattr(self.config, f"{modality}_token_id"))
        grids = {name: call[name].cpu() for name in ("image_grid_thw", "video_grid_thw") if name in call}
        positions, _ = self.core.get_rope_index(ids, mm_token_type_ids=kinds, **grids)  # type: ignore[operator]
        return positions[:, 0]

    def stream_rate(self) -> float | None:
        return getattr(self.config.vision_config, "tokens_per_second", None)
