"""What a prefill and a decode step cost: FLOPs and KV-cache bytes in closed form, from a config alone.

One multiply-add is 2 FLOPs. Counted are the convolution and the matrix products of the vision tower, the projector,
the decoder layers and the language-model head, as `torch.utils.flop_counter.FlopCounterMode` counts them: attention is
the full queries x keys product, although a causal kernel may skip nearly half of it. Not counted are biases, norms,
softmax, activations, rotary embeddings, embedding look-ups and the pruner's own selection.

Lengths are physical: a padded row costs as much as a full one. Every layer has its own length, because a pruner that
acts inside the decoder leaves later layers shorter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmprune.contract import Pruner
from vlmprune.registry import create_pruner
from vlmprune.vision_flops import FAMILIES, TOWERS, Grid, attention, linear

Counts = int | Sequence[int]
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

    `tokens_*` is the sequence length in the last decoder layer, text included; `decode_*` is the first decode step
    after that prefill; `kv_bytes_*` is the KV cache at the end of the prefill.
    """

    tokens_full: int
    tokens_pruned: int
    prefill_full: Flops
    prefill_pruned: Flops
    decode_full: Flops
    decode_pruned: Flops
    kv_bytes_full: int
    kv_bytes_pruned: int

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
        """`pruned / full`, vision tower included."""
        return self.pruned / self.full

    def __str__(self) -> str:
        return (
            f"prefill {format_flops(self.full)} -> {format_flops(self.pruned)} ({100 * self.ratio:.1f} %), decode step "
            f"{format_flops(self.decode_full.total)} -> {format_flops(self.decode_pruned.total)}, KV cache "
            f"{format_bytes(self.kv_bytes_full)} -> {format_bytes(self.kv_bytes_pruned)}"
        )


def estimate_flops(
    model_or_config: Any,
    *,
    text_tokens: int,
    visual_tokens: Counts,
    pruner: Pruner | str | None = None,
    images: Pictures | None = None,
    batch: int = 1,
    logits_tokens: int = 1,
    element_bytes: int | None = None,
) -> FlopsEstimate:
    """Estimate one prompt's prefill, its first decode step and its KV cache, with and without `pruner`.

    Args:
        model_or_config: a model (also PEFT-wrapped, also on the meta device) or its config.
        text_tokens: tokens of the prompt that are not visual, per row.
        visual_tokens: visual tokens of the prompt's image, or one count per item; 0 for a prompt without image.
        pruner: a method or its name; None prunes nothing.
        images: pictures that pass the vision tower, per row: patch grids, or a number of those of the config's size. By
            default as many as an item's count tells, at least; where images come in any size or lose tokens before the
            boundary (Qwen-VL's windows, LLaVA-NeXT's padding) only the grids are exact.
        batch: rows, all alike.
        logits_tokens: positions per row that pass the head; `generate()` asks for the last one only.
        element_bytes: bytes of one KV-cache element; by default those of the model's or config's dtype (4 if unset).

    Raises:
        ValueError: for an unsupported model or negative counts.
    """
    counts = [visual_tokens] if isinstance(visual_tokens, int) else list(visual_tokens)
    if text_tokens < 0 or any(count < 0 for count in counts):
        raise ValueError(f"token counts must not be negative, got text_tokens={text_tokens}, visual_tokens={counts}.")
    counts = [count for count in counts if count]
    config = resolve_config(model_or_config)
    if isinstance(pruner, str):
        pruner = create_pruner(pruner)
    if images is None:
        images = [grid for count in counts for grid in FAMILIES[config.model_type].pictures(config, count)]
    images = images * batch if isinstance(images, int) else list(images) * batch
    if element_bytes is None:
        element_bytes = _element_bytes(model_or_config, config)

    def cost(tokens: list[int]) -> tuple[Flops, Flops, int]:
        return (
            prefill_flops(
                config,
                layer_tokens=tokens,
                images=images,
                batch=batch,
                logits_tokens=logits_tokens,
            ),
            decode_flops(config, layer_tokens=[count + 1 for count in tokens], batch=batch),
            kv_cache_bytes(config, layer_tokens=tokens, batch=batch, element_bytes=element_bytes),
        )

    depth = config.text_config.num_hidden_layers
    full = [text_tokens + sum(counts)] * depth
    pruned = list(full)
    if pruner is not None and counts:
        for stage in pruner.layers(depth):
            pruned[stage:] = [text_tokens + sum(pruner.budget(counts, stage, depth))] * (depth - stage)
    (prefill_full, decode_full, kv_full), (prefill, decode, kv) = cost(full), cost(pruned)
    return FlopsEstimate(full[-1], pruned[-1], prefill_full, prefill, decode_full, decode, kv_full, kv)


