"""One call of the language model: which columns each layer still has, and the masks and positions that follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask

from vlmprune.cache import Physical, PrunedLayer, cache_of, wrap_layers
from vlmprune.contract import Positions
from vlmprune.plan import Plan


class Course:
    """The way of one call through the layers.

    Columns count from the start of the call; what the cache holds lies before them, at 0..seen-1.

    Attributes:
        mask: bool [B, seen + S], False for padding, or None.
        columns: int64 [B, P], the columns left at this point, -1 for padding; None while all are.
        shown: bool [B, P] on the CPU, False for padding and masked columns; None if nothing is masked.
        cache: the call's cache; made here if the model would make one.
        layer_kwargs: what decoder layers are given instead of the model's own, from the last cut inside the decoder on.
    """

    def __init__(
        self,
        module: nn.Module,
        kwargs: dict[str, Any],
        policy: Positions,
        seen: int,
        mask: Tensor | None,
        shown: Tensor | None,
    ) -> None:
        embeds = kwargs["inputs_embeds"]
        self.config: Any = module.config
        self.policy, self.seen = policy, seen
        self.batch, self.length, self.device = embeds.shape[0], embeds.shape[1], embeds.device
        self.mask = mask
        self.positions: Tensor | None = kwargs.get("position_ids")
        use_cache = kwargs.get("use_cache")
        self.use_cache = self.config.use_cache if use_cache is None else use_cache  # type: ignore[union-attr]
        self.cache: Any = cache_of(kwargs)
        self.columns: Tensor | None = None
        self.shown = shown
        self.layer_kwargs: dict[str, Any] = {}

    def host_shown(self) -> Tensor:
        """`shown`, spelled out."""
        width = self.length if self.columns is None else self.columns.shape[1]
        return torch.ones(self.batch, width, dtype=torch.bool, device="cpu") if self.shown is None else self.shown

    def move(self, device: torch.device) -> None:
        """Go on with the layers of another device."""
        self.device = device
        self.columns = None if self.columns is None else self.columns.to(device)
        self.positions = None if self.positions is None else self.positions.to(device)

    @property
    def width(self) -> int:
        """Positions per row that the layers compute from here on."""
        return self.length if self.columns is None else self.columns.shape[1]

    def cut(self, plan: Plan, layer: int) -> None:
        """Leave only the plan's positions, from `layer` on; tell the cache layers what is coming."""
        if self.columns is None:
            self.columns = plan.index
        else:
            self.columns = torch.where(plan.index < 0, -1, self.columns.gather(1, plan.index.clamp(min=0)))
        self.shown = plan.shown
        if self.cache is None and self.use_cache:
            self.cache = DynamicCache(config=self.config)
        if self.cache is None:
            return
        layers = wrap_layers(self.cache, layer, self.config.num_hidden_layers)
        padded = not bool(plan.shown.all())
        new = torch.where(self.columns < 0, -1, self.columns + self.seen)
        held: dict[int, Tensor] = {}
        for each in layers:
            # Layers that an earlier call left with different columns stay apart.
            group = max(layer, each.group)
            if group not in held:
                held[group] = torch.cat([self.past(group), new], dim=1)
            each.expect(held[group], self.seen + self.length, padded or each.padded, group)

    def pruned_layer(self, layer: int) -> PrunedLayer | None:
        """The cache layer, if an earlier call left it pruned."""
        layers = getattr(self.cache, "layers", None) or []
        found = layers[layer] if layer < len(layers) else None
        return found if isinstance(found, PrunedLayer) and found.columns is not None else None

    def past(self, layer: int) -> Tensor:
        """int64 [B, H]: columns that the cache layer holds from earlier calls, -1 for padding."""
        pruned = self.pruned_layer(layer)
        held = pruned.held() if pruned is not None else None
        if held is None:
            held = torch.arange(self.seen, device=self.device).expand(self.batch, -1)
        return held.to(self.device)

    def arguments(self, layer: int, embeds: Tensor) -> tuple[Tensor, Any]:
        """Position ids [..., B, P] and what to hand on as attention mask, from `layer` on."""
        mask, seen, length, batch = self.mask, self.seen, self.length, self.batch
        positions = self.positions
        if positions is None:
            positions = torch.arange(seen, seen + length, device=self.device)[None]
        positions = positions.expand(*positions.shape[:-2], batch, length)

        pruned, columns = self.pruned_layer(layer), self.columns
        padded = (columns is not None and not bool(self.host_shown().all())) or (pruned is not None and pruned.padded)
        plain = mask is None and not padded
        if plain and columns is None and not self._windowed and self.cache is not None:
            # Every decode step of an unpadded batch: nothing to look up.
            if pruned is None or self.policy != "compact":
                return positions, self._masks(layer, embeds)
            shift = pruned.hidden if pruned.evicted is None else pruned.hidden - pruned.evicted.to(positions.device)
            return positions - shift, self._masks(layer, embeds)
        past, index, visible, held = self._keys(layer)
        past_shown, now_shown = held[:, : past.shape[1]], held[:, past.shape[1] :]
        if columns is not None:
            positions = positions.gather(-1, index.expand(*positions.shape[:-1], -1))
        if self.policy == "compact":
            # A token moves down by the visible tokens before it that are gone.
            before = visible.cumsum(1)[:, seen:].gather(1, index)
            after = past_shown.sum(1, keepdim=True) + now_shown.cumsum(1)
            if pruned is not None and pruned.evicted is not None:
                after = after + pruned.evicted.to(after.device)
            positions = positions - (before - after)
        if columns is not None:
            positions = positions.masked_fill(columns < 0, 0)

        keys, queries = torch.cat([past, index + seen], dim=1), index + seen
        return positions, self._masks(layer, embeds, None if plain else held, held, keys, queries)

    def key_mask(self, layer: int) -> Tensor:
        """bool [B, H + P]: of the keys that `layer` will hold once it has run, those that a row's last token sees."""
        past, index, _, held = self._keys(layer)
        types = getattr(self.config, "layer_types", None)
        if self._windowed and (types is None or types[layer] == "sliding_attention"):
            columns = torch.cat([past, index + self.seen], dim=1)
            last = columns.masked_fill(~held, -1).amax(dim=1, keepdim=True)
            held = held & (last - columns < self.config.sliding_window)
        return held

    def _keys(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Columns held from before [B, H], columns of this call [B, P], and what is shown: of all, and of these."""
        past, columns = self.past(layer), self.columns
        total = self.seen + self.length
        visible = torch.ones(self.batch, total, dtype=torch.bool, device=self.device)
        if self.mask is not None:
            visible = self.mask.to(self.device)
        every = torch.arange(self.length, device=self.device).expand(self.batch, -1)
        index = every if columns is None else columns.clamp(min=0)
        past_shown = visible.gather(1, past.clamp(min=0)) & (past >= 0)
        now_shown = visible[:, self.seen :].gather(1, index)
        if columns is not None:
            now_shown = now_shown & (columns >= 0)
        return past, index, visible, torch.cat([past_shown, now_shown], dim=1)

    @property
    def _windowed(self) -> bool:
        """Whether a sliding window hides anything yet."""
        size = getattr(self.config, "sliding_window", None)
        return size is not None and self.seen + self.length > size

    def _masks(
        self,
        layer: int,
        embeds: Tensor,
        mask: Tensor | None = None,
        held: Tensor | None = None,
        keys: Tensor | None = None,
        queries: Tensor | None = None,
    ) -> Any:
        """Attention masks against the keys that really exist, in the form that `layer` takes (0: the whole model).

        transformers would place the queries behind the logical length, and, given no mask, no cache and gaps in the
        positions, would take the prompt for several packed ones: so the masks are made here.
        """
        config, cache = self.config, self.cache
        physical: Any = Physical(cache.layers[layer]) if cache is not None and layer < len(cache.layers) else None
        types = getattr(config, "layer_types", None) or []

        def make(sliding: bool) -> Any:
            if not (sliding and self._windowed):
                return create_causal_mask(config, embeds, mask, physical, layer_idx=0)
            assert keys is not None
            assert queries is not None
            near = _within(config.sliding_window, keys, queries)
            return create_causal_mask(config, embeds, held, physical, layer_idx=0, and_mask_function=near)

        if layer:
            return make(types[layer] == "sliding_attention" if types else True)
        if "sliding_attention" in types and "full_attention" in types:
            return {"full_attention": make(False), "sliding_attention": make(True)}
        made = make(not types or "sliding_attention" in types)
        # None means "plain causal"; without a cache that must be said with a mask.
        return held if made is None and cache is None else made


class Step:
    """One decode step on a static cache whose masks are ready: tensor operations only, so that it compiles.

    `generate()` prepares the mask over the columns of the unpruned sequence; each layer takes from it what its slots
    came from.

    Attributes:
        mask: bool, or floats to add, [B, 1, 1, L]; or such masks by the kind of layer.
        positions: int64 [..., B, 1].
    """

    def __init__(self, mask: Any, positions: Tensor, policy: Positions) -> None:
        self.mask, self.positions, self.policy = mask, positions, policy

    def arguments(self, layer: PrunedLayer) -> tuple[Tensor, Any]:
        """Position ids, and what to hand on as attention mask, for the layers that hold what `layer` holds."""
        slots = layer.slots
        assert slots is not None
        if not isinstance(self.mask, dict):
            mask = _of_slots(self.mask, slots)
            return self._positions(self.mask, mask), mask
        masks = {kind: _of_slots(each, slots) for kind, each in self.mask.items()}
        kind = next(iter(masks))
        return self._positions(self.mask[kind], masks[kind]), masks

    def _positions(self, before: Tensor, after: Tensor) -> Tensor:
        """Compact: the token moves down by as many visible columns as are gone."""
        if self.policy != "compact":
            return self.positions
        gone = _visible(before).sum(-1) - _visible(after).sum(-1)
        return self.positions - gone[:, 0]

    @staticmethod
    def ready(kwargs: Mapping[str, Any], inputs: str) -> bool:
        """Whether a call is such a step: one column without pictures, behind a prompt."""
        cache, new, mask = cache_of(kwargs), kwargs.get(inputs), kwargs.get("attention_mask")
        if not isinstance(cache, StaticCache) or new is None or new.shape[1] != 1:
            return False
        layer: Any = cache.layers[0]
        if not layer.is_initialized or kwargs.get("labels") is not None:
            return False
        masks = list(mask.values()) if isinstance(mask, dict) else [mask]
        if not all(isinstance(each, Tensor) and each.ndim == 4 for each in masks):
            return False
        if any(value is not None for name, value in kwargs.items() if name.startswith(("pixel_values", "mm_encoder"))):
            return False
        # A cache that was reset waits for a prompt; looking needs the host, and compiled steps follow a prompt anyway.
        return torch.compiler.is_compiling() or bool(layer.get_seq_length() > 0)


def _of_slots(mask: Tensor, slots: Tensor) -> Tensor:
    """A mask over columns, [B, 1, Q, L], as one over slots [B, L]."""
    slots = slots.to(mask.device)[:, None, None]
    taken = mask.expand(len(slots), -1, -1, -1).gather(3, slots.clamp(min=0).expand(-1, -1, mask.shape[2], -1))
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return taken.masked_fill(slots < 0, hidden)


def _visible(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask == 0


def padding_mask(mask: Any, total: int, length: int) -> Tensor | None:
    """The 2-D mask [B, total] (bool, False for padding) behind an `attention_mask`, for `length` new columns.

    For caches that can be compiled, `generate()` prepares masks [B, 1, length, >= total]; any that says no more than
    "causal, without padding" can be read back. None where it prepared none, for attention that is causal anyway.

    Raises:
        ValueError: the mask does not cover the unpruned sequence, or says more.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
        if mask is None:
            return None
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise ValueError(f"a session needs a 2-D attention_mask [batch, length] or None, got {type(mask).__name__}")
    if mask.shape[-1] < total or (mask.ndim == 2 and mask.shape[1] != total):
        raise ValueError(f"attention_mask must cover the unpruned prompt of {total} columns, got {mask.shape[-1]}")
    if mask.ndim == 2:
        return mask.bool()
    allowed = (mask if mask.dtype == torch.bool else mask == 0)[:, 0, :, :total]
    shown = allowed[:, -1]
    causal = torch.ones(length, total, dtype=torch.bool, device=mask.device).tril(total - length)
    if length > 1 and not torch.equal(allowed, (causal & shown[:, None])):
        raise ValueError("a session needs a 2-D attention_mask [batch, length]: a custom 4-D one cannot be cut")
    return shown


def _within(size: int, keys: Tensor, queries: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A sliding window of `size`, counted in original columns of keys [B, H + P] and queries [B, P]."""
    offset = keys.shape[1] - queries.shape[1]

    def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return queries[batch, query - offset] - keys[batch, key] < size

    return near
