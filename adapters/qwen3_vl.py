"""Qwen3-VL: as Qwen2.5-VL, with time stamps between a video's frames and visual features for the first layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmprune.adapters.qwen2_vl import Qwen2VLAdapter


class Qwen3VLAdapter(Qwen2VLAdapter):
    """A video is one item although text stands between its frames: see `Item.columns`."""

    family = "Qwen3-VL"
    model_types = ("qwen3_vl", "qwen3_vl_moe")
    clocked = False

    @property
    def earliest_stage(self) -> int:
        """Behind the last layer that deepstack features are added to: they are all cut at the boundary."""
        return max(1, len(self.config.vision_config.deepstack_visual_indexes))

    def cut(self, kwargs: dict[str, Any], columns: Tensor | None) -> dict[str, Any]:
        """Deepstack: a layer's features are added to the visual columns, in the order of these over the batch."""
        visual = kwargs.get("visual_pos_masks")
        if visual is None or columns is None:
            return kwargs
        index = columns.clamp(min=0)
        left = visual.gather(1, index) & (columns >= 0)
        number = (visual.flatten().cumsum(0) - 1).view_as(visual).gather(1, index)[left]
        deep = [features[number.to(features.device)] for features in kwargs["deepstack_visual_embeds"]]
        return {**kwargs, "visual_pos_masks": left, "deepstack_visual_embeds": deep}
