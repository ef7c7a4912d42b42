"""From what each item keeps to what each row keeps: which columns stay, in order, padding included. Tensors only."""

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
    """Which columns of a call stay.

    Attributes:
        columns: int64 [B, P], ascending in every row, -1 for padding.
        merged: (row, first position, rows [K, D]) to write after the gather.
        padded: whether any entry is padding; known without looking at the device.
    """

    columns: Tensor
    merged: tuple[tuple[int, int, Tensor], ...]
    padded: bool

    def gather(self, rows: Tensor) -> Tensor:
        """[B, S, ...] -> [B, P, ...]; padding repeats column 0."""
        index = self.columns.clamp(min=0)
        return rows[torch.arange(len(rows), device=rows.device)[:, None], index]


def plan_columns(
    items: Sequence[Item], kept: Sequence[Kept | None], length: int, visible: Tensor, device: torch.device
) -> Plan:
    """Lay out what is left of a call.

    Text and whole items stay, masked columns go (rows are padded anew to the longest), on the side where the call's own
    padding is.

    Args:
        items, kept: the call's items and what stays of each (None: all).
        length: columns of the call.
        visible: bool [B, S] on the CPU, False for masked columns.
    """
    rows: list[Tensor] = []
    slots: list[tuple[int, int, int]] = []  # (item, row, position in the row)
    every = torch.arange(length)
    for sample, row_visible in enumerate(visible):
        pieces, cursor, at = [], 0, 0
        for number, item in enumerate(items):
            choice = kept[number]
            if item.sample != sample or choice is None:
                continue
            text = every[cursor : item.start][row_visible[cursor : item.start]]
            slots.append((number, sample, at + len(text)))
            pieces += [text, torch.full((len(choice.index),), item.start)]
            at += len(text) + len(choice.index)
            cursor = item.start + item.length
        pieces.append(every[cursor:][row_visible[cursor:]])
        rows.append(torch.cat(pieces))
    width = max(len(row) for row in rows)
    pad_right = not bool(visible[:, -1].all())
    columns = torch.full((len(rows), width), -1)
    shift = [0 if pad_right else width - len(row) for row in rows]
    for sample, row in enumerate(rows):
        columns[sample, shift[sample] : shift[sample] + len(row)] = row
    columns = columns.to(device, non_blocking=True)
    merged = []
    for number, sample, at in slots:
        choice = kept[number]
        assert choice is not None
        first = shift[sample] + at
        columns[sample, first : first + len(choice.index)] += choice.index
        if choice.features is not None:
            merged.append((sample, first, choice.features))
    return Plan(columns, tuple(merged), padded=any(len(row) < width for row in rows))


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
