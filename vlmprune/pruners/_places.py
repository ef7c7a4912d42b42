"""Which tokens show a place in the picture. Line breaks and CLS rows do not, and no published method ranks them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmprune.contract import Geometry, VisualTokens
from vlmprune.pruners._pictures import picture_of


def placed(tokens: VisualTokens) -> Tensor:
    """bool [I, N]: tokens that show a place in the picture. Never waits for a GPU."""
    if not any(shape.placeless.any() for shape in tokens.shapes):
        return tokens.valid
    return remaining(tokens, [~shape.placeless for shape in tokens.shapes])


def remaining(tokens: VisualTokens, tables: list[Tensor]) -> Tensor:
    """[I, N]: of tables on the CPU, one [N0] an item, the entries of the item's remaining tokens, padded by 0."""
    device = tokens.features.device
    rows = [table.to(device, non_blocking=True)[index] for table, index in zip(tables, tokens.index)]
    return pad_sequence(rows, batch_first=True)


def fill_up(index: Tensor, tokens: VisualTokens, budget: Tensor) -> Tensor:
    """Picks [I, K] among `placed` tokens; where these are fewer than `budget` [I], the first placeless ones follow."""
    places = placed(tokens)
    if places is tokens.valid:
        return index
    order = (places | ~tokens.valid).long().argsort(dim=1, stable=True)
    step = torch.arange(index.shape[1], device=index.device)
    spare = order.gather(1, (step - places.sum(1, keepdim=True)).clamp(min=0))
    missing = (index < 0) & (step < budget.to(index.device, non_blocking=True)[:, None])
    return torch.where(missing, spare, index)


def pictures(shape: Geometry) -> Tensor:
    """int64 [N0]: number of the picture that each token came from, -1 for tokens that show no place."""
    return picture_of(shape).masked_fill(shape.placeless, -1)


def overview(shape: Geometry) -> Tensor:
    """bool [N0]: tokens of an image's thumbnail; of a video, or an image in one picture, all that show a place.

    Where tiles are put together (LLaVA-NeXT) the thumbnail is the first picture, where each is a plane of its own
    (InternVL) the last.
    """
    number = pictures(shape)
    if shape.kind == "video" or len(shape.pictures) < 2:
        return number >= 0
    return number == (0 if shape.tile is not None else int(number.max()))
