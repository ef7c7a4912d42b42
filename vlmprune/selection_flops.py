"""What choosing costs in closed form: the signals that a pruner reads, and what it says of its own products.

A signal costs what computing it on purpose takes: queries and keys of a layer, projected once more, and the attention
of the rows that are needed. What the model computes anyway (features, hidden states, keys in the cache) costs nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from vlmprune.adapters.tower import NEEDS_CLS
from vlmprune.adapters.tower import SIGNALS as OF_TOWER
from vlmprune.contract import SIGNALS, Pruner, Sizes
from vlmprune.signals import resolve
from vlmprune.vision_flops import FAMILIES, Grid, Rows, feature_depth


def selection_flops(
    config: Any,
    pruner: Pruner,
    stage: int,
    items: Sequence[tuple[int, int, int]],
    *,
    heads: tuple[int, int, int],
    text: int,
    grids: Sequence[Grid],
    video: bool = False,
    rows: Rows = None,
    encoded: bool = False,
) -> int | None:
    """FLOPs of choosing at one stage of one prompt, None where the pruner does not declare them.

    Args:
        items: tokens of each item that were there at first, that come to the stage, and that stay behind it.
        heads: query heads and key heads of the decoder, and their size.
        text: tokens of the prompt that are not visual.
        grids: patch grids of its pictures, shared evenly among the items.
        video: whether they are frames.
        rows: of a picture in each layer of the vision tower, as in `prefill_flops`.
        encoded: whether an earlier stage has read the tower's signals, which are computed once.
    """
    depth = config.text_config.num_hidden_layers
    budgets = pruner.budget([before for before, _, _ in items], stage, depth)
    live = [item for item, fixed in zip(items, budgets) if fixed is None or 0 < item[2] < item[1]]
    if not live:
        return 0
    tower = _Tower(config, rows)
    answers, missing = resolve(pruner.reads(stage, depth), tower.given)
    if missing:
        return None
    names = frozenset(name for name in answers.values() if name)
    each = max(1, len(grids) // len(items))
    total = 0
    for before, tokens, keep in live:
        declared = pruner.selection_flops(
            Sizes(
                tokens=tokens,
                originally=before,
                keep=keep,
                layer=stage,
                depth=depth,
                width=config.text_config.hidden_size,
                encoder_width=tower.width,
                encoder_key=tower.width // tower.heads,
                decoder_key=heads[2],
                decoder_heads=heads[0],
                words=text,
                grids=tuple(grids[:each]),
                frames=each if video else 1,
                prefix=tower.prefix,
                encoder_depth=tower.depth,
                projection=tower.projection,
                signals=names,
            )
        )
        if declared is None:
            return None
        total += declared
    if not encoded:
        total += sum(tower.cost(name, grid) for name in names & OF_TOWER for grid in grids)
    decoder = _Decoder(config.text_config, heads, text, [tokens for _, tokens, _ in items])
    return total + decoder.cost(names - OF_TOWER, [tokens for _, tokens, _ in live])


class _Tower:
    """Signals of the vision tower, for one picture."""

    def __init__(self, config: Any, rows: Rows) -> None:
        vision = config.vision_config
        self.packed = hasattr(vision, "spatial_merge_size")
        self.prefix = int(vision.model_type in ("clip_vision_model", "internvl_vision"))
        self.given = frozenset(SIGNALS) - (frozenset() if self.prefix else NEEDS_CLS)
        self.width = getattr(vision, "embed_dim", None) or vision.hidden_size
        self.heads = vision.num_heads if self.packed else vision.num_attention_heads
        self.layers = vision.depth if self.packed else vision.num_hidden_layers
        self.depth = feature_depth(config) if hasattr(config, "vision_feature_layer") else self.layers
        self.projection = _projection(config)
        self._rows = rows

    def cost(self, name: str, grid: Grid) -> int:
        rows = grid[0] * grid[1] + self.prefix
        if self._rows is not None:
            rows = self._rows[(self.layers if name.endswith("_last") else self.depth) - 1]
        one = 2 * rows * self.width**2  # of all queries, or keys
        # Packed towers project queries, keys and values together.
        keys, project = (3 * one, 3 * one) if self.packed else (one, 2 * one)
        if name in ("projector_inputs", "encoder_features", "cls_features"):
            return 0
        if name in ("cls_attention", "cls_attention_last", "cls_logits_last"):
            return keys + 2 * self.width * (self.width + rows)
        if name in ("received_attention", "received_attention_last"):
            return project + 2 * (rows - self.prefix) * rows * self.width
        return keys if name in ("encoder_keys", "cls_keys") else project


class _Decoder:
    """Signals of the prompt and of the decoder, for one prompt.

    Args:
        text: tokens that are not visual, all of which are taken to stand behind the items.
        items: tokens of every item that is in the sequence.
    """

    def __init__(self, config: Any, heads: tuple[int, int, int], text: int, items: Sequence[int]) -> None:
        of_queries, of_keys, size = heads
        self.text, self.length = text, text + sum(items)
        self.query, self.key = (
            2 * config.hidden_size * heads * size for heads in (of_queries, of_keys)
        )  # of one token
        self.look = 2 * of_queries * size  # one query at one key
        self.inner = config.intermediate_size

    def cost(self, names: Collection[str], live: Sequence[int]) -> int:
        """`live` are the tokens of the items that the signals are read for."""
        # Keys of the layer before are in the cache; those of the one behind are made once, and once unrotated.
        following = [name for name in names if name.startswith("next_")]
        plain = "next_plain_keys" in following
        keys = (plain + (len(following) > plain)) * self.length * self.key
        return keys + sum(self._cost(name.removeprefix("next_"), live) for name in names)

    def _cost(self, name: str, live: Sequence[int]) -> int:
        row = self.query + self.look * self.length
        if name == "last_attention":
            return row
        if name == "text_attention":
            return len(live) * self.text * row
        if name == "all_attention":
            return self.length * row
        if name == "visual_attention":
            return sum(live) * row
        if name == "inner_attention":
            return sum(tokens * (self.query + self.look * tokens) for tokens in live)
        if name == "instruction_queries":
            return len(live) * self.text * self.query
        if name == "instruction_keys":
            return sum(live) * self.key
        if name == "activation_overlap":
            return 2 * self.length * self.inner
        return 0


def cache_flops(pruner: Pruner, config: Any, heads: tuple[int, int, int], lengths: Sequence[int], depth: int) -> int:
    """FLOPs of the attention by which a method cuts the cache behind the prefill.

    Args:
        lengths: positions in each decoder layer.
    """
    if "cache_attention" not in pruner.needs:
        return 0
    one = [_Decoder(config.text_config, heads, lengths[layer], ()) for layer in pruner.cache_layers(depth)]
    return sum(each.cost(["last_attention"], ()) for each in one)


def _projection(config: Any) -> int:
    """FLOPs of projecting one row, from what a picture more of four rows of patches costs."""
    cost = FAMILIES[config.model_type].cost
    patches = cost(config, (4, 8), False, None)[1] - cost(config, (4, 4), False, None)[1]
    fold = getattr(config.vision_config, "spatial_merge_size", None) or 1 / getattr(config, "downsample_ratio", 1)
    return patches * round(fold) ** 2 // 16
