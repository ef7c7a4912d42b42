"""What one prefill really did, measured where it happened."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from vlmprune.contract import Geometry, Pruner
from vlmprune.flops import Flops, format_bytes, prefill_flops


@dataclass(frozen=True)
class StageReport:
    """One stage: before decoder `layer` (0 is the boundary) the item had `kept` left, int64, ascending, from its start."""

    layer: int
    kept: Tensor


@dataclass(frozen=True)
class ItemReport:
    """One image or video of the batch.

    Attributes:
        sample: batch row, as the model saw it (beam search expands rows before the prefill).
        start: column of its first visual token in that row's unpruned sequence, padding and earlier turns included.
        tokens_before, tokens_after: its visual tokens before the first and after the last stage.
        kept: int64 [K] on the CPU, ascending, survivors of the boundary relative to `start`.
        merged: bool [K], kept rows that now stand for several tokens.
        stages: every stage in order.
        geometry: where each of its tokens sits in the picture.
    """

    sample: int
    start: int
    tokens_before: int
    kept: Tensor
    merged: Tensor
    geometry: Geometry
    stages: tuple[StageReport, ...]

    @property
    def tokens_after(self) -> int:
        return len(self.stages[-1].kept)


@dataclass
class PruneReport:
    """One prefill under a session.

    Attributes:
        pruner: the method, with its hyper-parameters.
        items: images and videos in prompt order over the batch; empty for a prompt of text alone.
        length: columns of the unpruned call, padding included.
        columns: int64 [B, P], original column (within the call) of every row position left, -1 for padding; None if
            nothing was removed. Column j of the call's logits belongs to `columns[:, j]`.
        layer_tokens: positions per row that each decoder layer computed, padding included.
        cached_tokens: keys per row that the cache held before.
        logits_tokens: positions per row that passed the head.
        kv_bytes: bytes that each layer's cache held after the call; empty without a cache.
        selection_seconds: time spent choosing tokens (device time on a GPU).
    """

    pruner: Pruner
    items: list[ItemReport]
    batch: int
    length: int
    columns: Tensor | None
    layer_tokens: tuple[int, ...]
    cached_tokens: int
    logits_tokens: tuple[int, int]
    kv_bytes: list[int] = field(default_factory=list)
    config: Any = field(default=None, repr=False)
    timer: Any = field(default=None, repr=False)

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

    @cached_property
    def flops(self) -> tuple[Flops, Flops]:
        """FLOPs of this prefill by module, without pruning and as it ran (`vlmprune.flops` says what is counted)."""
        shared = {"images": len(self.items), "batch": self.batch, "cached_tokens": self.cached_tokens}
        full, pruned = self.logits_tokens
        return (
            prefill_flops(self.config, layer_tokens=self.length, logits_tokens=full, **shared),
            prefill_flops(self.config, layer_tokens=self.layer_tokens, logits_tokens=pruned, **shared),
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
        held = [self.cached_tokens + tokens for tokens in self.layer_tokens]
        return sum(size // max(n, 1) * (self.cached_tokens + self.length) for size, n in zip(self.kv_bytes, held))

    @cached_property
    def selection_seconds(self) -> float:
        return self.timer() if self.timer is not None else 0.0

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
