"""The pictures of a batch's items (thumbnail and tiles, frames), for methods that choose within each."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmprune.contract import Geometry, VisualTokens
from vlmprune.pruners._grid import shares


def picture_of(geometry: Geometry) -> Tensor:
    """int64 [N]: the picture that each token came from, -1 for those of none (line breaks between tiles)."""
    return geometry.plane if geometry.tile is None else geometry.tile


class Pictures:
    """R pictures of I items, one row each, and what each may keep.

    An item's budget is split over its pictures in proportion to their tokens that show a place. Line breaks get only
    what is left when all of these stay.

    Attributes:
        item, number: int64 [R], on the CPU: which item, which of its pictures.
        sizes, budget: int64 [R], on the CPU: tokens that show a place, and how many of them may stay.
        inside: bool [R, n], which of a row's places hold one of the picture's tokens.
        placed: bool [R, n], which of these show a place (a line break or a CLS token does not).
    """

    def __init__(self, tokens: VisualTokens, budget: Tensor) -> None:
        device = tokens.features.device
        members: list[Tensor] = []
        placed: list[Tensor] = []
        where: list[tuple[int, int]] = []
        budgets: list[Tensor] = []
        self._loose: list[Tensor] = []
        for item, (geometry, keep) in enumerate(zip(tokens.geometry, budget.tolist())):
            source, shown = picture_of(geometry), ~geometry.placeless
            sizes = torch.bincount(source[shown], minlength=len(geometry.pictures))
            places = min(keep, int(sizes.sum()))
            self._loose.append((~shown).nonzero().flatten()[: keep - places])
            share = shares(sizes, places)
            for number in sizes.nonzero().flatten().tolist():
                members.append((source == number).nonzero().flatten())
                placed.append(shown[members[-1]])
                where.append((item, number))
                budgets.append(share[number])
        self.item, self.number = torch.tensor(where, device="cpu").unbind(1)
        self.sizes = torch.stack([each.sum() for each in placed])
        self.budget = torch.stack(budgets)
        member = pad_sequence(members, batch_first=True, padding_value=-1)
        self._member = member.to(device, non_blocking=True)
        self._item = self.item.to(device, non_blocking=True)
        self.inside = self._member >= 0
        self.placed = pad_sequence(placed, batch_first=True).to(device, non_blocking=True)

    def rows(self, signal: Tensor) -> Tensor:
        """[I, N, ...] -> [R, n, ...], rows behind a picture's last repeating its item's first."""
        return signal[self._item[:, None], self._member.clamp(min=0)]

    def each(self, signal: Tensor) -> Tensor:
        """[I, P, ...] with a row for each picture -> [R, ...]."""
        return signal[self._item, self.number.to(signal.device, non_blocking=True)]

    def back(self, chosen: Tensor, width: int) -> Tensor:
        """bool [R, n] -> bool [I, width]: what is chosen of the pictures, of their items."""
        items = int(self.item.max()) + 1
        flat = torch.zeros(items * width + 1, dtype=torch.bool, device=chosen.device)
        place = torch.where(self.inside, self._item[:, None] * width + self._member, items * width)
        return flat.scatter(0, place.flatten(), chosen.flatten())[:-1].view(items, width)

    def collect(self, index: Tensor, used: Tensor, *more: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Put what the pictures of every item keep one behind the other.

        Args:
            index: int64 [R, K], chosen places of each picture.
            used: bool [R, K], on the CPU: which of these count.
            more: [R, K, ...] to take along.

        Returns:
            int64 [I, K'], tokens of each item, -1 behind its last; and the others as [I, K', ...], zeros where a token
            was not chosen but left over.
        """
        flat = torch.arange(used.numel(), device="cpu").view_as(used)
        slots, extra = [], []
        for item, loose in enumerate(self._loose):
            mine = flat[self.item == item][used[self.item == item]]
            slots.append(torch.cat([mine, torch.full_like(loose, used.numel())]))
            extra.append(torch.cat([torch.zeros_like(mine), loose]))
        slot = pad_sequence(slots, batch_first=True, padding_value=used.numel()).to(index.device, non_blocking=True)
        loose = pad_sequence(extra, batch_first=True, padding_value=-1).to(index.device, non_blocking=True)
        token = self._member.gather(1, index.clamp(min=0))
        token, *others = (torch.cat([x.flatten(0, 1), x.new_zeros(1, *x.shape[2:])])[slot] for x in (token, *more))
        return torch.where(slot < used.numel(), token, loose), others
