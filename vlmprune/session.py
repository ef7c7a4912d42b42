"""Attach a pruner to a model: the only place that registers hooks and touches masks, positions and caches."""

from __future__ import annotations

import functools
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vlmprune.adapters import adapter_for, introduce
from vlmprune.cache import (
    CACHE_ARGUMENT,
    OLD_CACHE_ARGUMENT,
    PrunedLayer,
    cache_of,
    is_pruned,
    kv_bytes,
    raise_if_unfit,
    unpruned_kv_bytes,
)
from vlmprune.contract import Geometry, Item, Pruner, VisualTokens, choosing
from vlmprune.course import Course, Step, padding_mask
from vlmprune.eviction import Eviction
from vlmprune.flops import solve_keep
from vlmprune.plan import Kept, ascending, plan_rows
from vlmprune.registry import create_pruner
from vlmprune.report import ItemReport, PruneReport
from vlmprune.signals import Entering, Signals

_sessions: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Session]] = weakref.WeakKeyDictionary()


def prune(model: nn.Module, pruner: Pruner | str, *, processor: Any = None, **settings: Any) -> Session:
    """Attach `pruner` to `model` until `close()`, or until the `with` block ends.

    Args:
        model: a loaded model of a supported family, also PEFT-wrapped.
        pruner: a pruner, or the name of one.
        processor: the model's processor. Only InternVL's videos need it: without, each of their frames is an image.
        settings: hyper-parameters: of the named pruner, or to change in a copy of the given one. `keep` may also be a
            share of the unpruned cost, such as "flops:0.3", "decoder:0.3" or "kv:0.2" (`vlmprune.contract.TARGETS`):
            the ratio is solved for each row of a prompt.

    Raises:
        ValueError: unsupported model, unknown pruner, a bad hyper-parameter, a signal that the model lacks, or a model
            that has a session already.
    """
    if processor is not None:
        introduce(model, processor)
    return Session(model, as_pruner(pruner, **settings))


def session_of(model: nn.Module) -> Session | None:
    """The open session of `model`, None where there is none: to close one whose name was lost.

    Raises:
        ValueError: unsupported model.
    """
    return _open_session(adapter_for(model).core)


def _open_session(core: nn.Module) -> Session | None:
    held = _sessions.get(core)
    session = held() if held is not None else None
    return session if session is not None and session._handles else None


def as_pruner(pruner: Pruner | str, **settings: Any) -> Pruner:
    """The pruner that a name, or a pruner, and hyper-parameters stand for; see `prune`."""
    if isinstance(pruner, str):
        return create_pruner(pruner, **settings)
    if not isinstance(pruner, Pruner):
        raise ValueError(f'pruner must be a name such as "divprune" or a vlmprune.Pruner, got {pruner!r}')
    return replace(pruner, **settings) if settings else pruner


class Live:
    """One item on its way: where it was, where its survivors are now, and which of its tokens they are."""

    def __init__(self, item: Item, index: Tensor) -> None:
        self.origin, self.item, self.index = item, item, index
        self.geometry: Geometry = item.geometry
        self.merged = torch.zeros_like(index, dtype=torch.bool)

    def move(self, device: torch.device) -> None:
        """Go on with the layers of another device."""
        self.index, self.merged = self.index.to(device), self.merged.to(device)
        self.origin, self.item = (
            item if item.columns is None else replace(item, columns=item.columns.to(device))
            for item in (self.origin, self.item)
        )


