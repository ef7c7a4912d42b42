"""What the runtime needs to know of one model family."""

from __future__ import annotations

import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmprune.contract import Geometry, Item


class Adapter(ABC):
    """One model family: where its parts are and how its visual tokens lie in the sequence.

    Class attributes:
        family: the name people use.
        model_types: values of `config.model_type` that it serves.
        signals: what pruners may ask for besides `features`.
        positions: position policies that make sense for the family.
    """

    family: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    signals: ClassVar[frozenset[str]] = frozenset({"last_attention"})
    positions: ClassVar[frozenset[str]] = frozenset({"original", "compact"})

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # The bare `LlavaModel` and the one with a head (which holds it as `.model`) are both served.
        self.core: nn.Module = model if hasattr(model, "language_model") else model.model  # type: ignore[assignment]
        self.language_model: nn.Module = self.core.language_model  # type: ignore[assignment]
        self.config: Any = model.config
        self.check()

    def check(self) -> None:  # noqa: B027  most families serve all their models
        """Raise ValueError, with one sentence, if this model of the family cannot be served."""

    @property
    def text_config(self) -> Any:
        return self.config.get_text_config(decoder=True)

    @property
    def decoder_layers(self) -> Sequence[nn.Module]:
        return self.language_model.layers  # type: ignore[return-value]

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
    def items(self, call: dict[str, Any]) -> list[Item]:
        """The images and videos of one call of `core`, in prompt order over the batch.

        Args:
            call: the call's arguments by name. `input_ids` [B, S], or `inputs_embeds` [B, S, D], are the new columns
                only; items count their start from the first of these.

        Raises:
            ValueError: placeholders in the prompt and visual features do not fit.
        """

    def image_counts(self, call: dict[str, Any]) -> list[int] | None:
        """Tokens of each pre-encoded image of the call, None where the call brings pixels or no image."""
        encoded = (call.get("mm_encoder_outputs") or {}).get("image")
        return None if encoded is None else [len(rows) for rows in encoded.pooler_output]

    def placeholders(self, call: dict[str, Any], token_id: int) -> Tensor:
        """bool [B, S] on the CPU: columns that hold the placeholder `token_id`."""
        ids = call.get("input_ids")
        if ids is not None:
            return (ids == token_id).cpu()
        embeds = call["inputs_embeds"]
        row = self.model.get_input_embeddings()(torch.tensor(token_id, device=embeds.device))  # type: ignore[operator]
        return (embeds == row).all(-1).cpu()


def split_items(mask: Tensor, counts: Sequence[int], geometries: Sequence[Geometry]) -> list[Item]:
    """Cut the placeholder columns (bool [B, S], on the CPU) into items of the given token counts, in prompt order.

    Raises:
        ValueError: the columns do not divide into these counts, or an item is not contiguous.
    """
    items: list[Item] = []
    queue = iter(zip(counts, geometries))
    for sample, row in enumerate(mask):
        columns = row.nonzero().flatten().tolist()
        at = 0
        while at < len(columns):
            count, geometry = next(queue, (0, None))
            if geometry is None or at + count > len(columns):
                raise ValueError(
                    f"row {sample} has {len(columns)} visual placeholders, which its images' token counts do not divide"
                )
            start = columns[at]
            if count and columns[at + count - 1] != start + count - 1:
                raise ValueError(f"the visual tokens of an image in row {sample} are not contiguous")
            items.append(Item(sample, start, count, geometry))
            at += count
    if next(queue, None) is not None:
        raise ValueError("the call brings more images than the prompt has placeholders for")
    return items
