"""From what each item keeps to what each row keeps: which positions stay, in order, padding included. Tensors only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.contract import Item, Selection


@dataclass(frozen=True)
class Kept:
    """Survivors of one item: int64 [K] ascending, and the rows [K, D] to put in their place (None: as they are)."""

    index: Tensor
    features: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """Which positions of a sequence stay.

    Attributes:
        index: int64 [B, P], ascending in every row, -1 for padding.
        shown: bool [B, P] on the CPU, False for padding.
        starts: where each item's first survivor is now.
        merged: (row, first position, rows [K, D]) to write after the gather.
    """

    index: Tensor
    shown: Tensor
    starts: tuple[int, ...]
    merged: tuple[tuple[int, int, Tensor], ...]

    def gather(self, rows: Tensor) -> Tensor:
        """[B, S, ...] -> [B, P, ...]; padding repeats position 0."""
        return rows[torch.arange(len(rows), device=rows.device)[:, None], self.index.clamp(min=0)]

    def apply(self, rows: Tensor) -> Tensor:
        """`gather`, with merged rows in their places."""
        rows = self.gather(rows)
        for row, first, features in self.merged:
            rows[row, first : first + len(features)] = features.to(rows.dtype)
        return rows


def plan_rows(items: Sequence[Item], kept: Sequence[Kept | None], shown: Tensor, device: torch.device) -> Plan:
    """Lay out what is left of a sequence.

    Text and whole items stay, masked positions go; rows are padded anew to the longest, on the side where the sequence
    had its padding.

    Args:
        items: where each item's tokens are now.
        kept: what stays of each (None: all).
        shown: bool [B, S] on the CPU, False for masked positions.
    """
    length = shown.shape[1]
    every = torch.arange(length)
    rows: list[Tensor] = []
    at = [0] * len(items)
    for sample, row_shown in enumerate(shown):
        pieces: list[Tensor] = []
        cursor = filled = 0
        for number, item in enumerate(items):
            if item.sample != sample:
                continue
            text = every[cursor : item.start][row_shown[cursor : item.start]]
            choice = kept[number]
            at[number] = filled + len(text)
            if choice is None:
                visual = every[item.start : item.start + item.length]
            else:  # the survivors' own offsets are added on the device
                visual = torch.full((len(choice.index),), item.start)
            pieces += [text, visual]
            filled += len(text) + len(visual)
            cursor = item.start + item.length
        pieces.append(every[cursor:][row_shown[cursor:]])
        rows.append(torch.cat(pieces))
    width = max(len(row) for row in rows)
    pad_right = not bool(shown[:, -1].all())
    index = torch.full((len(rows), width), -1)
    shift = [0 if pad_right else width - len(row) for row in rows]
    for sample, row in enumerate(rows):
        index[sample, shift[sample] : shift[sample] + len(row)] = row
    still_shown = index >= 0
    index = index.to(device, non_blocking=True)
    starts = tuple(shift[item.sample] + first for item, first in zip(items, at))
    merged = []
    for item, first, choice in zip(items, starts, kept):
        if choice is None:
            continue
        index[item.sample, first : first + len(choice.index)] += choice.index
        if choice.features is not None:
            merged.append((item.sample, first, choice.features))
    return Plan(index, still_shown, starts, tuple(merged))


def ascending(selection: Selection, counts: Sequence[int], budget: Tensor) -> Selection:
    """Sort each item's indices, padding last, and the merged rows along with them.

    Raises:
        ValueError: on the CPU, where looking costs nothing: indices that repeat, lie outside the item, or are not as
            many as the budget.
    """
    index = selection.index
    index, order = index.masked_fill(index < 0, torch.iinfo(torch.int64).max).sort(dim=1)
    if index.device.type == "cpu":
        for row, (count, keep) in enumerate(zip(counts, budget.tolist())):
            chosen = index[row, :keep]
            if (
                len(chosen) < keep
                or (chosen[1:] == chosen[:-1]).any()
                or bool((chosen >= count).any())
                or bool((index[row, keep:] < count).any())
            ):
                raise ValueError(
                    f"the pruner must give {keep} different indices in 0..{count - 1}, got "
                    f"{selection.index[row].tolist()}"
                )
    features = selection.features
    if features is not None:
        features = features.gather(1, order[..., None].expand(-1, -1, features.shape[-1]))
    return Selection(index, features)