class Session:
    """One attachment of a pruner to a model. Use it as a context manager or call `close()`.

    Attributes:
        model: the model as it was given.
        pruner: the attached pruner.
    """

    def __init__(self, model: nn.Module, pruner: Pruner) -> None:
        self.model, self.pruner = model, pruner
        self.adapter = adapter = adapter_for(model)
        depth = len(adapter.decoder_layers)
        pruner.check_model(adapter.config)
        self._stages = tuple(pruner.layers(depth))
        self._signals = Signals(adapter, pruner.needs, pruner.accumulate(depth), self._stages)
        self._check()
        self._last: PruneReport | None = None
        self._call: dict[str, Any] = {}  # what the call in progress brought, from one hook to the next
        self._course: Course | None = None
        self._step: Step | None = None  # a decode step in progress that takes the short way
        self._step_kwargs: dict[str, Any] = {}
        self._live: list[Live] = []
        self._finite: Tensor | None = None
        self._eviction = Eviction(self.pruner, adapter, self._signals)
        decoder = adapter.decoder_layers
        if not self._stages or any(not 0 <= layer < len(decoder) for layer in self._stages):
            raise ValueError(
                f"{pruner.name} acts before layers {self._stages}, but the language model has {len(decoder)} layers"
            )
        if any(0 < layer < adapter.earliest_stage for layer in self._stages):
            raise ValueError(
                f"{pruner.name} acts before layers {self._stages}, but {adapter.family} adds visual features to its "
                f"first layers: use layers from {adapter.earliest_stage} on, or the boundary."
            )
        self._solved: dict[tuple[int, tuple[int, ...]], Pruner] = {}
        if isinstance(pruner.keep, str):
            self._check_solvable()
        else:
            for layer in self._stages:
                pruner.budget([1], layer, len(decoder))  # a budget that the stages cannot reach is an error now
        self._handles: list[Any] = [
            *self._signals.watch(),
            *adapter.reduction(self.pruner),
            adapter.core.register_forward_pre_hook(self._before_core, with_kwargs=True),
            adapter.language_model.register_forward_pre_hook(self._before_language_model, with_kwargs=True),
            adapter.language_model.register_forward_hook(self._after_language_model, with_kwargs=True),
        ]
        inside = [stage - 1 for stage in self._stages if stage] + list(self._eviction.layers)
        if inside:
            self._handles += [
                layer.register_forward_pre_hook(functools.partial(self._before_layer, number), with_kwargs=True)
                for number, layer in enumerate(decoder)
                if number >= min(inside)
            ]
        if adapter.model is not adapter.core:
            self._handles += [
                adapter.model.register_forward_pre_hook(self._before_model, with_kwargs=True),
                adapter.model.register_forward_hook(self._after_model, with_kwargs=True),
            ]
        _sessions[adapter.core] = weakref.ref(self)

    def _check(self) -> None:
        adapter, pruner = self.adapter, self.pruner
        if (other := _open_session(adapter.core)) is not None:
            raise ValueError(
                f"this model already has a session with {other.pruner}: close() that one first "
                "(vlmprune.session_of(model) gives it)."
            )
        if missing := self._signals.missing:
            raise ValueError(
                f"{pruner.name} needs {', '.join(missing)}, which this {adapter.family} does not give: "
                f"{pruner.otherwise}."
            )
        if pruner.positions not in adapter.positions:
            if pruner.positions != pruner.published_positions:
                raise ValueError(f'{adapter.family} cannot renumber positions: use positions="original".')
            # The method's published choice, where the family leaves none.
            self.pruner = pruner.with_positions("original")

    def _check_solvable(self) -> None:
        """Raise ValueError where no `keep` can be solved for."""
        if self.pruner.encoder_layers(2):
            raise ValueError(
                f"{self.pruner.name} acts inside the vision tower, before the prompt is known: give it a ratio or "
                f"a count, such as vlmprune.flops.solve_keep finds for {self.pruner.keep!r} and prompts of one shape."
            )
        # Whatever the prompt: is it a method whose cost can be told beforehand?
        solve_keep(self.adapter.config, self.pruner, "kv:1.0", text_tokens=1, visual_tokens=256)

    def _methods(self, course: Course) -> list[Pruner]:
        """For each item the pruner that chooses: this session's, or the one that meets its row's share of the cost."""
        keep: Any = self.pruner.keep
        if not isinstance(keep, str):
            return [self.pruner] * len(self._live)
        shown = self._call.get("shown")
        methods = {}
        for row in {each.origin.sample for each in self._live}:
            own = [each for each in self._live if each.origin.sample == row]
            counts = tuple(len(each.geometry) for each in own)
            length = course.length if shown is None else int(shown[row].sum())
            key = (length - sum(counts), counts)
            if key not in self._solved:
                pictures: dict[str, list[Any]] = {"image": [], "video": []}
                for each in own:
                    pictures[each.geometry.kind] += each.geometry.pictures
                solved = solve_keep(
                    self.adapter.config,
                    self.pruner,
                    keep,
                    text_tokens=key[0],
                    visual_tokens=counts,
                    images=pictures["image"],
                    frames=pictures["video"],
                )
                self._solved[key] = replace(self.pruner, keep=solved)
            methods[row] = self._solved[key]
        return [methods[each.origin.sample] for each in self._live]

    @property
    def last(self) -> PruneReport | None:
        """Report of the last prefill, None before the first."""
        self._raise_if_not_finite()
        return self._last

    def close(self) -> None:
        """Detach: the model is exactly as before. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._call, self._course, self._live = [], {}, None, []
        self._step, self._step_kwargs = None, {}
        self._signals.clear()
        self.adapter.forget()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Session({type(self.model).__name__}, {self.pruner}, {'open' if self._handles else 'closed'})"

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if Step.ready(kwargs, "input_ids"):
            return None
        keep = kwargs.get("logits_to_keep", 0)
        self._call = {"logits_to_keep": keep if isinstance(keep, int) else len(keep)}
        if kwargs.get("labels") is None:
            return None
        # The head would compute the loss at the unpruned length: it is computed behind it, on what is left.
        self._call["labels"] = kwargs["labels"]
        return args, {**kwargs, "labels": None}

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self._call:
            return None
        call, self._call = self._call, {}
        course, self._course, self._live = self._course, None, []
        labels = call.get("labels")
        if labels is None:
            return None
        if course is not None and course.columns is not None:
            columns = course.columns.to(labels.device)
            labels = labels.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, -100)
        extra = {key: kwargs[key] for key in ("num_items_in_batch",) if key in kwargs}
        logits = output[0] if isinstance(output, tuple) else output.logits
        loss = module.loss_function(  # type: ignore[operator]
            logits=logits, labels=labels, vocab_size=self.adapter.text_config.vocab_size, **extra
        )
        return (loss, *output) if isinstance(output, tuple) else type(output)(**{**output, "loss": loss})

    def _before_core(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if Step.ready(kwargs, "input_ids"):
            return
        self._raise_if_not_finite()
        arguments = self.adapter.bind(args, kwargs)
        cache, mask = cache_of(arguments), arguments.get("attention_mask")
        raise_if_unfit(cache)
        items = self.adapter.items(arguments)
        self._call = {**self._call, "items": items, "encoded": arguments.get("mm_encoder_outputs") is not None}
        if items and self._signals.wants_question:
            ids = arguments.get("input_ids")
            self._call["ids"] = None if ids is None else ids.cpu()
        if mask is not None and (items or is_pruned(cache)):
            ids = arguments.get("input_ids")
            length = (arguments["inputs_embeds"] if ids is None else ids).shape[1]
            mask = padding_mask(mask, _seen(cache) + length, length)
            self._call["mask"] = mask
            # Looked at here, before the vision tower keeps a GPU busy.
            self._call["shown"] = mask[:, -length:].cpu() if items and mask is not None else None

    def _before_language_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._step, self._step_kwargs = None, {}
        if "items" not in self._call and Step.ready(kwargs, "inputs_embeds"):
            return self._before_step(args, kwargs)
        items: list[Item] = self._call.get("items", [])
        embeds, cache = kwargs.get("inputs_embeds"), cache_of(kwargs)
        self._course, self._live = None, []
        self._signals.clear()
        if embeds is None:
            return None
        seen = _seen(cache)
        self._raise_if_of_another_kind(cache)
        mask, shown = self._call.get("mask"), self._call.get("shown")
        course = self._course = Course(module, kwargs, self.pruner.positions, seen, mask, shown)
        self._live = [Live(item, torch.arange(item.length, device=embeds.device)) for item in items]
        if items or not seen:
            self._last = self._new_report(course)
        if items:
            self._eviction.begin(self._live, seen, embeds.device)
            replies = self._replies(course)
            self._signals.begin(course, embeds, self._call.get("ids"), items, shown, replies)
        if 0 in self._stages:
            if items and self._signals.wants_here:
                positions, _ = course.arguments(0, embeds)
                rotary = self.adapter.rotary(embeds, positions)
                self._signals.here = Entering(0, embeds, rotary, course.key_mask(0))
            embeds = self._stage(0, course, embeds)
        if course.columns is None and course.pruned_layer(0) is None:
            return None
        positions, mask = course.arguments(0, embeds)
        kept = {name: value for name, value in kwargs.items() if name != OLD_CACHE_ARGUMENT}
        return args, {
            **self.adapter.cut(kept, course.columns),
            "inputs_embeds": embeds,
            "position_ids": positions,
            "attention_mask": mask,
            CACHE_ARGUMENT: course.cache,
        }

    def _replies(self, course: Course) -> Tensor | None:
        """bool [B, S], on the CPU: columns that the model is trained to say; None where nothing is.

        Rows that have labels throughout tell prompt and answer apart no more, and have none.
        """
        labels = self._call.get("labels")
        if labels is None:
            return None
        replies = labels.cpu() != -100
        return replies & (course.host_shown() & ~replies).any(1, keepdim=True)

    def _before_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The short way of a decode step: nothing here looks at what a tensor holds, or leaves anything behind."""
        cache, positions = cache_of(kwargs), kwargs.get("position_ids")
        if positions is None:
            embeds = kwargs["inputs_embeds"]
            positions = torch.zeros(len(embeds), 1, dtype=torch.int64, device=embeds.device) + cache.get_seq_length()
        layers = cache.layers
        if not any(isinstance(layer, PrunedLayer) and layer.slots is not None for layer in layers):
            return None
        self._raise_if_of_another_kind(cache)
        self._step = Step(kwargs["attention_mask"], positions, self.pruner.positions)
        first = layers[0]
        if not (isinstance(first, PrunedLayer) and first.slots is not None):
            return None
        positions, mask = self._step.arguments(first)
        return args, {**kwargs, "position_ids": positions, "attention_mask": mask}

    def _before_layer(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._step is not None:
            return self._step_before_layer(number, self._step, args, kwargs)
        course = self._course
        if course is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.device != course.device:  # a model spread over several devices
            course.move(hidden.device)
            self._signals.move(hidden.device)
            for each in self._live:
                each.move(hidden.device)
        course.cache = cache_of(kwargs)
        before = course.columns
        if number > 0 and number in self._stages and self._live:
            if self._signals.wants_here:
                self._signals.here = self._entering(number, hidden, {**kwargs, **course.layer_kwargs})
            hidden = self._stage(number, course, hidden)
        held = course.pruned_layer(number)
        if course.columns is not before or (held is not None and held.group == number):
            positions, mask = course.arguments(number, hidden)
            course.layer_kwargs = {
                "attention_mask": mask,
                "position_embeddings": self.adapter.rotary(hidden, positions),
                "position_ids": positions if kwargs.get("position_ids") is not None else None,
            }
        kwargs = {**kwargs, **course.layer_kwargs}
        if number in self._eviction.layers:
            cos, sin = (part.to(hidden.device) for part in kwargs["position_embeddings"])
            self._eviction.before_layer(number, hidden, (cos, sin), course)
        if number + 1 in self._stages and self._live and self._signals.wants_before:
            self._signals.before = self._entering(number, hidden, kwargs)
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _entering(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> Entering:
        assert self._course is not None
        cos, sin = (part.to(hidden.device) for part in kwargs["position_embeddings"])
        return Entering(layer, hidden, (cos, sin), self._course.key_mask(layer))

    def _step_before_layer(self, number: int, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        held = cache_of(kwargs).layers[number]
        if number and isinstance(held, PrunedLayer) and held.group == number:
            hidden = args[0] if args else kwargs["hidden_states"]
            positions, mask = step.arguments(held)
            if isinstance(mask, dict):
                mask = mask[self.adapter.text_config.layer_types[number]]
            self._step_kwargs = {
                "attention_mask": mask,
                "position_embeddings": self.adapter.rotary(hidden, positions),
                "position_ids": positions if kwargs.get("position_ids") is not None else None,
            }
        return args, {**kwargs, **self._step_kwargs}

    def _stage(self, layer: int, course: Course, rows: Tensor) -> Tensor:
        """Let the pruner choose before `layer`: the rows [B, P, D] that are left, the course and the report updated."""
        live = self._live
        before = [len(each.geometry) for each in live]
        depth = len(self.adapter.decoder_layers)
        methods = self._methods(course)
        budgets = [method.budget([count], layer, depth)[0] for method, count in zip(methods, before)]
        counts = [each.item.length for each in live]
        kept: list[Kept | None] = [None] * len(live)
        chosen: dict[int, list[int]] = {}
        for i, (count, keep) in enumerate(zip(counts, budgets)):
            if keep == 0 and count:
                kept[i] = Kept(torch.empty(0, dtype=torch.int64, device=rows.device))
                if layer == 0:
                    warnings.warn(
                        f"keep={self.pruner.keep} of {count} visual tokens rounds to 0: the whole item is dropped",
                        stacklevel=2,
                    )
            elif count and (keep is None or keep < count):
                chosen.setdefault(id(methods[i]), []).append(i)
        timers = []
        for group in chosen.values():
            picked = [live[i] for i in group]
            own = [rows[e.item.sample, e.item.where] for e in picked]
            tokens = VisualTokens(
                features=pad_sequence(own, batch_first=True) if len(own) > 1 else own[0][None],
                counts=tuple(e.item.length for e in picked),
                index=tuple(e.index for e in picked),
                shapes=tuple(e.geometry for e in picked),
                layer=layer,
                depth=depth,
                signal=functools.partial(self._signals.read, live=picked, everything=live, course=course),
                project=self._signals.project,
            )
            self._check_finite(tokens.features)
            wanted = [budgets[i] for i in group]
            most = torch.tensor(
                [count if keep is None else keep for count, keep in zip(tokens.counts, wanted)], device="cpu"
            )
            stop = _stopwatch(rows.device)
            with choosing():
                selection = methods[group[0]].select(tokens, most)
            for i, made in zip(group, ascending(selection, tokens.counts, wanted)):
                whole = len(made.index) == counts[i] and made.features is None
                kept[i] = None if whole else made
            timers.append(stop())
        if any(choice is not None for choice in kept):
            plan = plan_rows([each.item for each in live], kept, course.host_shown(), rows.device)
            rows = plan.apply(rows)
            course.cut(plan, layer)
            self._signals.cut(plan.gather)
            for each, choice, moved in zip(live, kept, plan.items):
                if choice is not None:
                    merged = each.merged[choice.index]
                    if choice.features is not None:
                        merged = torch.ones_like(merged) if choice.merged is None else merged | choice.merged
                    each.index, each.merged = each.index[choice.index], merged
                each.item = moved
        self._signals.passed()
        if self._last is not None and live:
            self._last.record(layer, [(each.index, each.merged) for each in live], course, timers)
        return rows

    def _after_language_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._step is not None:
            self._step, self._step_kwargs = None, {}
            return
        if self._live:
            self._signals.clear()
            # Without a cache, what generate() encoded comes again with the next token.
            if not (self._call.get("encoded") and self._course is not None and not self._course.use_cache):
                self.adapter.forget()
        cache = cache_of(kwargs) or getattr(output, CACHE_ARGUMENT, None)
        if self._eviction.layers and cache is not None and self._course is not None:
            kept = self._eviction.after_step(cache, self._course, self._live)
            if self._last is not None:
                self._last.record_cache(kept)
        if self._last is not None and not self._last.kv_bytes and cache is not None:
            self._last.kv_bytes = kv_bytes(cache)
            self._last.kv_bytes_unpruned = unpruned_kv_bytes(cache, self._last.seen + self._last.length)
        if self.adapter.model is self.adapter.core:
            self._call, self._course, self._live = {}, None, []

    def _new_report(self, course: Course) -> PruneReport:
        keep = self._call.get("logits_to_keep", 0)
        depth = len(self.adapter.decoder_layers)
        held = [int(course.cache.get_mask_sizes(0, layer)[0]) if course.seen else 0 for layer in range(depth)]
        return PruneReport(
            pruner=self.pruner,
            items=[
                ItemReport(
                    sample=each.item.sample,
                    start=course.seen + each.item.start,
                    tokens_before=each.item.length,
                    geometry=each.geometry,
                    columns=None if each.item.columns is None else course.seen + each.item.columns,
                )
                for each in self._live
            ],
            batch=course.batch,
            length=course.length,
            layer_tokens=[course.length] * depth,
            cached_tokens=held,
            seen=course.seen,
            logits_to_keep=keep,
            encoder_rows={
                kind: left["encoder_rows"] for kind, left in self.adapter.tower.seen.items() if "encoder_rows" in left
            },
            config=self.adapter.config,
        )

    def _raise_if_of_another_kind(self, cache: Any) -> None:
        if any(self._stages) or self._eviction.layers:
            return
        if any(getattr(layer, "group", 0) for layer in getattr(cache, "layers", ())):
            raise ValueError("this cache was pruned inside the decoder: go on with it in a session of such a method")

    def _check_finite(self, features: Tensor) -> None:
        # Looking costs a synchronisation on a GPU: there the answer is looked at with the next call or report.
        # A sum is finite only if all it adds up is, and far cheaper than a look at every element.
        self._finite = features.sum(dtype=torch.promote_types(features.dtype, torch.float32)).isfinite()
        if features.device.type == "cpu":
            self._raise_if_not_finite()

    def _raise_if_not_finite(self) -> None:
        finite, self._finite = self._finite, None
        if finite is not None and not bool(finite):
            raise ValueError("visual features contain NaN or infinity: check the image, the dtype and the vision tower")


def _seen(cache: Any) -> int:
    return int(cache.get_seq_length()) if cache is not None else 0


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
