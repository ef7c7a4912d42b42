"""What the runtime needs to know of one model family."""

from __future__ import annotations

import functools
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from vlmprune.adapters.tower import FROM_PROJECTOR, NEEDS_CLS, SIGNALS, Tower
from vlmprune.contract import Geometry, Item, Pruner

FFN_SIGNALS = frozenset({"activation_overlap", "core_overlap"})
DECODER_SIGNALS = frozenset(
    {
        *("instruction", "instruction_mask", "instruction_queries", "instruction_keys"),
        *("prompt_features", "text_features", "text_mask"),
        *("last_attention", "next_last_attention", "text_attention", "next_text_attention"),
        *("all_attention", "visual_attention", "next_visual_attention", "next_inner_attention"),
        *("next_keys", "next_plain_keys", "transition", "transition_strict", *FFN_SIGNALS),
        *("cache_keys", "cache_attention", "cache_alive"),
    }
)


class Adapter(ABC):
    """One model family: where its parts are and how its visual tokens lie in the sequence.

    Class attributes:
        family: the name people use.
        model_types: values of `config.model_type` that it serves.
        modalities: "image", "video": what has a `get_*_features` method and a placeholder `config.*_token_id`.
        group: patches that lie side by side in a row that the projector takes.
        positions: position policies that make sense for the family.
        clocked: whether a growing video moves on in the first position component alone (see `stream_positions`).

    Args:
        processor: the one that writes the model's prompts, where it is known; it has the tokenizer.
    """

    family: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    group: ClassVar[int] = 1
    positions: ClassVar[frozenset[str]] = frozenset({"original", "compact"})
    clocked: ClassVar[bool] = False

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        self.model, self.processor = model, processor
        # The bare `LlavaModel` and the one with a head (which holds it as `.model`) are both served.
        self.core: nn.Module = model if hasattr(model, "language_model") else model.model  # type: ignore[assignment]
        self.language_model: nn.Module = self.core.language_model  # type: ignore[assignment]
        self.config: Any = model.config
        self._encoded = WeakTensorKeyDictionary()  # features of one item -> (its geometry, its number)
        self._alike: dict[str, tuple[Tensor, Geometry]] = {}  # features of items that look alike, in one tensor
        self._geometries: dict[str, list[Geometry]] = {}  # of what was encoded last
        self._encoding = False
        self.check()

    def check(self) -> None:  # noqa: B027  most families serve all their models
        """Raise ValueError, with one sentence, if this model of the family cannot be served."""

    @property
    def text_config(self) -> Any:
        return self.config.get_text_config(decoder=True)

    @property
    def decoder_layers(self) -> Sequence[nn.Module]:
        return self.language_model.layers  # type: ignore[return-value]

    @functools.cached_property
    @abstractmethod
    def tower(self) -> Tower:
        """The vision tower, as signals are read from it."""

    @property
    def signals(self) -> frozenset[str]:
        """What pruners may ask for besides `features`: names of `vlmprune.contract.SIGNALS`."""
        encoder = SIGNALS - (frozenset() if self.tower.prefix else NEEDS_CLS)
        dense = all(hasattr(layer.mlp, "down_proj") for layer in self.decoder_layers)
        return encoder | DECODER_SIGNALS - (frozenset() if dense else FFN_SIGNALS)

    def project(self, rows: Tensor) -> Tensor:
        """The projector, from rows as it takes them [..., C] to rows of the language model [..., D]."""
        return self.tower.projector(rows)

    def encoded(self, signal: str, item: Item) -> Tensor:
        """An encoder signal for all the item's original tokens: [N, ...], or [P, ...] for one row a picture."""
        kind = item.geometry.kind if item.geometry.kind in self.modalities else self.modalities[0]
        before, geometry = self._geometries[kind][: item.number], item.geometry
        if signal == "encoder_kept" and signal not in self.tower.seen.get(kind, ()):  # nothing was merged
            return torch.ones(len(geometry), device=next(self.core.parameters()).device)
        table = self.tower.read(kind, "projector_inputs" if signal in FROM_PROJECTOR else signal)
        if signal in ("cls_features", "cls_keys"):
            first = sum(len(each.pictures) for each in before)
            return table[first : first + len(geometry.pictures)]
        patches = [sum(rows * cols for rows, cols in each.pictures) for each in before]
        assert geometry.sources is not None
        if signal in FROM_PROJECTOR and self.takes_tokens(geometry):
            index = torch.arange(len(geometry), device="cpu")[:, None] + sum(len(each) for each in before)
        elif signal in FROM_PROJECTOR:
            index = geometry.sources[:, :1] + sum(patches)
        else:
            index = geometry.sources + sum(patches)
        missing = (index < 0) | geometry.placeless[:, None]
        index, missing = (part.to(table.device, non_blocking=True) for part in (index.clamp(min=0), missing))
        rows = table[index]
        rows = rows.masked_fill(missing.view(*missing.shape, *[1] * (rows.ndim - 2)), 0)
        rows = rows[:, 0] if rows.shape[1] == 1 else rows.float().mean(1)
        if signal == "encoder_features" and self.group > 1:
            rows = rows.unflatten(-1, (self.group, -1)).mean(-2)
        return rows

    def takes_tokens(self, geometry: Geometry) -> bool:
        """Whether the projector takes a row for each of an item's visual tokens, or one for each patch."""
        return True

    @property
    def earliest_stage(self) -> int:
        """The first decoder layer, above 0, before which tokens may be dropped."""
        return 1

    def rotary(self, hidden: Tensor, positions: Tensor) -> Any:
        """(cos, sin) of `positions` [..., B, P], as the language model makes them for its layers."""
        if positions.ndim == 3 and len(positions) == 4:  # M-RoPE with the text positions in front
            positions = positions[1:]
        return self.language_model.rotary_emb(hidden, positions)  # type: ignore[operator]

    def queries(self, layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Queries [B, H, S, d] of a decoder layer for the hidden states [B, S, D] that enter it.

        Normed, projected and rotated (None: not rotated) as the layer does it.
        """
        return self._projected("q", layer, hidden, rotary)

    def keys(self, layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Keys [B, G, S, d], likewise; G key heads serve H query heads."""
        return self._projected("k", layer, hidden, rotary)

    def _projected(self, part: str, layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        attention: Any = layer.self_attn
        norm: Any = layer.input_layernorm
        here, home = hidden.device, norm.weight.device
        if home.type != "meta":  # an offloaded layer is moved by its own hooks
            hidden = hidden.to(home)
        hidden = norm(hidden)
        rows = getattr(attention, f"{part}_proj")(hidden).view(*hidden.shape[:-1], -1, attention.head_dim)
        if hasattr(attention, f"{part}_norm"):
            rows = getattr(attention, f"{part}_norm")(rows)
        rows = rows.transpose(1, 2).to(here)
        if rotary is None:
            return rows
        rotate = vars(sys.modules[type(attention).__module__])["apply_rotary_pos_emb"]
        return rotate(rows, rows, *rotary)[0]

    def turned(self, layer: nn.Module, keys: Tensor, by: Tensor) -> Tensor:
        """Cached keys [B, G, N, d] of a decoder layer as they were `by` (int64 [..., B, N]) positions further on."""
        scaling = getattr(self.language_model.rotary_emb, "attention_scaling", 1.0)
        cos, sin = (part / scaling for part in self.rotary(keys.float(), by))
        rotate = vars(sys.modules[type(layer.self_attn).__module__])["apply_rotary_pos_emb"]
        return rotate(keys.float(), keys.float(), cos, sin)[1].to(keys.dtype)

    def stream_positions(self, call: dict[str, Any]) -> Tensor:
        """int64 [C, N + 1]: positions of N new columns of a prompt, counted from its next one, and of text behind them.

        Args:
            call: `input_ids` [1, N], text and then one frame (or as many as a temporal patch takes), and the
                processor's other outputs for it. Where the family is `clocked`, frames after a video's first bring no
                text, and the first component is to be moved on by their time.
        """
        return torch.arange(call["input_ids"].shape[1] + 1, device="cpu")[None]

    def stream_rate(self) -> float | None:
        """Of a `clocked` family: positions a second of video; None: one a temporal patch, whatever it lasts."""
        return None

    def cut(self, kwargs: dict[str, Any], columns: Tensor | None) -> dict[str, Any]:
        """The language model's arguments with the family's own per-column ones cut.

        Args:
            columns: int64 [B, P], columns left at the boundary, -1 for padding; None: all.
        """
        return kwargs

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of one call of `core` by name."""
        bound = inspect.signature(self.core.forward).bind_partial(*args, **kwargs).arguments
        return {**bound, **bound.pop("kwargs", {})}

    @abstractmethod
    def geometries(self, modality: str, call: dict[str, Any]) -> list[Geometry]:
        """Geometry of each image (or video) whose pixels a call brings, in order; empty where it brings none.

        Args:
            modality: one of `modalities`.
            call: arguments by name, of `core` or of its `get_image_features` or `get_video_features`.
        """

    def items(self, call: dict[str, Any]) -> list[Item]:
        """The images and videos of one call of `core`, in prompt order over the batch.

        Args:
            call: the call's arguments by name. `input_ids` [B, S], or `inputs_embeds` [B, S, D], are the new columns
                only; items count their start from the first of these.

        Raises:
            ValueError: placeholders in the prompt and visual features do not fit.
        """
        items: list[Item] = []
        for modality in self.modalities:
            if brought := self.brought(modality, call):
                mask = self.placeholders(call, getattr(self.config, f"{modality}_token_id"))
                items += split_items(mask, brought)
        return sorted(items, key=lambda item: (item.sample, item.start))

    def brought(self, modality: str, call: dict[str, Any]) -> list[tuple[Geometry, int]]:
        """Geometry and number of each image (or video) of a call of `core`, brought as pixels or as encoded features.

        The number says which of those encoded last it is.
        """
        output = (call.get("mm_encoder_outputs") or {}).get(modality)
        if output is None:
            return [(geometry, number) for number, geometry in enumerate(self.geometries(modality, call))]
        alike = self._alike.get(modality)
        if alike is not None and output.pooler_output is alike[0]:
            return [(alike[1], number) for number in range(len(alike[0]))]
        found = []
        for each in output.pooler_output:
            known = self._encoded.get(each)
            if known is None and alike is not None and each.shape[-2:] == alike[0].shape[-2:]:
                # A copy that beam search made: only one of several pictures has to be looked for.
                same = (alike[0] == each).flatten(1).all(1).nonzero().flatten().tolist() if len(alike[0]) > 1 else []
                known = (alike[1], same[0] if same else 0)
            found.append(known)
        if None in found:
            raise ValueError(
                f"these {modality} features were encoded before the session began, or were cut since "
                "(prefill_chunk_size): give the model the pixels, or encode them inside the session."
            )
        return found  # type: ignore[return-value]

    def watch(self, signals: Iterable[str] = ()) -> list[Any]:
        """Handles (with `remove()`) of what remembers encoded pictures: their geometry, and what the signals need.

        generate() encodes first and then calls `core` without pixels, sizes and grids.
        """
        methods = {f"get_{modality}_features": self._watched(modality) for modality in self.modalities}
        return [Watch(self.core, methods), *self.tower.watch(signals)]

    def _watched(self, modality: str) -> MethodType:
        plain = getattr(self.core, f"get_{modality}_features").__func__

        @functools.wraps(plain)
        def encode(core: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._encoding:  # Qwen3-VL encodes videos as images
                return plain(core, *args, **kwargs)
            self._encoding = True
            try:
                self.tower.begin(modality)
                output = plain(core, *args, **kwargs)
            finally:
                self._encoding = False
            rows = getattr(output, "pooler_output", None)
            call = inspect.signature(plain).bind(core, *args, **kwargs).arguments
            call = {**call, **call.pop("kwargs", {})}
            if modality == "video" and "pixel_values_videos" not in call:  # LLaVA-NeXT-Video of 5.17
                call["pixel_values_videos"] = call.pop("pixel_values")
            geometries = self.geometries(modality, call)
            self._geometries[modality] = geometries
            if isinstance(rows, Tensor):
                self._alike[modality] = (rows, geometries[0])
            elif rows is not None:
                for number, (each, geometry) in enumerate(zip(rows, geometries, strict=True)):
                    self._encoded[each] = (geometry, number)
            return output

        return MethodType(encode, self.core)

    def reduction(self, pruner: Pruner) -> list[Any]:
        """Handles of what reduces tokens inside the vision tower, for a pruner that does."""
        return []

    def forget(self) -> None:
        """Let go of what the last encoding left behind."""
        self._alike.clear()
        self.tower.seen.clear()

    def placeholders(self, call: dict[str, Any], token_id: int) -> Tensor:
        """bool [B, S] on the CPU: columns that hold the placeholder `token_id`."""
        ids = call.get("input_ids")
        if ids is not None:
            return (ids == token_id).cpu()
        embeds = call["inputs_embeds"]
        row = self.model.get_input_embeddings()(torch.tensor(token_id, device=embeds.device))  # type: ignore[operator]
        return (embeds == row).all(-1).cpu()


class Watch:
    """Methods put over an object's own; `remove()` takes them off again."""

    def __init__(self, owner: nn.Module, methods: dict[str, MethodType]) -> None:
        self.owner = owner
        self.before = {name: vars(owner).get(name) for name in methods}
        vars(owner).update(methods)

    def remove(self) -> None:
        for name, method in self.before.items():
            if method is None:
                vars(self.owner).pop(name, None)
            else:
                vars(self.owner)[name] = method
        self.before = {}


def split_items(mask: Tensor, brought: Sequence[tuple[Geometry, int]]) -> list[Item]:
    """Cut the placeholder columns (bool [B, S], on the CPU) into items of these geometries and numbers, in order.

    Raises:
        ValueError: the columns do not divide into these items.
    """
    items: list[Item] = []
    queue = iter(brought)
    for sample, row in enumerate(mask):
        columns = row.nonzero().flatten()
        at = 0
        while at < len(columns):
            geometry, number = next(queue, (None, 0))
            if geometry is None or at + len(geometry) > len(columns):
                raise ValueError(
                    f"row {sample} has {len(columns)} visual placeholders, which its images' token counts do not divide"
                )
            items.append(item_at(sample, columns[at : at + len(geometry)], geometry, number))
            at += len(geometry)
    if next(queue, None) is not None:
        raise ValueError("the call brings more images than the prompt has placeholders for")
    return items


def item_at(sample: int, columns: Tensor, geometry: Geometry, number: int) -> Item:
    """The item whose tokens stand in these columns (int64 [N], ascending)."""
    start, length = int(columns[0]), len(columns)
    span = int(columns[-1]) - start + 1
    return Item(sample, start, length, geometry, None if span == length else columns, span, number)
