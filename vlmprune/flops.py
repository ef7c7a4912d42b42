"""What prefill and decoding cost: FLOPs and KV-cache bytes in closed form, from a config alone.

One multiply-add is 2 FLOPs. Counted are the convolution and the matrix products of the vision tower, the projector,
the decoder layers and the language-model head, as `torch.utils.flop_counter.FlopCounterMode` counts them: attention is
the full queries x keys product, although a causal kernel may skip nearly half of it. Not counted are biases, norms,
softmax, activations, rotary embeddings and embedding look-ups. The pruner's own selection is counted apart:
`vlmprune.selection_flops`. Papers count otherwise: `vlmprune.conventions`.

Lengths are physical: a padded row costs as much as a full one. Every layer has its own length, because a pruner that
acts inside the decoder leaves later layers shorter.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from vlmprune.contract import TARGETS, Pruner, budget, parse_target
from vlmprune.conventions import COUNTER, find_convention
from vlmprune.registry import create_pruner
from vlmprune.selection_flops import cache_flops, selection_flops
from vlmprune.vision_flops import FAMILIES, TOWERS, Grid, Rows, attention, feature_depth, linear, tower_rows

Counts = float | Sequence[float]
"""Tokens in every decoder layer, or in each; whole numbers except where a paper's convention takes a mean."""

Pictures = int | Sequence[Grid]
"""What passes the vision tower: patch grids (rows, columns), or a number of pictures of the config's size."""