def prefill_flops(
    model_or_config: Any,
    *,
    layer_tokens: Counts,
    images: Pictures = 0,
    frames: Pictures = 0,
    batch: int = 1,
    logits_tokens: int = 1,
    cached_tokens: Counts = 0,
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

    Raises:
        ValueError: for an unsupported model, or counts that do not match its number of layers.
    """
    config = resolve_config(model_or_config)
    text = config.text_config
    of_images, of_frames = _vision(config, images, False), _vision(config, frames, True)
    queries = _per_layer(layer_tokens, text, "layer_tokens")
    cached = _per_layer(cached_tokens, text, "cached_tokens")
    return Flops(
        vision_tower=of_images[0] + of_frames[0],
        projector=of_images[1] + of_frames[1],
        layers=tuple(
            _decoder_layer(text, layer, q, q + past, batch)
            for layer, (q, past) in enumerate(zip(queries, cached, strict=True))
        ),
        lm_head=linear(batch * logits_tokens, text.hidden_size, text.vocab_size),
    )


def decode_flops(model_or_config: Any, *, layer_tokens: Counts, batch: int = 1) -> Flops:
    """FLOPs of one decode step whose query sees `layer_tokens` keys per row in each layer, its own among them."""
    config = resolve_config(model_or_config)
    keys = _per_layer(layer_tokens, config.text_config, "layer_tokens")
    return prefill_flops(config, layer_tokens=1, cached_tokens=[count - 1 for count in keys], batch=batch)


def kv_cache_bytes(
    model_or_config: Any, *, layer_tokens: Counts, batch: int = 1, element_bytes: int | None = None
) -> int:
    """Bytes of keys and values when each decoder layer holds `layer_tokens` positions per row."""
    config = resolve_config(model_or_config)
    if element_bytes is None:
        element_bytes = _element_bytes(model_or_config, config)
    text = config.text_config
    _, kv_heads, head_dim = _heads(text)
    return 2 * batch * kv_heads * head_dim * sum(_per_layer(layer_tokens, text, "layer_tokens")) * element_bytes


def resolve_config(model_or_config: Any) -> Any:
    """The config of a supported model, of its PEFT wrapper, or the config itself; `ValueError` for any other."""
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


def _vision(config: Any, pictures: Pictures, video: bool) -> tuple[int, int]:
    """FLOPs of (tower, projector) over all these pictures."""
    family, tower, projector = FAMILIES[config.model_type], 0, 0
    if isinstance(pictures, int):
        pictures = family.pictures(config, 1)[:1] * pictures
    for grid, times in Counter(pictures).items():
        each = family.cost(config, grid, video)
        tower, projector = tower + times * each[0], projector + times * each[1]
    return tower, projector


def _decoder_layer(text: Any, layer: int, queries: int, keys: int, batch: int) -> LayerFlops:
    heads, kv_heads, head_dim = _heads(text)
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


def _per_layer(counts: Counts, text: Any, name: str) -> list[int]:
    layers = text.num_hidden_layers
    counts = [counts] * layers if isinstance(counts, int) else list(counts)
    if len(counts) != layers:
        raise ValueError(f"{name} has {len(counts)} entries, but the language model has {layers} layers.")
    if any(count < 0 for count in counts):
        raise ValueError(f"{name} must not be negative, got {min(counts)}.")
    return counts


def _element_bytes(model_or_config: Any, config: Any) -> int:
    dtype = getattr(model_or_config, "dtype", None) or getattr(config, "dtype", None)
    return getattr(dtype, "itemsize", 4)
