"""From what each item keeps to what each row keeps: which positions stay, in order, padding included. Tensors only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmprune.contract import Item, Selection


@dataclass(frozen=True)
class Kept:
    """Survivors of one item.

    Attributes:
        index: int64 [K], ascending.
        features: [K, D], rows to put in their place; None: as they are.
        merged: bool [K], which of these rows stand for several tokens; None: all.
    """

    index: Tensor
    features: Tensor | None = None
    merged: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """Which positions of a sequence stay.

    Attributes:
        index: int64 [B, P], ascending in every row, -1 for padding.
        shown: bool [B, P] on the CPU, False for padding.
        items: where what is left of each item is now.
        merged: (row, positions, rows [K, D]) to write after the gather.
    """

    index: Tensor
    shown: Tensor
    items: tuple[Item, ...]
    merged: tuple[tuple[int, slice | Tensor, Tensor], ...]

    def gather(self, rows: Tensor) -> Tensor:
        """[B, S, ...] -> [B, P, ...]; padding repeats position 0."""
        index = self.index.to(rows.device)
        return rows[torch.arange(len(rows), device=rows.device)[:, None], index.clamp(min=0)]

    def apply(self, rows: Tensor) -> Tensor:
        """`gather`, with merged rows in their places."""
        rows = self.gather(rows)
        for row, positions, features in self.merged:
            rows[row, positions] = features.to(rows.dtype)
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
    every = torch.arange(length, device="cpu")
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
                visual = every[item.start : item.stop]
            else:  # the survivors' own offsets are added on the device
                visual = torch.full(
                    (item.stop - item.start - item.length + len(choice.index),), item.start, device="cpu"
                )
            pieces += [text, visual]
            filled += len(text) + len(visual)
            cursor = item.stop
        pieces.append(every[cursor:][row_shown[cursor:]])
        rows.append(torch.cat(pieces))
    width = max(len(row) for row in rows)
    pad_right = not bool(shown[:, -1].all())
    index = torch.full((len(rows), width), -1, device="cpu")
    shift = [0 if pad_right else width - len(row) for row in rows]
    for sample, row in enumerate(rows):
        index[sample, shift[sample] : shift[sample] + len(row)] = row
    still_shown = index >= 0
    index = index.to(device, non_blocking=True)
    moved, merged = [], []
    for item, filled, choice in zip(items, at, kept):
        first = shift[item.sample] + filled
        if item.columns is not None:
            new = _settle(index[item.sample], item, first, choice)
        elif choice is None:
            new = replace(item, start=first)
        else:
            new = replace(item, start=first, length=len(choice.index))
            index[item.sample, new.where] += choice.index
        moved.append(new)
        if choice is not None and choice.features is not None:
            merged.append((item.sample, new.where, choice.features))
    return Plan(index, still_shown, tuple(moved), tuple(merged))


def _settle(row: Tensor, item: Item, first: int, choice: Kept | None) -> Item:
    """Fill in the positions of an item with text between its tokens, from `first` of its `row` of the plan's index.

    Which survivors stand before which text only the device knows; how many there are, and how much text, the host does.
    """
    assert item.columns is not None
    columns = item.columns.to(row.device)
    if choice is None:
        return replace(item, start=first, columns=columns - item.start + first)
    is_text = torch.ones(item.span, dtype=torch.int8, device=row.device)
    is_text[columns - item.start] = 0
    text = is_text.sort(descending=True, stable=True).indices[: item.span - item.length] + item.start
    survivors = columns[choice.index]
    block = torch.cat([text, survivors]).sort().values
    row[first : first + len(block)] = block
    positions = first + torch.searchsorted(block, survivors)
    return replace(item, start=first, length=len(survivors), columns=positions, span=len(block))


def ascending(selection: Selection, counts: Sequence[int], budget: Sequence[int | None]) -> list[Kept]:
    """What each item keeps, in ascending order, the given rows along with the indices.

    Args:
        counts: tokens of each item.
        budget: how many of them were to be kept; None: as many as the selection names (a synchronisation on a GPU).

    Raises:
        ValueError: on the CPU, where looking costs nothing: indices that repeat, lie outside the item, or are not as
            many as the budget.
    """
    end = torch.iinfo(torch.int64).max
    index, order = selection.index.masked_fill(selection.index < 0, end).sort(dim=1)
    kept = []
    for row, (count, keep) in enumerate(zip(counts, budget)):
        wanted = int((index[row] < end).sum()) if keep is None else keep
        chosen = index[row, :wanted]
        if index.device.type == "cpu" and (
            len(chosen) < wanted
            or (chosen[1:] == chosen[:-1]).any()
            or bool((chosen >= count).any())
            or bool((index[row, wanted:] < count).any())
        ):
            asked = "" if keep is None else f"{keep} "
            raise ValueError(
                f"the pruner must give {asked}different indices in 0..{count - 1}, got {selection.index[row].tolist()}"
            )
        place = order[row, :wanted]
        features = None if selection.features is None else selection.features[row, place]
        merged = None if selection.merged is None else selection.merged[row, place]
        kept.append(Kept(chosen, features, merged))
    return kept
