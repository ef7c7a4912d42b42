"""InternVL: square tiles, a block of patches a token (pixel shuffle), several tiles an image in one run."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch

from vlmprune.adapters.base import Adapter, item_at
from vlmprune.adapters.tower import Tower
from vlmprune.contract import Geometry, Item


class InternVLAdapter(Adapter):
    """A plane a tile. How the tiles lie in the picture only the processor knows; the thumbnail, if any, is the last.

    The model does not know which tiles make an image: an item is a run of placeholders (the prompt has `<img>` and
    `</img>` around it). A video comes as a run a frame, and its frames are items of their own.
    """

    family = "InternVL"
    model_types = ("internvl",)

    def geometries(self, modality: str, call: dict[str, Any]) -> list[Geometry]:
        """One geometry a tile."""
        pixels = call.get("pixel_values")
        if pixels is None:
            return []
        patch_rows, patch_cols = self.config.vision_config.patch_size
        patches = pixels.shape[-2] // patch_rows, pixels.shape[-1] // patch_cols
        rows, cols = (int(n * self.config.downsample_ratio) for n in patches)
        place = torch.arange(patches[0] * patches[1]).view(1, *patches, 1)
        sources = self.core.pixel_shuffle(place, scale_factor=self.config.downsample_ratio)  # type: ignore[operator]
        return [Geometry.grid(rows, cols, patches=patches, sources=sources.view(rows * cols, -1))] * len(pixels)

    @property
    def group(self) -> int:  # type: ignore[override]
        return round(self.config.downsample_ratio**-2)

    @property
    def signals(self) -> frozenset[str]:
        # The projector takes blocks of patches: no CLS token passes it.
        return super().signals - {"cls_features"}

    @functools.cached_property
    def tower(self) -> Tower:
        module: Any = self.core.vision_tower
        layers, last = module.encoder.layer, self.config.vision_feature_layer
        return Tower(
            self.core.multi_modal_projector,  # type: ignore[arg-type]
            layers,
            [layer.attention for layer in layers],
            last + len(layers) if last < 0 else last - 1,
            prefix=1,
        )

    def items(self, call: dict[str, Any]) -> list[Item]:
        tiles = self.brought("image", call)
        if not tiles:
            return []
        each, items, used = len(tiles[0][0]), [], 0
        for sample, row in enumerate(self.placeholders(call, self.config.image_token_id)):
            columns = row.nonzero().flatten()
            for run in columns.tensor_split((columns.diff() > 1).nonzero().flatten() + 1):
                count, rest = divmod(len(run), each)
                if rest:
                    raise ValueError(
                        f"row {sample} has a run of {len(run)} visual placeholders, which tiles of {each} do not divide"
                    )
                if count:
                    items.append(item_at(sample, run, join(tiles[0][0], count), tiles[min(used, len(tiles) - 1)][1]))
                    used += count
        if used != len(tiles):
            raise ValueError(f"the prompt has placeholders for {used} tiles and the call brings {len(tiles)}")
        return items


def join(tile: Geometry, count: int) -> Geometry:
    """The geometry of `count` such tiles, one plane each."""
    assert tile.sources is not None
    patches = tile.pictures[0][0] * tile.pictures[0][1]
    return replace(
        tile,
        plane=torch.arange(count).repeat_interleave(len(tile)),
        row=tile.row.repeat(count),
        col=tile.col.repeat(count),
        grids=tile.grids * count,
        pictures=tile.pictures * count,
        sources=torch.cat([tile.sources + number * patches for number in range(count)]),
    )
