"""A KV cache whose layers know two lengths: how long the prompt was, and how many of its keys they still hold."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticSlidingWindowLayer,
)
from transformers.masking_utils import create_causal_mask

OLD_CACHE_ARGUMENT = "past_key_values"
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else OLD_CACHE_ARGUMENT
"""What models call their cache: `cache` from transformers 5.24 on, which still takes the old name."""


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments, by either name."""
    cache = arguments.get(CACHE_ARGUMENT)
    return arguments.get(OLD_CACHE_ARGUMENT) if cache is None else cache


class PrunedLayer(CacheLayerMixin):
    """Wraps one cache layer that holds fewer keys than columns were seen.

    Physical entries 0..P-1 came from the original columns `columns` [B, P] (int64, -1 where a row is padded); what
    follows them maps one to one. `get_seq_length()` is logical (the length of the unpruned sequence, which positions
    and slicing of the next turn need), `get_mask_sizes()` physical (the keys that exist). Reordering and repeating act
    on the wrapped layer and on the map alike, so beam search and reused caches stay exact.
    """

    def __init__(self, inner: Any, window: int | None = None) -> None:
        # No super().__init__(): it would set `keys` and `values`, which belong to the wrapped layer.
        self.inner = inner
        self.window = window  # the sliding window that it would have had unpruned
        self.columns: Tensor | None = None
        self.hidden = 0  # columns that were seen and are not held
        self.padded = False  # whether `columns` holds a -1
        self.group = 0  # the first of the neighbouring layers that hold the same columns
        self.pending: tuple[Tensor, int] | None = None
        self.evicted: Tensor | None = None  # int64 [B, 1], columns that left after queries had been placed behind them
        self.slots: Tensor | None = None  # int64 [B, L], of a static layer: original column of every slot, -1 for none

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r}, hidden={self.hidden})"

    def expect(self, columns: Tensor, seen: int, padded: bool, group: int) -> None:
        """Announce the next `update`: after it the entries come from `columns` [B, P], out of `seen` columns so far."""
        self.pending, self.padded, self.group = (columns, seen), padded, group

    def entries(self, device: torch.device) -> Tensor:
        """int64 [B, H]: `held`, spelled out; before the first prune, of one row.

        Raises:
            ValueError: the wrapped layer cannot shrink.
        """
        if type(self.inner) is not DynamicLayer:
            raise ValueError(
                f"a {type(self.inner).__name__} keeps its size: use a DynamicCache with methods that cut the cache"
            )
        held = self.held()
        return torch.arange(self.get_seq_length(), device=device)[None] if held is None else held.to(device)

    def evict(self, held: Tensor, keep: Tensor, lost: Tensor, values: Tensor) -> None:
        """Hold only some of the entries from now on.

        Args:
            held: int64 [B, H], `entries`.
            keep: bool [B, H], which of them.
            lost: int64 [B, 1], how many of the others were visible.
            values: [B, G, H, d], to hold from now on.
        """
        seen, width = self.get_seq_length(), int(keep.sum(1).max())
        self.evicted = lost if self.evicted is None else self.evicted + lost
        order = (~keep).int().sort(dim=1, stable=True).indices[:, :width]
        self.columns = held.masked_fill(~keep, -1).gather(1, order)
        self.hidden, self.padded = seen - width, bool((self.columns < 0).any())
        index = order[:, None, :, None]
        self.inner.keys, self.inner.values = (
            part.gather(2, index.expand(-1, part.shape[1], -1, part.shape[3])) for part in (self.inner.keys, values)
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.pending is not None:
            self.columns, seen = self.pending
            self.hidden = seen - self.columns.shape[1]
            self.pending = None
            self._number_slots()
        return self.inner.update(key_states, value_states, *args, **kwargs)

    def _number_slots(self) -> None:
        """Number the slots of a static layer, once, so that a compiled decode step finds them ready."""
        if not self.is_compileable or self.columns is None:
            self.slots = None
            return
        total = self.inner.get_max_length()
        after = torch.arange(self.columns.shape[1] + self.hidden, total, device=self.columns.device)
        known = torch.cat([self.columns, after.expand(len(self.columns), -1)], dim=1)
        self.slots = torch.nn.functional.pad(known, (0, total - known.shape[1]), value=-1)

    def held(self) -> Tensor | None:
        """int64 [B, P]: original column of every entry held now, -1 for padding; None before the first prune."""
        if self.columns is None:
            return None
        tail = int(self.inner.get_seq_length()) - self.columns.shape[1]
        if tail == 0:
            return self.columns
        first = self.columns.shape[1] + self.hidden
        after = torch.arange(first, first + tail, device=self.columns.device).expand(len(self.columns), -1)
        return torch.cat([self.columns, after], dim=1)

    def get_seq_length(self) -> int:
        return self.inner.get_seq_length() + self.hidden

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.inner.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return self.inner.get_max_length()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` columns of the unpruned sequence, those that were pruned included."""
        if self.columns is None:
            return self.inner.crop(tokens_to_remove)
        count = abs(tokens_to_remove)
        tail = int(self.inner.get_seq_length()) - self.columns.shape[1]
        if count <= tail:
            return self.inner.crop(-count)
        # Into the pruned prompt: rows may lose different numbers of entries; what only some lose becomes padding.
        seen = self.columns.shape[1] + self.hidden - (count - tail)
        columns = self.columns.masked_fill(self.columns >= seen, -1)
        filled = (columns >= 0).any(dim=0).nonzero()
        width = int(filled[-1]) + 1 if len(filled) else 0
        self.inner.crop(-(tail + self.columns.shape[1] - width))
        self.columns, self.hidden, self.padded = columns[:, :width], seen - width, True
        self._number_slots()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.inner.reorder_cache(beam_idx)
        if self.columns is not None:
            self.columns = self.columns.index_select(0, beam_idx.to(self.columns.device))
            self._number_slots()
        if self.evicted is not None:
            self.evicted = self.evicted.index_select(0, beam_idx.to(self.evicted.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.inner.batch_repeat_interleave(repeats)
        if self.columns is not None:
            self.columns = self.columns.repeat_interleave(repeats, dim=0)
            self._number_slots()
        if self.evicted is not None:
            self.evicted = self.evicted.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.inner.batch_select_indices(indices)
        if self.columns is not None:
            self.columns = self.columns[indices.to(self.columns.device)]
            self._number_slots()
        if self.evicted is not None:
            self.evicted = self.evicted[indices.to(self.evicted.device)]

    def reset(self) -> None:
        self.inner.reset()
        self.columns, self.hidden, self.padded, self.pending, self.evicted = None, 0, False, None, None
        self.slots = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.inner.lazy_initialization(key_states, value_states)

    def offload(self) -> None:
        self.inner.offload()

    def prefetch(self) -> None:
        self.inner.prefetch()

    def __getattr__(self, name: str) -> Any:
        # keys, values, dtype, device, is_initialized, ... are the wrapped layer's own.
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def is_sliding(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        return self.inner.is_compileable

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return getattr(self.inner, "is_croppable", True)


class Physical:
    """A cache layer as mask building must see it: queries start where the held keys end."""

    def __init__(self, layer: CacheLayerMixin) -> None:
        inner = layer.inner if isinstance(layer, PrunedLayer) else layer
        self.layer = inner
        self.is_compileable = inner.is_compileable

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.layer.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.layer.get_mask_sizes(query_length)


def raise_if_unfit(cache: Any) -> None:
    """Raise ValueError for a kind of cache whose layers cannot hold a pruned prompt."""
    if cache is not None and not isinstance(cache, (DynamicCache, StaticCache)):
        raise ValueError(
            f"a {type(cache).__name__} cannot hold a pruned prompt: use DynamicCache (the default of generate()) or "
            "StaticCache."
        )


def wrap_layers(cache: Cache, first: int, depth: int) -> list[PrunedLayer]:
    """Make the layers `first`..`depth - 1` of a cache `PrunedLayer`s, in place, and return them.

    Raises:
        ValueError: its layers cannot hold a pruned prompt.
    """
    raise_if_unfit(cache)
    while len(cache.layers) < depth:
        cache.layers.append(DynamicLayer())
    for index in range(first, depth):
        layer, window = cache.layers[index], None
        if isinstance(layer, DynamicSlidingWindowLayer):
            window = layer.sliding_window
            # Its window counts held keys, ours counts original columns: hold all, and let the mask do the windowing.
            layer = unwindowed(layer)
        if isinstance(layer, StaticSlidingWindowLayer):
            raise ValueError("a StaticCache with a sliding window cannot hold a pruned prompt: use DynamicCache")
        if not isinstance(layer, PrunedLayer):
            cache.layers[index] = PrunedLayer(layer, window)
    return cache.layers[first:depth]  # type: ignore[return-value]


def unwindowed(layer: DynamicSlidingWindowLayer) -> DynamicLayer:
    """A plain layer with the same content.

    Raises:
        ValueError: the window has already dropped keys.
    """
    plain, length = DynamicLayer(), layer.get_seq_length()
    if length:
        if layer.keys is None or layer.values is None or layer.keys.shape[-2] < length:
            raise ValueError("the sliding window of this cache is full: start a new conversation to prune an image")
        plain.update(layer.keys, layer.values)
    return plain


def is_pruned(cache: Any) -> bool:
    """Whether any layer of a cache holds fewer keys than it saw."""
    return any(isinstance(layer, PrunedLayer) and layer.columns is not None for layer in getattr(cache, "layers", ()))


def kv_bytes(cache: Any) -> list[int]:
    """Bytes of keys and values that each layer holds."""
    return [
        sum(part.numel() * part.element_size() for part in (layer.keys, layer.values) if part is not None)
        for layer in cache.layers
    ]


def unpruned_kv_bytes(cache: Any, length: int) -> list[int]:
    """Bytes that each layer would hold behind `length` columns had nothing been pruned."""
    sizes = []
    for layer, held in zip(cache.layers, kv_bytes(cache)):
        inner = layer.inner if isinstance(layer, PrunedLayer) else layer
        if type(inner) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None:
            sizes.append(held)  # allocated at its full size, or of a kind that is never pruned
            continue
        window = layer.window if isinstance(layer, PrunedLayer) else getattr(inner, "sliding_window", None)
        rows, heads, _, width = layer.keys.shape
        whole = length if window is None else min(length, window - 1)
        sizes.append(rows * heads * whole * (width + layer.values.shape[-1]) * layer.keys.element_size())
    return sizes
