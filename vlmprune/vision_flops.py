"""What the vision side of every family costs: one function a tower, one a family, FLOPs in closed form.

A *picture* is what passes the tower by itself, given as its patch grid (rows, columns): an image, a tile, a frame (for
Qwen-VL, `temporal_patch_size` frames together). Attention never leaves a picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Grid = tuple[int, int]
Rows = Sequence[int] | None
"""Rows of a picture in each layer of the tower, where a method merges some between them; None: all in all."""


def linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def attention(batch: int, heads: int, head_dim: int, queries: int, keys: int) -> int:
    """Scores and weighted sum, every query against every key."""
    return 2 * 2 * batch * heads * queries * keys * head_dim


@dataclass(frozen=True)
class Vision:
    """The vision side of one family.

    Attributes:
        cost: (config, patch grid, whether it is a frame of a video, rows in each layer) -> FLOPs of (tower, projector)
            for one picture.
        pictures: (config, visual tokens of one image) -> patch grids of its pictures, as far as the count tells.
        shortens: whether methods can merge patches between the layers of its tower.
    """

    cost: Callable[[Any, Grid, bool, Rows], tuple[int, int]]
    pictures: Callable[[Any, int], list[Grid]]
    shortens: bool = False


def pair(size: int | Sequence[int]) -> Grid:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _encoder(config: Any, tokens: int, rows: Rows) -> int:
    """All layers of a plain vision transformer over one picture.

    The layers behind `vision_feature_layer` run too: the tower returns hidden states, it does not stop early.
    """
    width, heads = config.hidden_size, config.num_attention_heads

    def layer(count: int) -> int:
        mlp = 2 * linear(count, width, config.intermediate_size)
        return 4 * linear(count, width, width) + mlp + attention(1, heads, width // heads, count, count)

    return sum(layer(count) for count in (rows or [tokens] * config.num_hidden_layers))


def _embedding(config: Any, patches: int) -> int:
    patch_rows, patch_cols = pair(config.patch_size)
    return linear(patches, config.num_channels * patch_rows * patch_cols, config.hidden_size)


def _clip_tower(config: Any, grid: Grid, rows: Rows) -> int:
    """With a CLS token; InternVL's tower is built alike."""
    patches = grid[0] * grid[1]
    return _embedding(config, patches) + _encoder(config, patches + 1, rows)


