"""InternVL: square tiles, a block of patches a token (pixel shuffle), several tiles an image in one run."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from vlmprune.adapters.base import Adapter, item_at
from vlmprune.adapters.tower import Tower
from vlmprune.contract import Geometry, Item

FRAME = re.compile(r"Frame(\d+): ?(?:<[^<>]*>)?\s*$")
FRAME_WORDS = 32  # more tokens than these words ever take


class InternVLAdapter(Adapter):
    """A plane a tile. How the tiles lie in the picture only the processor knows; the thumbnail, if any, is the last.

    The model does not know which tiles make an image: an item is a run of placeholders (the prompt has `<img>` and
    `</img>` around it). A video comes as a run of one tile a frame, each behind the words "Frame1: " and so on: with
    the processor at hand to read them, all its frames are one item; without, each is an item of its own.
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
        place = torch.arange(patches[0] * patches[1], device="cpu").view(1, *patches, 1)
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
        tile, items, used = tiles[0][0], [], 0
        for sample, row in enumerate(self.placeholders(call, self.config.image_token_id)):
            columns = row.nonzero().flatten()
            runs = [run for run in columns.tensor_split((columns.diff() > 1).nonzero().flatten() + 1) if len(run)]
            for run in runs:
                if len(run) % len(tile):
                    raise ValueError(
                        f"row {sample} has a run of {len(run)} visual placeholders, which tiles of {len(tile)} do not "
                        "divide"
                    )
            ids = call.get("input_ids")
            for kind, together in self._pictures(runs, len(tile), None if ids is None else ids[sample]):
                run = torch.cat(together)
                count = len(run) // len(tile)
                items.append(item_at(sample, run, join(tile, count, kind), tiles[min(used, len(tiles) - 1)][1]))
                used += count
        if used != len(tiles):
            raise ValueError(f"the prompt has placeholders for {used} tiles and the call brings {len(tiles)}")
        return items

    def _pictures(
        self, runs: list[Tensor], each: int, ids: Tensor | None
    ) -> Iterator[tuple[Literal["image", "video"], list[Tensor]]]:
        """What is one item of a row's runs: an image, or all frames of a video.

        Args:
            ids: int64 [S], the row; None where embeddings came in their place.
        """
        numbers = [0] * len(runs) if ids is None or self.processor is None else self._frames(runs, each, ids.cpu())
        video: list[Tensor] = []
        for run, number in zip(runs, numbers):
            if video and number != len(video) + 1:
                yield "video", video
                video = []
            if number == len(video) + 1:
                video = [*video, run]
            else:
                yield "image", [run]
        if video:
            yield "video", video

    def _frames(self, runs: list[Tensor], each: int, ids: Tensor) -> list[int]:
        """Of each run, which frame of a video it is by the words before it; 0 for an image."""
        tokenizer, numbers, behind = self.processor.tokenizer, [], 0
        for run in runs:
            before = ids[max(behind, int(run[0]) - FRAME_WORDS) : run[0]]
            found = FRAME.search(tokenizer.decode(before)) if len(run) == each else None
            numbers.append(int(found[1]) if found else 0)
            behind = int(run[-1]) + 1
        return numbers


def join(tile: Geometry, count: int, kind: Literal["image", "video"]) -> Geometry:
    """The geometry of `count` such tiles or frames, one plane each."""
    assert tile.sources is not None
    patches = tile.pictures[0][0] * tile.pictures[0][1]
    return replace(
        tile,
        kind=kind,
        plane=torch.arange(count, device="cpu").repeat_interleave(len(tile)),
        row=tile.row.repeat(count),
        col=tile.col.repeat(count),
        grids=tile.grids * count,
        pictures=tile.pictures * count,
        sources=torch.cat([tile.sources + number * patches for number in range(count)]),
    )
