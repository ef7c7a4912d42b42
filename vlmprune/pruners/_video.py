"""What methods that compare the frames of a video share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmprune.contract import Geometry, Pruner, Selection, VisualTokens
from vlmprune.pruners._grid import cell_of, centres


@dataclass(kw_only=True)
class FrameMethod(Pruner):
    """Chooses among the tokens [T, n, D] of one video's T frames (an image is one frame).

    Tokens that show no place (line breaks) are kept last, where the budget has room for them.
    """

    @abstractmethod
    def choose(self, frames: Tensor, keep: int, part: Callable[[str], Tensor]) -> tuple[Tensor, Tensor | None]:
        """int64 [keep], flat indices t * n + p in any order, and rows [keep, D] to put there or None.

        Args:
            part: gives a signal of those that the method `needs`, [T, n, ...].
        """

    def of_image(self, geometry: Geometry, frames: Tensor, keep: int) -> tuple[Tensor, Tensor | None] | None:
        """The choice where there is nothing to compare with, or None if `choose` knows."""
        return None

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        index, rows = [], []
        for number, (geometry, keep) in enumerate(zip(tokens.geometry, budget.tolist())):
            placed = (~geometry.placeless).nonzero().flatten()
            order = geometry.plane[placed] if geometry.kind == "video" else torch.zeros_like(placed)
            sizes = torch.bincount(order)
            sizes = sizes[sizes > 0]
            if len(sizes) and int(sizes.min()) != int(sizes.max()):
                raise ValueError(f"{self.name} compares whole frames: let it act before methods that cut them")
            shape = (max(1, len(sizes)), -1)
            where = placed.to(tokens.features.device, non_blocking=True)
            own = tokens.features[number]
            frames = own[where].unflatten(0, shape)
            most = min(keep, len(placed))
            found = self.of_image(geometry, frames, most) if shape[0] == 1 else None
            if most == len(placed):
                found = (torch.arange(most, device=own.device), None)

            flat, merged = found or self.choose(frames, most, partial(_part, tokens, number, where, shape))
            loose = geometry.placeless.nonzero().flatten()[: keep - most].to(own.device, non_blocking=True)
            index.append(torch.cat([where[flat], loose]))
            rows.append(None if merged is None else torch.cat([merged.to(own.dtype), own[loose]]))
        chosen = pad_sequence(index, batch_first=True, padding_value=-1)
        if all(each is None for each in rows):
            return Selection(chosen)
        plain = [tokens.features[i][each] if row is None else row for i, (each, row) in enumerate(zip(index, rows))]
        given = pad_sequence(plain, batch_first=True)
        same = (given == tokens.features.gather(1, chosen.clamp(min=0)[..., None].expand_as(given))).all(-1)
        return Selection(chosen, given, ~same)


def _part(tokens: VisualTokens, number: int, where: Tensor, shape: tuple[int, int], name: str) -> Tensor:
    return tokens.signal(name)[number][where].unflatten(0, shape)


def spread(geometry: Geometry, keep: int, device: torch.device) -> tuple[Tensor, None]:
    """An even grid over the places of an image: numbers among those that have one."""
    picks = centres(geometry, cell_of(geometry, keep), keep)
    rank = (~geometry.placeless).cumsum(0) - 1
    return rank[picks].to(device, non_blocking=True), None


def first_true(mask: Tensor, count: int) -> Tensor:
    """int64 [count]: where a bool vector with that many True entries is True, ascending, without asking the device."""
    return (~mask).int().sort(stable=True).indices[:count]


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """fp32 cosine over the last axis; a zero row is similar to nothing."""
    return torch.nn.functional.cosine_similarity(x.float(), y.float(), dim=-1)