def _siglip_tower(config: Any, grid: Grid, rows: Rows) -> int:
    """The attention-pooling head runs although LLaVA discards its output."""
    patches, head = grid[0] * grid[1], 0
    if getattr(config, "vision_use_head", True):
        width, heads, left = config.hidden_size, config.num_attention_heads, rows[-1] if rows else patches
        head = 2 * linear(left, width, width) + 2 * linear(1, width, width)
        head += attention(1, heads, width // heads, 1, left) + 2 * linear(1, width, config.intermediate_size)
    return _embedding(config, patches) + _encoder(config, patches, rows) + head


def _qwen_tower(config: Any, grid: Grid, rows: Rows) -> int:
    """Qwen2-VL, Qwen2.5-VL (gated MLP, most layers attend in windows) and Qwen3-VL, without mergers."""
    patches = grid[0] * grid[1]
    width = getattr(config, "embed_dim", None) or config.hidden_size
    inner = getattr(config, "intermediate_size", None) or config.mlp_ratio * width
    windows = hasattr(config, "window_size")
    embedding = linear(patches, config.in_channels * config.temporal_patch_size * config.patch_size**2, width)
    mlp = (3 if windows else 2) * linear(patches, width, inner)
    head_dim = width // config.num_heads
    whole = attention(1, config.num_heads, head_dim, patches, patches)
    total = embedding + config.depth * (4 * linear(patches, width, width) + mlp)
    if not windows:
        return total + config.depth * whole
    merge = config.spatial_merge_size
    side = config.window_size // merge // config.patch_size
    parted = attention(1, config.num_heads, head_dim, 1, 1) * merge**4
    for cells in (grid[0] // merge, grid[1] // merge):
        parted *= cells // side * side**2 + (cells % side) ** 2
    full = sum(layer in config.fullatt_block_indexes for layer in range(config.depth))
    return total + full * whole + (config.depth - full) * parted


TOWERS: dict[str, Callable[[Any, Grid, Rows], int]] = {
    "clip_vision_model": _clip_tower,
    "siglip_vision_model": _siglip_tower,
    "internvl_vision": _clip_tower,
    "qwen2_vl_vision": _qwen_tower,
    "qwen2_5_vl_vision": _qwen_tower,
    "qwen3_vl_vision": _qwen_tower,
    "qwen3_vl_moe_vision": _qwen_tower,
}


def _tower(config: Any, grid: Grid, rows: Rows) -> int:
    return TOWERS[config.vision_config.model_type](config.vision_config, grid, rows)


def _llava(config: Any, grid: Grid, video: bool, inside: Rows) -> tuple[int, int]:
    vision, width = config.vision_config, config.text_config.hidden_size
    rows = grid[0] * grid[1]
    if vision.model_type == "clip_vision_model":
        # Video-LLaVA leaves frames their CLS tokens.
        rows += config.vision_feature_select_strategy == "full" or (video and config.model_type == "video_llava")
    else:
        rows -= config.vision_feature_select_strategy == "default"
    if video and hasattr(config, "spatial_pool_stride"):  # LLaVA-NeXT-Video pools before the projector
        rows //= config.spatial_pool_stride**2
    layers = config.vision_feature_layer
    inputs = vision.hidden_size * (1 if isinstance(layers, int) else len(layers))
    return _tower(config, grid, inside), linear(rows, inputs, width) + linear(rows, width, width)


def _internvl(config: Any, grid: Grid, video: bool, inside: Rows) -> tuple[int, int]:
    width, fold = config.text_config.hidden_size, round(1 / config.downsample_ratio)
    rows = grid[0] * grid[1] // fold**2
    projector = linear(rows, config.vision_config.hidden_size * fold**2, width) + linear(rows, width, width)
    return _tower(config, grid, inside), projector


def _qwen(config: Any, grid: Grid, video: bool, inside: Rows) -> tuple[int, int]:
    """The projector: the merger, and Qwen3-VL's mergers for the deepstack layers."""
    vision = config.vision_config
    rows = grid[0] * grid[1] // vision.spatial_merge_size**2
    width = (getattr(vision, "embed_dim", None) or vision.hidden_size) * vision.spatial_merge_size**2
    mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
    return _tower(config, grid, inside), mergers * (
        linear(rows, width, width) + linear(rows, width, config.text_config.hidden_size)
    )


def _tile(config: Any) -> Grid:
    (height, width), (rows, cols) = pair(config.vision_config.image_size), pair(config.vision_config.patch_size)
    return height // rows, width // cols


def _one_tile(config: Any, tokens: int) -> list[Grid]:
    return [_tile(config)]


def _anyres_tiles(config: Any, tokens: int) -> list[Grid]:
    """A thumbnail and no more tiles than fill that many tokens, their line breaks included."""
    rows, cols = _tile(config)
    return [(rows, cols)] * (1 + max(0, math.ceil((tokens - rows * cols) / (rows * (cols + 1)))))


def _internvl_tiles(config: Any, tokens: int) -> list[Grid]:
    rows, cols = _tile(config)
    return [(rows, cols)] * max(1, round(tokens / (rows * cols * config.downsample_ratio**2)))


def _nearly_square(config: Any, tokens: int) -> list[Grid]:
    merge = config.vision_config.spatial_merge_size
    rows = max(rows for rows in range(1, math.isqrt(tokens) + 1) if tokens % rows == 0)
    return [(rows * merge, tokens // rows * merge)]


def tower_rows(
    config: Any, grid: Grid, left: Callable[[int, int, int], int | None], layers: Sequence[int]
) -> list[int]:
    """Rows, CLS included, of a picture in each layer of a tower in which a method merges, as `Rows`.

    Args:
        left: (patches, layer, depth) -> how many are left behind `layer`, of `depth` that make the features.
        layers: behind which it merges.
    """
    count, prefix = grid[0] * grid[1], int(config.vision_config.model_type == "clip_vision_model")
    depth = feature_depth(config)
    rows = [count]
    for layer in range(config.vision_config.num_hidden_layers - 1):
        now = left(count, layer, depth) if layer in layers and layer < depth else rows[-1]
        assert now is not None
        rows.append(min(rows[-1], now))
    return [each + prefix for each in rows]


def feature_depth(config: Any) -> int:
    """Layers of a LLaVA's tower up to the one that makes the features."""
    layers, last = config.vision_config.num_hidden_layers, config.vision_feature_layer
    last = last if isinstance(last, int) else last[-1]
    return last + layers + 1 if last < 0 else last


FAMILIES: dict[str, Vision] = {
    "llava": Vision(_llava, _one_tile, shortens=True),
    "llava_next": Vision(_llava, _anyres_tiles, shortens=True),
    "llava_next_video": Vision(_llava, _anyres_tiles, shortens=True),
    "llava_onevision": Vision(_llava, _anyres_tiles, shortens=True),
    "video_llava": Vision(_llava, _one_tile),
    "internvl": Vision(_internvl, _internvl_tiles),
    "qwen2_vl": Vision(_qwen, _nearly_square),
    "qwen2_5_vl": Vision(_qwen, _nearly_square),
    "qwen3_vl": Vision(_qwen, _nearly_square),
    "qwen3_vl_moe": Vision(_qwen, _nearly_square),
}
