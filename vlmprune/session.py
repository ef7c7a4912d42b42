"""Attach a pruner to a model: the only place that registers hooks and touches masks, positions and caches."""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask

from vlmprune.adapters import adapter_for
from vlmprune.cache import Physical, PrunedLayer, kv_bytes, pruned_layer, wrap_layers
from vlmprune.contract import Item, Pruner, VisualTokens
from vlmprune.plan import Kept, Plan, ascending, plan_columns
from vlmprune.registry import create_pruner
from vlmprune.report import ItemReport, PruneReport, StageReport

_sessions: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Session]] = weakref.WeakKeyDictionary()


def prune(model: nn.Module, pruner: Pruner | str, **fields: Any) -> Session:
    """Attach `pruner` to `model` until `close()`, or until the `with` block ends.

    Args:
        model: a loaded model of a supported family, also PEFT-wrapped.
        pruner: a pruner, or the name of one.
        fields: hyper-parameters: of the named pruner, or to change in a copy of the given one.

    Raises:
        ValueError: unsupported model, unknown pruner, a bad hyper-parameter, a signal that the model lacks, or a model
            that has a session already.
    """
    if isinstance(pruner, str):
        pruner = create_pruner(pruner, **fields)
    elif not isinstance(pruner, Pruner):
        raise ValueError(f'pruner must be a name such as "divprune" or a vlmprune.Pruner, got {pruner!r}')
    elif fields:
        pruner = replace(pruner, **fields)
    return Session(model, pruner)


