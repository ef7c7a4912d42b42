"""What one prefill really did, measured where it happened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmprune.contract import Geometry, Pruner
from vlmprune.flops import Flops, format_bytes, prefill_flops

if TYPE_CHECKING:
    from vlmprune.course import Course


@dataclass(frozen=True)
class StageReport:
    """One stage: before decoder `layer` (0 is the boundary) these of the item's tokens were left, int64, ascending."""

    layer: int
    kept: Tensor


@dataclass
class ItemReport:
    """One image or video of the batch.

    Attributes:
        sample: batch row, as the model saw it (beam search expands rows before the prefill).
        start: column of its first visual token in that row's unpruned sequence, padding and earlier turns included.
        tokens_before: its visual tokens.
        geometry: where each of them sits in the picture.
        columns: int64 [tokens_before], column of every token, where text stands between them; None: from `start` on.
        stages: every stage of the method in order.
        merged: bool, for each row left: whether it now stands for several tokens.
        cached: by decoder layer, int64 ascending, which of its tokens the KV cache holds behind the last cache stage;
            empty for methods without one.
    """

    sample: int
    start: int
    tokens_before: int
    geometry: Geometry
    columns: Tensor | None = None
    stages: list[StageReport] = field(default_factory=list)
    merged: Tensor | None = None
    cached: dict[int, Tensor] = field(default_factory=dict)

    @property
    def kept(self) -> Tensor:
        """int64 [K], ascending: which of the item's tokens survived the boundary."""
        if self.stages and self.stages[0].layer == 0:
            return self.stages[0].kept
        return torch.arange(self.tokens_before, device="cpu")

    @property
    def tokens_after(self) -> int:
        """Visual tokens left behind the last stage."""
        return len(self.stages[-1].kept) if self.stages else self.tokens_before


@dataclass
class PruneReport:
    """One prefill under a session.

    Attributes:
        pruner: the method, with its hyper-parameters.
        items: images and videos in prompt order over the batch; empty for a prompt of text alone.
        batch: rows.
        length: columns of the unpruned call, padding included.
        layer_tokens: positions per row that each decoder layer computed, padding included.
        cached_tokens: keys per row that each layer's cache held before.
        seen: columns of the unpruned sequence before this call.
        logits_to_keep: positions per row that passed the head, 0 for all.
        columns: int64 [B, P], original column (within the call) of every row position left at the end, -1 for padding;
            None if nothing was removed. Column j of the call's logits belongs to `columns[:, j]`.
        kv_bytes: bytes that each layer's cache held after the call; empty without a cache.
        kv_bytes_unpruned: bytes that it would have held unpruned.
        encoder_rows: "image" or "video" -> rows of a picture in each layer of the vision tower, where the method merged
            between them.
    """

    pruner: Pruner
    items: list[ItemReport]
    batch: int
    length: int
    layer_tokens: list[int]
    cached_tokens: list[int]
    seen: int
    logits_to_keep: int
    columns: Tensor | None = None
    kv_bytes: list[int] = field(default_factory=list)
    kv_bytes_unpruned: list[int] = field(default_factory=list)
    encoder_rows: dict[str, list[int]] = field(default_factory=dict)
    config: Any = field(default=None, repr=False)
    timers: list[Callable[[], float]] = field(default_factory=list, repr=False)

    def record(self, layer: int, left: Sequence[tuple[Tensor, Tensor]], course: Course, timers: Sequence[Any]) -> None:
        """Note a stage: what is left of every item, and of every row."""
        for item, (kept, merged) in zip(self.items, left):
            item.stages.append(StageReport(layer, kept))
            item.merged = merged
        self.columns = course.columns
        for each in range(layer, len(self.layer_tokens)):
            self.layer_tokens[each] = course.width
        self.timers += timers

    def record_cache(self, kept: Sequence[dict[int, Tensor]]) -> None:
        """Note a cache stage: what each layer's cache holds of every item."""
        for item, held in zip(self.items, kept):
            item.cached.update(held)

    @property
    def changed(self) -> bool:
        """False if the model saw exactly what it would have seen unpruned."""
        return self.columns is not None

    @property
    def tokens_before(self) -> int:
        """Visual tokens of all items before pruning."""
        return sum(item.tokens_before for item in self.items)

    @property
    def tokens_after(self) -> int:
        """Visual tokens of all items behind the last stage."""
        return sum(item.tokens_after for item in self.items)

    @property
    def layer_visual_tokens(self) -> list[int]:
        """Visual tokens of all items that each decoder layer saw."""

        def seen_by(item: ItemReport, layer: int) -> int:
            before = [len(stage.kept) for stage in item.stages if stage.layer <= layer]
            return before[-1] if before else item.tokens_before

        return [sum(seen_by(item, layer) for item in self.items) for layer in range(len(self.layer_tokens))]

    @property
    def average_keep(self) -> float:
        """Share of the visual tokens kept, averaged over the decoder layers: what every method's `keep` asks for."""
        kept = self.layer_visual_tokens
        return sum(kept) / (len(kept) * self.tokens_before) if self.tokens_before else 1.0

    @property
    def flops(self) -> tuple[Flops, Flops]:
        """FLOPs of this prefill by module, without pruning and as it ran (`vlmprune.flops` says what is counted)."""

        pictures: dict[str, list[tuple[int, int]]] = {"image": [], "video": []}
        for item in self.items:
            pictures[item.geometry.kind] += item.geometry.pictures

        def cost(tokens: int | list[int], cached: int | list[int], last: int, rows: dict[str, list[int]]) -> Flops:
            return prefill_flops(
                self.config,
                layer_tokens=tokens,
                cached_tokens=cached,
                images=pictures["image"],
                frames=pictures["video"],
                image_rows=rows.get("image"),
                frame_rows=rows.get("video"),
                batch=self.batch,
                logits_tokens=min(self.logits_to_keep or last, last),
            )

        return (
            cost(self.length, self.seen, self.length, {}),
            cost(self.layer_tokens, self.cached_tokens, self.layer_tokens[-1], self.encoder_rows),
        )

    @property
    def flops_full(self) -> int:
        """FLOPs that this prefill would have cost unpruned."""
        return self.flops[0].total

    @property
    def flops_pruned(self) -> int:
        """FLOPs that this prefill cost, selection not counted."""
        return self.flops[1].total

    @property
    def kv_bytes_pruned(self) -> int:
        """Bytes of the KV cache after the prefill."""
        return sum(self.kv_bytes)

    @property
    def kv_bytes_full(self) -> int:
        """Bytes that the KV cache would have held unpruned."""
        return sum(self.kv_bytes_unpruned)

    @property
    def selection_seconds(self) -> float:
        """Time spent choosing tokens, over all stages (device time on a GPU)."""
        return sum(timer() for timer in self.timers)

    def __str__(self) -> str:
        if not self.items:
            return "no visual tokens in the prompt"
        head = f"{self.tokens_before} -> {self.tokens_after} visual tokens"
        if not self.changed:
            return f"{head}: nothing was pruned"
        parts = [
            head,
            f"{100 * self.flops_pruned / self.flops_full:.1f} % FLOPs",
            f"selection {1000 * self.selection_seconds:.2f} ms",
        ]
        if self.kv_bytes:
            parts.insert(2, f"KV cache {format_bytes(self.kv_bytes_full)} -> {format_bytes(self.kv_bytes_pruned)}")
        return ", ".join(parts)