@dataclass(frozen=True)
class LayerFlops:
    """FLOPs of one decoder layer: q/k/v/o projections, the two attention products, the gated MLP."""

    projections: int
    attention: int
    mlp: int

    @property
    def total(self) -> int:
        return self.projections + self.attention + self.mlp


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass by module; `layers` has one entry per decoder layer."""

    vision_tower: int
    projector: int
    layers: tuple[LayerFlops, ...]
    lm_head: int

    @property
    def language_model(self) -> int:
        """All decoder layers, without the head."""
        return sum(layer.total for layer in self.layers)

    @property
    def total(self) -> int:
        return self.vision_tower + self.projector + self.language_model + self.lm_head

    def by_module(self) -> dict[str, int]:
        """Flat view for tables; the values add up to `total`."""
        return {
            "vision_tower": self.vision_tower,
            "projector": self.projector,
            "language_model.projections": sum(layer.projections for layer in self.layers),
            "language_model.attention": sum(layer.attention for layer in self.layers),
            "language_model.mlp": sum(layer.mlp for layer in self.layers),
            "lm_head": self.lm_head,
        }


@dataclass(frozen=True)
class FlopsEstimate:
    """Cost with all visual tokens (`*_full`) and with those a pruner keeps (`*_pruned`).

    Attributes:
        tokens_full, tokens_pruned: sequence length in the last decoder layer, text included.
        prefill_full, prefill_pruned: FLOPs up to the first new token.
        decode_full, decode_pruned: FLOPs of the decode steps behind it: by default the first, else all `new_tokens`.
        kv_bytes_full, kv_bytes_pruned: bytes of the KV cache at the end of the prefill.
        kv_bytes_end_full, kv_bytes_end_pruned: bytes of it after those decode steps.
        selection: FLOPs of the matrix products that run for the pruner alone: signals that it reads, with all of the
            text behind the images, and its choice, as on a CPU. None where the method does not declare its own. In no
            other figure; `vlmprune.selection.counting_selection` counts those of a run.
    """

    tokens_full: float
    tokens_pruned: float
    prefill_full: Flops
    prefill_pruned: Flops
    decode_full: Flops
    decode_pruned: Flops
    kv_bytes_full: int
    kv_bytes_pruned: int
    kv_bytes_end_full: int
    kv_bytes_end_pruned: int
    selection: int | None = 0

    @property
    def full(self) -> int:
        """FLOPs of the unpruned prefill."""
        return self.prefill_full.total

    @property
    def pruned(self) -> int:
        """FLOPs of the pruned prefill."""
        return self.prefill_pruned.total

    @property
    def ratio(self) -> float:
        """`pruned / full`: the whole prefill, vision tower included (unless the convention leaves it out)."""
        return self.pruned / self.full

    @property
    def decoder_ratio(self) -> float:
        """The same of the decoder layers alone."""
        return self.prefill_pruned.language_model / self.prefill_full.language_model

    @property
    def kv_ratio(self) -> float:
        """KV cache at the end of the prefill, pruned to full."""
        return self.kv_bytes_pruned / self.kv_bytes_full

    def __str__(self) -> str:
        selection = "not counted" if self.selection is None else format_flops(self.selection)
        selection = "" if self.selection == 0 else f", selection {selection}"
        return (
            f"prefill {format_flops(self.full)} -> {format_flops(self.pruned)} ({100 * self.ratio:.1f} %), decode step "
            f"{format_flops(self.decode_full.total)} -> {format_flops(self.decode_pruned.total)}, KV cache "
            f"{format_bytes(self.kv_bytes_full)} -> {format_bytes(self.kv_bytes_pruned)}{selection}"
        )


def estimate_flops(
    model_or_config: Any,
    *,
    text_tokens: float,
    visual_tokens: int | Sequence[int],
    pruner: Pruner | str | None = None,
    images: Pictures | None = None,
    frames: Pictures = 0,
    batch: int = 1,
    new_tokens: int = 1,
    logits_tokens: int = 1,
    element_bytes: int | None = None,
    convention: str = COUNTER,
) -> FlopsEstimate:
    """Estimate one prompt's prefill, its decoding and its KV cache, with and without `pruner`.

    Args:
        model_or_config: a model (also PEFT-wrapped, also on the meta device), its config, or the path of a
            `config.json` or of a folder with one: weights are not needed.
        text_tokens: tokens of the prompt that are not visual, per row.
        visual_tokens: visual tokens of the prompt's image, or one count per item; 0 for a prompt without image.
        pruner: a method or its name; None prunes nothing. Of a method that decides for each image how much it keeps
            (its `budget` is None), what its `keep` asks for on average is taken. Methods that merge inside the vision
            tower leave as many tokens as its pictures have rows left, and what LLaVA-NeXT cuts away at its borders is
            taken to hold its share of them.
        images: pictures that pass the vision tower, per row: patch grids, or a number of those of the config's size. By
            default as many as an item's count tells, at least; where images come in any size or lose tokens before the
            boundary (Qwen-VL's windows, LLaVA-NeXT's padding) only the grids are exact. With `frames` given, 0.
        frames: the same of videos: frames, for Qwen-VL `temporal_patch_size` of them together.
        batch: rows, all alike.
        new_tokens: decode steps that `decode_*` and `kv_bytes_end_*` cover.
        logits_tokens: positions per row that pass the head; `generate()` asks for the last one only.
        element_bytes: bytes of one KV-cache element; by default those of the model's or config's dtype (4 if unset).
        convention: "counter" counts what torch's FlopCounterMode counts. Or, to compare with a paper's figures, the
            decoder layers as it counts them, where `text_tokens` may be a mean:
            "divprune": its ratios, 15.63 % (LLaVA-1.5-7B) and 15.71 % (13B) at keep 0.098, come out with
            text_tokens=43.4, and its 14.10 % for 8 x 144 video tokens at 0.1 with 65.9 (it does not print lengths).
            "globalcom2": with text_tokens=0 its TFLOPs for LLaVA-NeXT-7B and 13B come out at the five ratios, to the
            digit but for one (79.94 where 80.0 is printed).
            "transprune": with text_tokens=0 its 3.82 and 20.8 TFLOPs for 576 and 2880 tokens, and the 40.8 % and 40.0 %
            of its "High" schedule (give the layers' lengths to `prefill_flops`).

    Raises:
        ValueError: for an unsupported model or convention, negative counts, or a pruner of which only a run can tell.
    """
    counts = [visual_tokens] if isinstance(visual_tokens, int) else list(visual_tokens)
    if text_tokens < 0 or new_tokens < 0 or any(count < 0 for count in counts):
        raise ValueError(
            f"token counts must not be negative, got {text_tokens=}, {new_tokens=}, visual_tokens={counts}."
        )
    if convention == COUNTER and text_tokens != int(text_tokens):
        raise ValueError(f'text_tokens must be a whole number under convention="{COUNTER}", got {text_tokens}.')
    counts = [count for count in counts if count]
    config = resolve_config(model_or_config)
    if isinstance(pruner, str):
        pruner = create_pruner(pruner)
    if images is None:
        videos = bool(frames)
        images = [] if videos else [g for count in counts for g in FAMILIES[config.model_type].pictures(config, count)]
    images, frames = _grids(config, images), _grids(config, frames)
    if element_bytes is None:
        element_bytes = _element_bytes(model_or_config, config)

    def cost(
        tokens: list[float], held: list[float], pruned_from: int | None, rows: Rows
    ) -> tuple[Flops, Flops, int, int]:
        ends = [count + new_tokens for count in held]
        cache: Any = {"batch": batch, "element_bytes": element_bytes, "pruned_from": pruned_from}
        return (
            prefill_flops(
                config,
                layer_tokens=tokens,
                images=images * batch,
                frames=frames * batch,
                image_rows=rows,
                frame_rows=rows,
                batch=batch,
                logits_tokens=logits_tokens,
                convention=convention,
            ),
            decode_flops(
                config,
                layer_tokens=[count + 1 for count in held],
                batch=batch,
                steps=new_tokens,
                pruned_from=pruned_from,
                convention=convention,
            ),
            kv_cache_bytes(config, layer_tokens=held, **cache),
            kv_cache_bytes(config, layer_tokens=ends, **cache),
        )

    full: list[float] = [text_tokens + sum(counts)] * config.text_config.num_hidden_layers
    way = _Way(full, full)
    if pruner is not None and counts:
        way = _way(pruner, config, text_tokens, counts, images, frames)
    prefill_full, decode_full, kv_full, end_full = cost(full, full, None, None)
    prefill, decode, kv, end = cost(way.tokens, way.held, way.pruned_from, way.rows)
    selection = None if way.selection is None else batch * way.selection
    return FlopsEstimate(
        full[-1], way.tokens[-1], prefill_full, prefill, decode_full, decode, kv_full, kv, end_full, end, selection
    )


class _Way(NamedTuple):
    """One row's way through a model.

    Attributes:
        tokens: positions that each decoder layer computes.
        held: positions that each layer's cache holds behind the prefill.
        pruned_from: first decoder layer with a pruned cache.
        rows: of a picture in each layer of the vision tower; None: all patches.
        selection: FLOPs of choosing; None where the method does not declare its own.
    """

    tokens: list[float]
    held: list[float]
    pruned_from: int | None = None
    rows: Rows = None
    selection: int | None = 0


def _way(
    pruner: Pruner,
    config: Any,
    text_tokens: float,
    counts: Sequence[int],
    images: Sequence[Grid],
    frames: Sequence[Grid],
) -> _Way:
    """The way of `text_tokens` and of items of `counts` tokens under a pruner, stage by stage."""
    depth, heads = config.text_config.num_hidden_layers, _heads(config.text_config)
    grids, video = [*images, *frames], bool(frames)
    rows, inside = _encoder(pruner, config, grids, video, sum(counts))
    stages, left, by_layer = pruner.layers(depth), list(counts), [list(counts)] * depth
    pruned_from: int | None = None
    selection: int | None = 0
    for stage in stages:
        reached = left
        left = [min(pair) for pair in zip(left, _left(pruner, counts, stage, depth, inside))]
        by_layer[stage:] = [left] * (depth - stage)
        choosing = selection_flops(
            config,
            pruner,
            stage,
            list(zip(counts, reached, left)),
            heads=heads,
            text=math.ceil(text_tokens),
            grids=grids,
            video=video,
            rows=rows,
            encoded=stage != stages[0],
        )
        selection = None if selection is None or choosing is None else selection + choosing
        if left != reached and pruned_from is None:
            pruned_from = stage
    tokens = [text_tokens + sum(own) for own in by_layer]
    cut = pruner.cache_layers(depth)
    for layer in cut:
        cached = (pruner.cache_budget(count, now, layer, depth) for count, now in zip(counts, by_layer[layer]))
        by_layer[layer] = list(cached)
    if selection is not None and cut:
        selection += cache_flops(pruner, config, heads, [math.ceil(count) for count in tokens], depth)
    return _Way(
        tokens,
        held=[text_tokens + sum(own) for own in by_layer],
        pruned_from=min((each for each in (pruned_from, *cut) if each is not None), default=None),
        rows=rows,
        selection=selection,
    )


def _grids(config: Any, pictures: Pictures) -> list[Grid]:
    if isinstance(pictures, int):
        return FAMILIES[config.model_type].pictures(config, 1)[:1] * pictures
    return list(pictures)


def _encoder(pruner: Pruner, config: Any, grids: Sequence[Grid], video: bool, tokens: int) -> tuple[Rows, float | None]:
    """Rows in each layer of the tower under a method that merges there, and the share of `tokens` that this leaves.

    Raises:
        ValueError: a family whose tower cannot be shortened, or a method of which only a run can tell.
    """
    if not pruner.encoder_layers(2):
        return None, None
    if not (FAMILIES[config.model_type].shortens and isinstance(config.vision_feature_layer, int)):
        raise ValueError(
            f"{pruner.name} merges inside the vision tower, which {config.model_type} does not allow: use a method "
            'that works behind it, or where="boundary" where the method has that.'
        )
    depth = feature_depth(config)
    count = grids[0][0] * grids[0][1]
    pooled = video and hasattr(config, "spatial_pool_stride")
    if pooled or len(set(grids)) > 1 or pruner.encoder_rows(count, 0, depth) is None:
        raise ValueError(
            f"of {pruner.name} inside this vision tower only a run can tell the cost: read session.last.flops."
        )
    rows = tower_rows(config, grids[0], pruner.encoder_rows, pruner.encoder_layers(depth))
    behind = [pruner.encoder_rows(count, layer, depth) for layer in pruner.encoder_layers(depth)]
    # Line breaks, which are tokens but no patches, go.
    return rows, min(left for left in behind if left is not None) / max(count, tokens / len(grids))


_SHARES = {
    "flops": lambda estimate: estimate.ratio,
    "decoder": lambda estimate: estimate.decoder_ratio,
    "kv": lambda estimate: estimate.kv_ratio,
}


def solve_keep(
    model_or_config: Any,
    pruner: Pruner | str,
    target: str,
    *,
    text_tokens: int,
    visual_tokens: int | Sequence[int],
    images: Pictures | None = None,
    frames: Pictures = 0,
) -> float:
    """The largest keep ratio with which `pruner` costs no more than `target`, such as "flops:0.3" or "kv:0.2".

    Every item keeps at least one token. Costs are those of `estimate_flops`, of which this is the inverse; the pruner's
    other fields stay as they are. The answer holds for prompts of that shape, and is found by bisection to 1e-9.

    Args:
        model_or_config, text_tokens, visual_tokens, images, frames: see `estimate_flops`.
        pruner: a method or its name; its own `keep` is ignored.
        target: share of the unpruned cost: "flops:" of the prefill with the vision tower, "decoder:" of the prefill's
            decoder layers, "kv:" of the KV cache after the prefill.

    Raises:
        ValueError: a target that cannot be read, a prompt without visual tokens, or a target below what the method
            costs at its smallest (the message gives that share).
    """
    name, share = parse_target(target)
    if isinstance(pruner, str):
        pruner = create_pruner(pruner)
    counts = [count for count in ([visual_tokens] if isinstance(visual_tokens, int) else visual_tokens) if count]
    if not counts:
        raise ValueError(f"there is nothing to solve keep={target!r} for: the prompt has no visual tokens.")
    config, method, meaning, value = resolve_config(model_or_config), pruner, TARGETS[name], _SHARES[name]

    def cost(keep: float) -> float:
        estimate = estimate_flops(
            config,
            text_tokens=text_tokens,
            visual_tokens=counts,
            pruner=replace(method, keep=keep),
            images=images,
            frames=frames,
        )
        return float(value(estimate))

    def possible(keep: float) -> bool:
        try:
            cost(keep)
        except ValueError:
            return False
        return True

    cost(1.0)  # what is wrong whatever the budget shows here
    least = 1 / min(counts)
    if not possible(least):  # methods inside the decoder have a floor of their own
        least = _boundary(least, 1.0, possible)[1]
        if least > 1 - 1e-6:
            cost(1 - 1e-6)  # none is possible: why, the error says
    if cost(least) > share:
        raise ValueError(
            f"keep={target!r} cannot be met: keep={least:.3g}, the least that {method.name} can keep here, costs "
            f"{cost(least):.3g} of the unpruned {meaning}; ask for more."
        )
    if cost(1.0) <= share:
        return 1.0
    return _boundary(least, 1.0, lambda keep: cost(keep) > share)[0]


def _boundary(low: float, high: float, beyond: Callable[[float], bool]) -> tuple[float, float]:
    """Where `beyond` turns true between `low` (where it is false) and `high`, from both sides."""
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (low, middle) if beyond(middle) else (middle, high)
    return low, high


def _left(pruner: Pruner, counts: Sequence[int], stage: int, depth: int, inside: float | None) -> list[int]:
    """Tokens of every item behind a stage; `inside` is the share that the tower's stage left."""
    budgets = list(pruner.budget(counts, stage, depth))
    if stage == 0 and inside is not None:
        return [round(count * inside) for count in counts]
    if None in budgets and (pruner.keep is None or tuple(pruner.layers(depth)) != (0,)):
        raise ValueError(
            f"{pruner.name} decides for each image how much it keeps in each layer, so only a run can tell its cost: "
            "read session.last.flops."
        )
    return [budget(count, pruner.keep) if left is None else left for count, left in zip(counts, budgets)]


def prefill_flops(
    model_or_config: Any,
    *,
    layer_tokens: Counts,
    images: Pictures = 0,
    frames: Pictures = 0,
    batch: int = 1,
    logits_tokens: int = 1,
    cached_tokens: Counts = 0,
    image_rows: Rows = None,
    frame_rows: Rows = None,
    convention: str = COUNTER,
) -> Flops:
    """FLOPs of one forward pass over a batch.

    Args:
        model_or_config: see `estimate_flops`.
        layer_tokens: positions per row that each decoder layer computes, padding included; an int means all layers.
        images: images and tiles that pass the vision tower, over the whole batch.
        frames: pictures of videos that do.
        batch: rows.
        logits_tokens: positions per row that pass the head: 1 in `generate()`, all of them in a plain `forward()`.
        cached_tokens: keys per row that each layer already holds (a second turn, a decode step).
        image_rows, frame_rows: rows of a picture, CLS included, in each layer of the vision tower, where a method
            merges between them (CLIP and SigLIP); None: all patches.
        convention: see `estimate_flops`; all but "counter" leave the vision side and the head out.

    Raises:
        ValueError: for an unsupported model, or counts that do not match its number of layers.
    """
    config, counting = resolve_config(model_or_config), find_convention(convention)
    text = config.text_config
    queries = _per_layer(layer_tokens, text, "layer_tokens")
    cached = _per_layer(cached_tokens, text, "cached_tokens")
    if counting is not None:
        layers = (LayerFlops(*counting.layer(text, q, q + past, batch)) for q, past in zip(queries, cached))
        return Flops(0, 0, tuple(layers), 0)
    of_images, of_frames = _vision(config, images, False, image_rows), _vision(config, frames, True, frame_rows)
    return Flops(
        vision_tower=of_images[0] + of_frames[0],
        projector=of_images[1] + of_frames[1],
        layers=tuple(
            _decoder_layer(text, layer, q, q + past, batch)
            for layer, (q, past) in enumerate(zip(queries, cached, strict=True))
        ),
        lm_head=linear(batch * logits_tokens, text.hidden_size, text.vocab_size),
    )


def decode_flops(
    model_or_config: Any,
    *,
    layer_tokens: Counts,
    batch: int = 1,
    steps: int = 1,
    pruned_from: int | None = None,
    convention: str = COUNTER,
) -> Flops:
    """FLOPs of `steps` decode steps, the first of which sees `layer_tokens` keys per row in each layer, its own among
    them, and each further one a key more, up to a sliding window's size (see `kv_cache_bytes` for `pruned_from`).
    """
    config = resolve_config(model_or_config)
    keys = _per_layer(layer_tokens, config.text_config, "layer_tokens")
    if any(count < 1 for count in keys):
        raise ValueError(
            f"a decode step sees at least itself: layer_tokens must not be negative or 0, got {min(keys)}."
        )
    windows = _windows(config, pruned_from)

    def step(number: int) -> Flops:
        cached = [_within(count - 1 + number, window) for count, window in zip(keys, windows)]
        return prefill_flops(config, layer_tokens=1, cached_tokens=cached, batch=batch, convention=convention)

    # Cost is linear in the keys, but for windows that fill up on the way.
    full = {math.ceil(window - count) for count, window in zip(keys, windows) if window and 0 < window - count < steps}
    bends = sorted({0, steps, *full})
    parts = [(step(start), step(max(stop - 1, start)), stop - start) for start, stop in itertools.pairwise(bends)]

    def total(of: Any) -> int:
        return sum((of(first) + of(last)) * count // 2 for first, last, count in parts)

    return Flops(
        vision_tower=0,
        projector=0,
        layers=tuple(
            LayerFlops(
                total(lambda flops, i=i: flops.layers[i].projections),
                total(lambda flops, i=i: flops.layers[i].attention),
                total(lambda flops, i=i: flops.layers[i].mlp),
            )
            for i in range(len(keys))
        ),
        lm_head=total(lambda flops: flops.lm_head),
    )


def kv_cache_bytes(
    model_or_config: Any,
    *,
    layer_tokens: Counts,
    batch: int = 1,
    element_bytes: int | None = None,
    pruned_from: int | None = None,
) -> int:
    """Bytes of keys and values of a DynamicCache behind `layer_tokens` positions per row in each decoder layer.

    A layer with a sliding window of W keeps the last W - 1. From decoder layer `pruned_from` on the cache is pruned:
    there a layer keeps all of its positions, for the window counts columns that are gone, too.
    """
    config = resolve_config(model_or_config)
    if element_bytes is None:
        element_bytes = _element_bytes(model_or_config, config)
    text = config.text_config
    _, kv_heads, head_dim = _heads(text)
    counts = _per_layer(layer_tokens, text, "layer_tokens")
    positions = sum(_within(count, window) for count, window in zip(counts, _windows(config, pruned_from)))
    return round(2 * batch * kv_heads * head_dim * positions * element_bytes)


def _windows(config: Any, pruned_from: int | None) -> list[int | None]:
    """Size of each decoder layer's sliding window, None where its cache keeps everything."""
    text = config.text_config
    depth, size = text.num_hidden_layers, getattr(text, "sliding_window", None)
    types = getattr(text, "layer_types", None) or ["sliding_attention"] * depth
    return [
        size if kind == "sliding_attention" and (pruned_from is None or layer < pruned_from) else None
        for layer, kind in enumerate(types)
    ]


def _within(count: float, window: int | None) -> float:
    """Positions, of `count`, that a cache layer keeps."""
    return count if window is None else min(count, window - 1)


def resolve_config(model_or_config: Any) -> Any:
    """The config of a supported model, of its PEFT wrapper, of a `config.json` or its folder, or the config itself.

    Raises:
        ValueError: a model type without a FLOPs model, or a path without a config that transformers knows.
    """
    if isinstance(model_or_config, (str, os.PathLike)):
        model_or_config = _read_config(Path(model_or_config))
    model = model_or_config.get_base_model() if hasattr(model_or_config, "get_base_model") else model_or_config
    config = getattr(model, "config", model)
    family = getattr(config, "model_type", type(config).__name__)
    if family not in FAMILIES:
        raise ValueError(f"No FLOPs model for '{family}'; supported model types: {', '.join(sorted(FAMILIES))}.")
    vision, text = config.vision_config.model_type, config.text_config.model_type
    if vision not in TOWERS:
        raise ValueError(f"No FLOPs model for the vision tower '{vision}'; supported: {', '.join(sorted(TOWERS))}.")
    if text not in _DECODERS:
        raise ValueError(f"No FLOPs model for the language model '{text}'; supported: {', '.join(sorted(_DECODERS))}.")
    return config


def _read_config(path: Path) -> Any:
    from transformers import AutoConfig  # imported here: a live config needs nothing

    if not (path / "config.json").is_file() and not path.is_file():
        raise ValueError(f"no config.json at '{path}': give the file, or the folder of a checkpoint.")
    try:
        return AutoConfig.from_pretrained(path)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"transformers cannot read '{path}' as the config of a model it has: {str(error).strip().splitlines()[0]}"
        ) from error


def format_flops(value: float) -> str:
    """`1234567890` -> `'1.23 GFLOPs'`."""
    return _scaled(value, 1000, ("FLOPs", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs", "PFLOPs"))


def format_bytes(value: float) -> str:
    """`123456` -> `'121 KiB'`."""
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if abs(value) < 999.5:
            return f"{value:.3g} {unit}"
        value /= base
    return f"{value:.3g} {units[-1]}"


def _vision(config: Any, pictures: Pictures, video: bool, rows: Rows) -> tuple[int, int]:
    """FLOPs of (tower, projector) over all these pictures."""
    family, tower, projector = FAMILIES[config.model_type], 0, 0
    for grid, times in Counter(_grids(config, pictures)).items():
        each = family.cost(config, grid, video, rows)
        tower, projector = tower + times * each[0], projector + times * each[1]
    return tower, projector


def _decoder_layer(text: Any, layer: int, queries: float, keys: float, batch: int) -> LayerFlops:
    heads, kv_heads, head_dim = _heads(text)
    queries, keys = int(queries), int(keys)
    rows, width = batch * queries, text.hidden_size
    mlp = 3 * linear(rows, width, text.intermediate_size)
    experts = getattr(text, "num_experts", 0)
    if experts and layer not in text.mlp_only_layers and (layer + 1) % text.decoder_sparse_step == 0:
        mlp = linear(rows, width, experts)
        mlp += 3 * linear(rows * text.num_experts_per_tok, width, text.moe_intermediate_size)
    return LayerFlops(
        projections=2 * linear(rows, width, heads * head_dim) + 2 * linear(rows, width, kv_heads * head_dim),
        attention=attention(batch, heads, head_dim, queries, keys),
        mlp=mlp,
    )


# Softmax attention with GQA and a gated MLP (or experts that are one), all layers.
_DECODERS = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text"}
)


def _heads(text: Any) -> tuple[int, int, int]:
    """(query heads, key-value heads, head size)."""
    heads = text.num_attention_heads
    return (
        heads,
        getattr(text, "num_key_value_heads", None) or heads,
        getattr(text, "head_dim", None) or text.hidden_size // heads,
    )


def _per_layer(counts: Counts, text: Any, name: str) -> list[float]:
    layers = text.num_hidden_layers
    counts = [counts] * layers if isinstance(counts, (int, float)) else list(counts)
    if len(counts) != layers:
        raise ValueError(f"{name} has {len(counts)} entries, but the language model has {layers} layers.")
    if any(count < 0 for count in counts):
        raise ValueError(f"{name} must not be negative, got {min(counts)}.")
    return counts


def _element_bytes(model_or_config: Any, config: Any) -> int:
    dtype = getattr(model_or_config, "dtype", None) or getattr(config, "dtype", None)
    return getattr(dtype, "itemsize", 4)