class Session:
    """One attachment of a pruner to a model. Use it as a context manager or call `close()`.

    Attributes:
        model: the model as it was given.
        pruner: the attached pruner.
    """

    def __init__(self, model: nn.Module, pruner: Pruner) -> None:
        self.model, self.pruner = model, pruner
        self.adapter = adapter = adapter_for(model)
        self._check()
        self._last: PruneReport | None = None
        self._call: dict[str, Any] = {}  # what the call in progress brought, from one hook to the next
        self._plan: Plan | None = None
        self._finite: Tensor | None = None
        self._handles = [
            adapter.core.register_forward_pre_hook(self._before_core, with_kwargs=True),
            adapter.language_model.register_forward_pre_hook(self._before_language_model, with_kwargs=True),
            adapter.language_model.register_forward_hook(self._after_language_model, with_kwargs=True),
        ]
        if adapter.model is not adapter.core:
            self._handles += [
                adapter.model.register_forward_pre_hook(self._before_model, with_kwargs=True),
                adapter.model.register_forward_hook(self._after_model, with_kwargs=True),
            ]
        _sessions[adapter.core] = weakref.ref(self)

    def _check(self) -> None:
        adapter, pruner = self.adapter, self.pruner
        held = _sessions.get(adapter.core)
        if held is not None and (other := held()) is not None and other._handles:
            raise ValueError(f"this model already has a session with {other.pruner}: close() that one first.")
        if missing := pruner.needs - adapter.signals:
            raise ValueError(
                f"{pruner.name} needs {', '.join(sorted(missing))}, which {adapter.family} does not give: use a method "
                "that works on the features alone, such as divprune."
            )
        if pruner.positions not in adapter.positions:
            raise ValueError(f'{adapter.family} cannot renumber positions: use positions="original".')

    @property
    def last(self) -> PruneReport | None:
        """Report of the last prefill, None before the first."""
        self._raise_if_not_finite()
        return self._last

    def close(self) -> None:
        """Detach: the model is exactly as before. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._call, self._plan = [], {}, None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Session({type(self.model).__name__}, {self.pruner}, {'open' if self._handles else 'closed'})"

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        keep = kwargs.get("logits_to_keep", 0)
        self._call = {"logits_to_keep": keep if isinstance(keep, int) else len(keep)}
        if kwargs.get("labels") is None:
            return None
        # The head would compute the loss at the unpruned length: it is computed behind it, on what is left.
        self._call["labels"] = kwargs["labels"]
        return args, {**kwargs, "labels": None}

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call, self._call = self._call, {}
        plan, self._plan = self._plan, None
        labels = call.get("labels")
        if labels is None:
            return None
        if plan is not None:
            labels = plan.gather(labels).masked_fill(plan.columns < 0, -100)
        extra = {key: kwargs[key] for key in ("num_items_in_batch",) if key in kwargs}
        logits = output[0] if isinstance(output, tuple) else output.logits
        loss = module.loss_function(  # type: ignore[operator]
            logits=logits, labels=labels, vocab_size=self.adapter.text_config.vocab_size, **extra
        )
        return (loss, *output) if isinstance(output, tuple) else type(output)(**{**output, "loss": loss})

    def _before_core(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._raise_if_not_finite()
        arguments = self.adapter.bind(args, kwargs)
        items = self.adapter.items(arguments)
        mask = arguments.get("attention_mask")
        if items and mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 2:
                raise ValueError("a session needs a 2-D attention_mask [batch, length], or None, to prune a prompt")
            mask = mask.bool().cpu()
        self._call = {**self._call, "items": items, "visible": mask}

    def _before_language_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        items: list[Item] = self._call.get("items", [])
        visible: Tensor | None = self._call.get("visible")
        embeds, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        self._plan = None
        if embeds is None:
            return None
        batch, length = embeds.shape[:2]
        kept, timer = self._choose(items, embeds)
        if any(choice is not None for choice in kept):
            shown = torch.ones(batch, length, dtype=torch.bool) if visible is None else visible[:, -length:]
            self._plan = plan_columns(items, kept, length, shown, embeds.device)
        layer = pruned_layer(cache)
        seen = int(cache.get_seq_length()) if cache is not None else 0
        if items or not seen:
            held = int(cache.get_mask_sizes(0, 0)[0]) if seen else 0
            self._last = self._report(items, kept, (batch, length), (seen, held), timer)
        if self._plan is None and layer is None:
            return None
        return args, self._rewrite(module, kwargs, layer, seen)

    def _choose(self, items: Sequence[Item], embeds: Tensor) -> tuple[list[Kept | None], Callable[[], float] | None]:
        """Survivors of each item, None for one that keeps all its tokens; and what tells the time the choice took."""
        counts = [item.length for item in items]
        budgets = self.pruner.budget(counts)
        kept: list[Kept | None] = [None] * len(items)
        for i, (count, keep) in enumerate(zip(counts, budgets)):
            if keep == 0 and count:
                kept[i] = Kept(torch.empty(0, dtype=torch.int64, device=embeds.device))
                warnings.warn(
                    f"keep={self.pruner.keep} of {count} visual tokens rounds to 0: the whole item is dropped",
                    stacklevel=2,
                )
        chosen = [i for i, (count, keep) in enumerate(zip(counts, budgets)) if 0 < keep < count]
        if not chosen:
            return kept, None
        picked = [items[i] for i in chosen]
        tokens = VisualTokens(
            features=pad_sequence(
                [embeds[item.sample, item.start : item.start + item.length] for item in picked], batch_first=True
            ),
            counts=tuple(item.length for item in picked),
            geometry=tuple(item.geometry for item in picked),
        )
        self._check_finite(tokens.features)
        wanted = torch.tensor([budgets[i] for i in chosen])
        stop = _stopwatch(embeds.device)
        selection = ascending(self.pruner.select(tokens, wanted), tokens.counts, wanted)
        timer = stop()
        for row, i in enumerate(chosen):
            features = None if selection.features is None else selection.features[row, : budgets[i]]
            kept[i] = Kept(selection.index[row, : budgets[i]], features)
        return kept, timer

    def _rewrite(
        self, module: nn.Module, kwargs: dict[str, Any], layer: PrunedLayer | None, seen: int
    ) -> dict[str, Any]:
        """Arguments of the language model for what is left of this call and of what the cache has seen."""
        plan, mask = self._plan, kwargs.get("attention_mask")
        embeds, positions = kwargs["inputs_embeds"], kwargs.get("position_ids")
        batch, length = embeds.shape[:2]
        device = embeds.device
        if mask is not None:
            if mask.ndim != 2 or mask.shape[1] != seen + length:
                raise ValueError(
                    f"attention_mask must cover the unpruned prompt: [{batch}, {seen + length}], got {list(mask.shape)}"
                )
            mask = mask.bool().to(device)
        if positions is None:
            positions = torch.arange(seen, seen + length, device=device)[None]
        positions = positions.expand(*positions.shape[:-2], batch, length)

        # Everything below is about two sets of columns: those the cache holds, and those of this call that stay.
        past = layer.held() if layer is not None else torch.arange(seen, device=device).expand(batch, -1)
        assert past is not None
        past = past.to(device)
        shown = torch.ones(batch, seen + length, dtype=torch.bool, device=device) if mask is None else mask
        past_shown = shown.gather(1, past.clamp(min=0)) & (past >= 0)
        columns = plan.columns if plan is not None else torch.arange(length, device=device).expand(batch, -1)
        now_shown = shown[:, seen:].gather(1, columns.clamp(min=0)) & (columns >= 0)
        plain = mask is None and not (plan is not None and plan.padded) and not (layer is not None and layer.padded)

        if self.pruner.positions == "compact":
            # A token moves down by the visible tokens before it that are gone.
            rank = shown.cumsum(1)
            before = rank[:, seen:].gather(1, columns.clamp(min=0))
            after = past_shown.sum(1, keepdim=True) + now_shown.cumsum(1)
            lost = before - after
        if plan is not None:
            index = columns.clamp(min=0).expand(*positions.shape[:-1], -1)
            positions = positions.gather(-1, index)
            embeds = plan.gather(embeds)
            for row, first, features in plan.merged:
                embeds[row, first : first + len(features)] = features.to(embeds.dtype)
        if self.pruner.positions == "compact":
            positions = positions - lost
        positions = positions.masked_fill(columns < 0, 0)

        cache = kwargs.get("past_key_values")
        use_cache = kwargs.get("use_cache")
        if cache is None and (module.config.use_cache if use_cache is None else use_cache):  # type: ignore[union-attr]
            cache = DynamicCache(config=module.config)  # type: ignore[arg-type]
        if cache is not None and plan is not None:
            held = torch.cat([past, torch.where(columns < 0, -1, columns + seen)], dim=1)
            padded = plan.padded or (layer is not None and layer.padded)
            for each in wrap_layers(cache, module.config.num_hidden_layers):  # type: ignore[arg-type,union-attr]
                each.expect(held, seen + length, padded)
        held_mask = torch.cat([past_shown, now_shown], dim=1)
        window = _Window(torch.cat([past, columns + seen], dim=1), columns + seen, seen + length)
        return {
            **kwargs,
            "inputs_embeds": embeds,
            "position_ids": positions,
            "past_key_values": cache,
            "attention_mask": _masks(module.config, embeds, None if plain else held_mask, held_mask, cache, window),
        }

    def _after_language_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        cache = kwargs.get("past_key_values") or getattr(output, "past_key_values", None)
        if self._last is not None and not self._last.kv_bytes and cache is not None:
            self._last.kv_bytes = kv_bytes(cache)
        if self.adapter.model is self.adapter.core:
            self._call, self._plan = {}, None

    def _report(
        self,
        items: Sequence[Item],
        kept: Sequence[Kept | None],
        shape: tuple[int, int],
        cached: tuple[int, int],
        timer: Callable[[], float] | None,
    ) -> PruneReport:
        reports = []
        for item, choice in zip(items, kept):
            index = torch.arange(item.length) if choice is None else choice.index
            features = None if choice is None else choice.features
            reports.append(
                ItemReport(
                    sample=item.sample,
                    start=cached[0] + item.start,
                    tokens_before=item.length,
                    kept=index,
                    merged=torch.full((len(index),), features is not None),
                    geometry=item.geometry,
                    stages=(StageReport(0, index),),
                )
            )
        batch, length = shape
        left = length if self._plan is None else self._plan.columns.shape[1]
        keep = self._call.get("logits_to_keep", 0)
        return PruneReport(
            pruner=self.pruner,
            items=reports,
            batch=batch,
            length=length,
            columns=None if self._plan is None else self._plan.columns,
            layer_tokens=(left,) * self.adapter.text_config.num_hidden_layers,
            cached_tokens=cached[1],
            logits_tokens=(min(keep or length, length), min(keep or left, left)),
            config=self.adapter.config,
            timer=timer,
        )

    def _check_finite(self, features: Tensor) -> None:
        # Looking costs a synchronisation on a GPU: there the answer is looked at with the next call or report.
        self._finite = features.isfinite().all()
        if features.device.type == "cpu":
            self._raise_if_not_finite()

    def _raise_if_not_finite(self) -> None:
        finite, self._finite = self._finite, None
        if finite is not None and not bool(finite):
            raise ValueError("visual features contain NaN or infinity: check the image, the dtype and the vision tower")


class _Window:
    """A sliding attention window, counted in original columns."""

    def __init__(self, keys: Tensor, queries: Tensor, seen: int) -> None:
        self.keys, self.queries, self.seen = keys, queries, seen

    def mask_function(self, size: int, offset: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        keys, queries = self.keys, self.queries

        def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return queries[batch, query - offset] - keys[batch, key] < size

        return near


def _masks(
    config: Any, embeds: Tensor, mask: Tensor | None, held: Tensor, cache: Any, window: _Window
) -> Tensor | dict[str, Any] | None:
    """What to hand the language model as `attention_mask`, built against the keys that really exist.

    transformers would place the queries behind the logical length, and, with no mask, no cache and gaps in the
    positions, would take the prompt for several packed ones: so the masks are made here.
    """
    physical = Physical(cache.layers[0]) if cache is not None else None
    size = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or []
    windowed = size is not None and window.seen > size

    def make(sliding: bool) -> Any:
        if not (sliding and windowed):
            return create_causal_mask(config, embeds, mask, physical, layer_idx=0)
        offset = held.shape[1] - window.queries.shape[1]
        near = window.mask_function(size, offset)
        return create_causal_mask(config, embeds, held, physical, layer_idx=0, and_mask_function=near)

    if "sliding_attention" in types and "full_attention" in types:
        return {"full_attention": make(False), "sliding_attention": make(True)}
    made = make(size is not None and (not types or "sliding_attention" in types))
    # None means "plain causal"; without a cache it must be said with a mask.
    return held if made is None and cache is None else made


def _stopwatch(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Start timing now; call the result to stop, and what that gives for the seconds (it waits for a GPU only then)."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()

        def stop_cuda() -> Callable[[], float]:
            end.record()

            def seconds() -> float:
                end.synchronize()
                return begin.elapsed_time(end) / 1000

            return seconds

        return stop_cuda
    start = time.perf_counter()

    def stop() -> Callable[[], float]:
        took = time.perf_counter() - start
        return lambda: took

    return stop
