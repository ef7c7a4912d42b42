"""LLaVA-NeXT: a thumbnail and a grid of tiles without its padding, with a line break behind every row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, image_size_to_num_patches

from vlmprune.adapters.llava import LlavaAdapter
from vlmprune.contract import Geometry


class LlavaNextAdapter(LlavaAdapter):
    """Plane 0 is the thumbnail, plane 1 the picture put together from all tiles; `tile` tells tile from tile.

    Line breaks (`image_newline`) belong to the plane they break and show no place.
    """

    family = "LLaVA-NeXT"
    model_types = ("llava_next",)

    @property
    def side(self) -> int:
        """Patches along one side of a tile."""
        vision = self.config.vision_config
        return vision.image_size // vision.patch_size

    def geometries(self, modality: str, call: dict[str, Any]) -> list[Geometry]:
        if call.get("pixel_values") is None:
            return []
        sizes = [(int(height), int(width)) for height, width in call["image_sizes"]]
        return [self.packed(size, tiled, call) for size, tiled in zip(sizes, self.tiled(call, len(sizes)))]

    def takes_tokens(self, geometry: Geometry) -> bool:
        return False

    def tiled(self, call: dict[str, Any], count: int) -> list[bool]:
        """Of each image, whether tiles follow its thumbnail."""
        return [True] * count

    def pack(self, features: Tensor, size: tuple[int, int], newline: Tensor, call: dict[str, Any]) -> Tensor:
        """Rows of one image [N, C], from those of its pictures [pictures, side * side, C], as the model packs them."""
        strategy = call.get("vision_feature_select_strategy") or self.config.vision_feature_select_strategy
        sizes = torch.tensor([size], device="cpu")
        return self.core.pack_image_features([features], sizes, strategy, image_newline=newline)[0][0]  # type: ignore

    def packed(self, size: tuple[int, int], tiled: bool, call: dict[str, Any]) -> Geometry:
        """Geometry of an image of `size` (height, width): coordinates go the way that the features go."""
        side, config = self.side, self.config
        if not tiled:
            return Geometry.grid(side, side, suffix=1)
        # (height, width) in patches, whatever the function's own documentation says.
        _, across = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
        pictures = image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        place = torch.cartesian_prod(torch.arange(side, device="cpu"), torch.arange(side, device="cpu"))
        corner = torch.arange(pictures - 1, device="cpu")
        corner = side * torch.stack([corner // across, corner % across], dim=1)
        places = torch.cat([place[None], place + corner[:, None]]).float()
        rows = self.pack(places, size, torch.full((2,), -1.0, device="cpu"), call)[side * side :]
        breaks = rows[:, 0] < 0
        width = int(breaks.nonzero()[0])
        height = int(breaks.sum())
        cell = torch.arange(len(rows), device="cpu")
        thumbnail = Geometry.grid(side, side)
        # Where tokens are interpolated between tiles, each belongs to the patch its middle lies in.
        y, x = (rows + 0.5).long().unbind(1)
        tile = 1 + y // side * across + x // side
        patch = tile * side * side + y % side * side + x % side
        assert thumbnail.sources is not None
        return Geometry(
            plane=torch.cat([thumbnail.plane, torch.ones_like(cell)]),
            row=torch.cat([thumbnail.row, cell.div(width + 1, rounding_mode="floor").masked_fill(breaks, -1)]),
            col=torch.cat([thumbnail.col, (cell % (width + 1)).masked_fill(breaks, -1)]),
            grids=((side, side), (height, width)),
            pictures=((side, side),) * pictures,
            tile=torch.cat([thumbnail.plane, tile.masked_fill(breaks, -1)]),
            sources=torch.cat([thumbnail.sources, patch.masked_fill(breaks, -1)[:, None]]),
        )
