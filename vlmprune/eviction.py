"""The cache stage: keys and values of visual tokens leave the KV cache behind the prefill and while decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmprune.adapters import Adapter
from vlmprune.cache import wrap_layers
from vlmprune.contract import Geometry, Pruner, VisualTokens, choosing
from vlmprune.course import Course
from vlmprune.kernels import attention_scores
from vlmprune.plan import ascending

if TYPE_CHECKING:
    from vlmprune.session import Live
    from vlmprune.signals import Signals


class _Held:
    """One item in the cache: its row, the columns of all its original tokens, and which of them are alive."""

    def __init__(self, sample: int, columns: Tensor, geometry: Geometry) -> None:
        self.sample, self.columns, self.geometry = sample, columns, geometry
        self.alive = torch.ones_like(columns, dtype=torch.bool)


class Eviction:
    """Cuts the cache as a pruner's `cache_layers`, `cache_due` and `select_cache` say.

    Attributes:
        layers: the decoder layers that are cut.
    """

    def __init__(self, pruner: Pruner, adapter: Adapter, signals: Signals) -> None:
        self.pruner, self.adapter = pruner, adapter
        self.layers = frozenset(pruner.cache_layers(len(adapter.decoder_layers)))
        self._scores = "cache_attention" in signals.wanted
        self._wanted = signals.wanted
        self._items: list[_Held] = []
        self._queries: dict[int, Tensor] = {}
        self._step = -1

    def begin(self, live: Sequence[Live], seen: int, device: torch.device) -> None:
        """A prompt with images enters: its visual tokens are the ones to cut from now on."""
        if not self.layers:
            return
        self._step, self._items = -1, []
        for each in live:
            item = each.item
            columns = item.columns if item.columns is not None else torch.arange(item.start, item.stop, device="cpu")
            self._items.append(_Held(item.sample, seen + columns.to(device), each.geometry))

    def before_layer(self, layer: int, hidden: Tensor, rotary: tuple[Tensor, Tensor], course: Course) -> None:
        """Keep the last token's query, where its attention is asked for."""
        if not (self._scores and self._items and self.pruner.cache_due(self._step + 1)):
            return
        shown = course.host_shown()
        last = torch.where(shown, torch.arange(shown.shape[1], device="cpu"), -1).amax(dim=1).to(hidden.device)
        row = torch.arange(len(hidden), device=hidden.device)
        cos, sin = (part.expand(len(hidden), -1, -1)[row, last][:, None] for part in rotary)
        module = self.adapter.decoder_layers[layer]
        with choosing():
            self._queries[layer] = self.adapter.queries(module, hidden[row, last][:, None], (cos, sin))

    def after_step(self, cache: Any, course: Course, live: Sequence[Live]) -> list[dict[int, Tensor]]:
        """Behind a forward pass: cut the cache if it is due. Per item and layer, which of its tokens are held."""
        if not self._items:
            return []
        self._step += 1
        for item, each in zip(self._items, live):
            item.alive = torch.zeros_like(item.alive).index_fill(0, each.index.to(item.alive.device), True)
        if not self.pruner.cache_due(self._step):
            return []
        depth = len(self.adapter.decoder_layers)
        first = min(self.layers)
        layers = wrap_layers(cache, first, depth)
        kept: list[dict[int, Tensor]] = [{} for _ in self._items]
        for number, layer in zip(range(first, depth), layers):
            values = layer.values
            assert values is not None
            held = layer.entries(values.device).expand(course.batch, -1)
            shown = held >= 0
            if course.mask is not None:
                shown = shown & course.mask.to(held.device).gather(1, held.clamp(min=0))
            keep = shown
            if number in self.layers:
                keep, values = self._choose(number, layer, held, shown, kept)
            # Every layer from here on has masks of its own.
            layer.evict(held, keep, (shown & ~keep).sum(1, keepdim=True), values)
            layer.group = number
        self._queries = {}
        return kept

    def _choose(
        self, number: int, layer: Any, held: Tensor, shown: Tensor, kept: list[dict[int, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Let the pruner choose in one layer: entries to keep [B, H], and the values of all entries from now on."""
        for item in self._items:  # layers may be on several devices
            item.columns, item.alive = item.columns.to(held.device), item.alive.to(held.device)
        places = [torch.isin(held[item.sample], item.columns).nonzero().flatten() for item in self._items]
        here = [i for i, place in enumerate(places) if len(place)]
        keep, values = shown.clone(), layer.values
        for i in range(len(places)):
            kept[i][number] = places[i]
        if not here:
            return keep, values
        index = [
            torch.searchsorted(self._items[i].columns, held[self._items[i].sample, places[i]].contiguous())
            for i in here
        ]

        def rows(part: Tensor) -> Tensor:
            picked = [part[self._items[i].sample][:, places[i]].transpose(0, 1).flatten(1) for i in here]
            return pad_sequence(picked, batch_first=True)

        def signal(name: str) -> Tensor:
            if name not in self._wanted:
                raise KeyError(f"the signal {name!r} was not asked for: name it in the pruner's `needs`")
            if name == "cache_keys":
                return rows(layer.keys)
            if name == "cache_alive":
                return pad_sequence([self._items[i].alive[each] for i, each in zip(here, index)], batch_first=True)
            if name == "cache_attention":
                scores = attention_scores(self._queries[number].to(held.device), layer.keys, mask=shown, reduce="rows")[
                    :, 0
                ]
                return pad_sequence([scores[self._items[i].sample, places[i]] for i in here], batch_first=True)
            raise KeyError(f"the signal {name!r} is not given at a cache stage")

        tokens = VisualTokens(
            features=rows(values),
            counts=tuple(len(places[i]) for i in here),
            index=tuple(index),
            shapes=tuple(self._items[i].geometry for i in here),
            layer=number,
            depth=len(self.adapter.decoder_layers),
            signal=signal,
        )
        with choosing():
            selection = self.pruner.select_cache(tokens)
        chosen = ascending(selection, tokens.counts, [None] * len(here))
        for i, numbers, choice in zip(here, index, chosen):
            item, place = self._items[i], places[i]
            keep[item.sample, place] = False
            keep[item.sample, place[choice.index]] = True
            kept[i][number] = numbers[choice.index]
            if choice.features is not None:
                values = values.clone() if values is layer.values else values
                new = choice.features.unflatten(-1, (values.shape[1], -1)).transpose(0, 1)
                values[item.sample][:, place[choice.index]] = new.to(values.dtype)
        return keep, values
