"""What the runtime needs to know of one model family."""

from __future__ import annotations

import functools
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from vlmprune.contract import Geometry, Item


class Adapter(ABC):
    """One model family: where its parts are and how its visual tokens lie in the sequence.

    Class attributes:
        family: the name people use.
        model_types: values of `config.model_type` that it serves.
        modalities: "image", "video": what has a `get_*_features` method and a placeholder `config.*_token_id`.
        signals: what pruners may ask for besides `features`.
        positions: position policies that make sense for the family.
    """

    family: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    signals: ClassVar[frozenset[str]] = frozenset({"last_attention"})
    positions: ClassVar[frozenset[str]] = frozenset({"original", "compact"})

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # The bare `LlavaModel` and the one with a head (which holds it as `.model`) are both served.
        self.core: nn.Module = model if hasattr(model, "language_model") else model.model  # type: ignore[assignment]
        self.language_model: nn.Module = self.core.language_model  # type: ignore[assignment]
        self.config: Any = model.config
        self._encoded = WeakTensorKeyDictionary()  # features of one item, or of several that look alike -> Geometry
        self._alike: dict[tuple[str, int], Geometry] = {}  # (modality, tokens) -> Geometry, where items look alike
        self.check()

    def check(self) -> None:  # noqa: B027  most families serve all their models
        """Raise ValueError, with one sentence, if this model of the family cannot be served."""

    @property
    def text_config(self) -> Any:
        return self.config.get_text_config(decoder=True)

    @property
    def decoder_layers(self) -> Sequence[nn.Module]:
        return self.language_model.layers  # type: ignore[return-value]

    @property
    def earliest_stage(self) -> int:
        """The first decoder layer, above 0, before which tokens may be dropped."""
        return 1

    def rotary(self, hidden: Tensor, positions: Tensor) -> Any:
        """(cos, sin) of `positions` [..., B, P], as the language model makes them for its layers."""
        if positions.ndim == 3 and len(positions) == 4:  # M-RoPE with the text positions in front
            positions = positions[1:]
        return self.language_model.rotary_emb(hidden, positions)  # type: ignore[operator]

    def queries_and_keys(
        self, layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Queries [B, H, S, d] and keys [B, G, S, d] of a decoder layer for the hidden states [B, S, D] that enter it.

        Normed, projected and rotated as the layer does it; G key heads serve H query heads.
        """
        attention: Any = layer.self_attn
        hidden = layer.input_layernorm(hidden)  # type: ignore[operator]
        shape = (*hidden.shape[:-1], -1, attention.head_dim)
        queries, keys = attention.q_proj(hidden).view(shape), attention.k_proj(hidden).view(shape)
        if hasattr(attention, "q_norm"):
            queries, keys = attention.q_norm(queries), attention.k_norm(keys)
        rotate = vars(sys.modules[type(attention).__module__])["apply_rotary_pos_emb"]
        return rotate(queries.transpose(1, 2), keys.transpose(1, 2), *rotary)

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
            if geometries := self.brought(modality, call):
                mask = self.placeholders(call, getattr(self.config, f"{modality}_token_id"))
                items += split_items(mask, geometries)
        return sorted(items, key=lambda item: (item.sample, item.start))

    def brought(self, modality: str, call: dict[str, Any]) -> list[Geometry]:
        """Geometry of each image (or video) of a call of `core`, brought as pixels or as encoded features."""
        output = (call.get("mm_encoder_outputs") or {}).get(modality)
        if output is None:
            return self.geometries(modality, call)
        rows = output.pooler_output
        if isinstance(rows, Tensor):
            alike = self._encoded.get(rows) or self._alike.get((modality, rows.shape[1]))
            found = [alike] * len(rows)
        else:
            found = [self._encoded.get(each) for each in rows]
        if None in found:
            raise ValueError(
                f"these {modality} features were encoded before the session began, or were cut since "
                "(prefill_chunk_size): give the model the pixels, or encode them inside the session."
            )
        return found  # type: ignore[return-value]

    def watch(self) -> Watch:
        """Remember the geometry of what is encoded from now on, until the result is removed.

        generate() encodes first and then calls `core` without pixels, sizes and grids.
        """
        if "mm_encoder_outputs" not in inspect.signature(type(self.core).forward).parameters:
            return Watch(self.core, {})
        methods = {f"get_{modality}_features": self._watched(modality) for modality in self.modalities}
        return Watch(self.core, methods)

    def _watched(self, modality: str) -> MethodType:
        plain = getattr(self.core, f"get_{modality}_features").__func__

        @functools.wraps(plain)
        def encode(core: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output = plain(core, *args, **kwargs)
            rows = getattr(output, "pooler_output", None)
            call = inspect.signature(plain).bind(core, *args, **kwargs).arguments
            geometries = self.geometries(modality, {**call, **call.pop("kwargs", {})})
            if isinstance(rows, Tensor):
                self._encoded[rows] = self._alike[modality, rows.shape[1]] = geometries[0]
            elif rows is not None:
                for each, geometry in zip(rows, geometries, strict=True):
                    self._encoded[each] = geometry
            return output

        return MethodType(encode, self.core)

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


def split_items(mask: Tensor, geometries: Sequence[Geometry]) -> list[Item]:
    """Cut the placeholder columns (bool [B, S], on the CPU) into items of these geometries, in prompt order.

    Raises:
        ValueError: the columns do not divide into these items.
    """
    items: list[Item] = []
    queue = iter(geometries)
    for sample, row in enumerate(mask):
        columns = row.nonzero().flatten()
        at = 0
        while at < len(columns):
            geometry = next(queue, None)
            if geometry is None or at + len(geometry) > len(columns):
                raise ValueError(
                    f"row {sample} has {len(columns)} visual placeholders, which its images' token counts do not divide"
                )
            items.append(item_at(sample, columns[at : at + len(geometry)], geometry))
            at += len(geometry)
    if next(queue, None) is not None:
        raise ValueError("the call brings more images than the prompt has placeholders for")
    return items


def item_at(sample: int, columns: Tensor, geometry: Geometry) -> Item:
    """The item whose tokens stand in these columns (int64 [N], ascending)."""
    start, length = int(columns[0]), len(columns)
    span = int(columns[-1]) - start + 1
    return Item(sample, start, length, geometry, None if span == length else columns, span)
